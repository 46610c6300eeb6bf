"""A dataset of the Hub becomes a folder of images and captions.

In this order: `hub_choice` (which files are downloaded), `hub_layout` (which of them belong to the subset and the
split), `hub_rows` (the images and captions are written), `hub_folder` (rows from image files and archives) and
`hub_columns` (which columns hold images and captions).
"""
