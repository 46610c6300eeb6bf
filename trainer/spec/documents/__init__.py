"""Files that people write, dataset.json and prompts: a text becomes a tree, and a tree of prompts becomes requests.

Read `forms` (JSON, JSON5, YAML and TOML give the same tree), `strict_json` (what JSON is accepted) and `prompt_trees`.
What the keys of dataset.json mean is in `entrypoint.dataset_config`.
"""
