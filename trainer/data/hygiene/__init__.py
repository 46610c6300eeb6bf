"""What a person would notice in the images of a dataset: near-duplicates, blur, black bars, tiny images, cut faces.

Read `looks` (what is measured in each image while it is scanned), `faces` (where they are, if a detector is installed),
then `remarks` (the lines that say it). Everything is reported and nothing is changed: what to do about it is the user's
choice.
"""
