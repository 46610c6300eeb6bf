"""dataset.json and prompts.txt: read, checked key by key, completed from the variables.

Read `manifest` (the tables of keys; how to add one; the three levels), `complete` (the variables, the model's
resolution and DATASET_NAME are filled in). `documents` gets the text from a path, a URL or the value itself, which
`trainer.spec.documents` reads; `shapes` checks the outline; `sources` tells folders, archives and Hub datasets apart
by their names.

Everything is checked before anything is fetched, and all problems are reported in one message.

Imports `entrypoint.settings` and `entrypoint.system`.
"""
