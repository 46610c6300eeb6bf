"""dataset.json and prompts.txt: read, checked key by key, completed from the variables.

Read `manifest`, `prompts`, then `complete`.

Imports `entrypoint.settings` and `entrypoint.system`.
"""
