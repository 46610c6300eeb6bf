"""Single-file checkpoints (ComfyUI, Forge, original releases) become a folder in diffusers' layout.

Users have one file with the denoiser, or with all parts of a model, under the names of the original release. A job
reads folders in the layout of diffusers. So each part is converted once, into the cache, and a folder of links puts
the parts together.

Read `single_file`, then `lazy_tensors`: tensors that are read from disk only when they are written, so that a file of
24 GB is converted in the memory of a few tensors. `weight_check` finds weights that are no numbers. Before that, and
without torch (the entrypoint uses these): `weight_kinds` tells what a file of weights is, `model_folder` whether a
folder is whole, `configs` and `tokenizer_files` what its other files may say, and `without_weights` makes the folder of
a model whose parts are all local files. `named` finds the base model that a command line names, and `hub_files`
downloads it: for a job, the entrypoint does both. `light_tokenizer` counts tokens; `charsmap` checks a table of T5's.
`loading` alone hands files to diffusers and transformers, after all these checks.

Imports `trainer.spec` and `trainer.storage`.
"""
