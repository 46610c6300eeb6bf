"""Files that outlive the process: atomic writes, digests, locks, safetensors headers and writing.

Read `atomic` first. A file here is written beside its place, flushed, and renamed, so that no name is ever half a file.

Imports `trainer.spec`. The entrypoint may import all but `safetensors_writer`, which needs torch.
"""
