"""Captions on disk: the text files beside images (sidecars), and metadata files with a row for each image.

In reading order:

1. `find` looks for the files of one subset and decides which caption an image gets.
2. `text_encoding` turns their bytes into text: Unicode, or the one older encoding that fits.
3. `sidecars` knows which names the text file of an image may have.
4. `tables` reads the rows of a metadata file: `formats` parses it, and `columns` chooses those of names and captions.
5. `matching` finds the image that a row names.
6. `notes` counts the captions, and names missing and empty ones and options that have no effect.
7. `findings` collects what a user must hear about: warnings, files and rows without use, and what must be mended.

Nothing is left out in silence: a file, row or column that no image uses is named in `Findings.unused`.
"""
