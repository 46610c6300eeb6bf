"""Files: atomic writes, careful reads, digests, locks, safetensors headers and writing.

Read `atomic` first: every file here is written beside its place, flushed, and renamed, so that a name is never half a
file, whenever the process is killed. Then `read` (files of users, which may be anything), `safe_names` (names from
outside, before they become paths), `locks` (one job in an output folder), `folders` (a download is complete under its
name or not there), `run_records` (the runs in it), `own_files` (what a job wrote there, and what a user did) and
`choose_run` (which run a plan goes on with), `json_files` (reading what others may have changed), `digests` (SHA-256 of
files, weights and JSON), `safetensors_header` (the one reader of headers, without torch) and `safetensors_writer`.

Imports `trainer.spec`. The entrypoint may import all but `safetensors_writer`, which needs torch.
"""
