"""Single-file checkpoints (ComfyUI, Forge, original releases) become a folder in diffusers' layout.

Read `single_file`, then `lazy_tensors`: tensors that are read from disk only when they are written.

Imports `trainer.spec` and `trainer.storage`.
"""
