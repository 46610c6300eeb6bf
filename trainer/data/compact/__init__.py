"""Many images in little memory: columns of numbers and bytes instead of an object for each image.

A million `ImageRecord`s are some gigabytes of Python objects. `columns` keeps texts end to end in one buffer;
`image_table` has the images of a scan as such columns and makes a record when one is asked for; `examined` has what the
scan has read from the files, until the records are made. `seen` has it for the scans of other jobs of a command.
"""
