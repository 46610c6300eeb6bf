"""Models and datasets are brought to local folders: from the Hub, from an address, from an archive.

Read `everything` (what a job fetches, at the same time), `fetch`, `hub`, `http`, `archive`, `local_weights` (models
that need no repository), `training_adapter` (one file), `packages` (what the images lack) and `flash_attention`.
`streams` brings shards while the job trains. `hub_dataset` makes a folder of a dataset of the Hub, `doors` brings files
from other places. `captioner` brings the model that captions images.

Imports `entrypoint.settings`, `entrypoint.system` and `entrypoint.dataset_config`.
"""
