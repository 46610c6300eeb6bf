"""Models and datasets are brought to local folders: from the Hub, from an address, from an archive.

Read `everything` (what a job fetches, at the same time), `fetch`, `hub`, `http`, `archive`, `local_weights` (models
that need no repository), `training_adapter` (one file), `packages` (what the images lack) and `flash_attention`. A
dataset of the Hub becomes a folder in five modules: `hub_choice` (which files are downloaded), `hub_layout` (which of
them belong to the subset and the split), `hub_rows` (the images and captions are written), `hub_folder` (rows from
image files and archives) and `hub_columns` (which columns hold images and captions). `captioner` brings the model that
captions images.

Imports `entrypoint.settings`, `entrypoint.system` and `entrypoint.dataset_config`.
"""
