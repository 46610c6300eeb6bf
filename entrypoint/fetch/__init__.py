"""Models and datasets are brought to local folders: from the Hub, from an address, from an archive.

Read `fetch`, `hub`, `http`, `archive`, `hub_rows` (datasets stored as tables), `model_folder` (which files are
needed, and whether they are whole), `weight_kinds` (what a file of weights is), `local_weights`
(models that need no repository) and `flash_attention`.

Imports `entrypoint.settings`, `entrypoint.system` and `entrypoint.dataset_config`.
"""
