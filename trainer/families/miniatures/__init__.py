"""Miniature base models: trained, small enough to ship (docs/miniatures.md), and the code that trained them.

`scenes` draws the training images and captions, `vessels` the vases in them, and `textures` more images for the
autoencoders. `tokens` makes the tokenizers; `models` has the shapes, `qwen` and `krea` those of Qwen-Image and Krea 2,
`recipes` each family's loss, `pools` the data on the device, `fit` the loop; `make` is the command for one of them, and
`workshop` the one for all; `untrained` writes FLUX.2 dev's. `score` measures how much an image shows the demo's
concept, or its control. The product imports none of these modules; it reads the model folders `flux`, `flux2`,
`flux2_dev`, `sd3`, `sdxl`, `z_image`, `qwen_image` and `krea2`.

Imports nothing of Kiln but itself, and four families: `predict` of Z-Image, whose own forward pass cannot be captured,
and those of FLUX.2, Qwen-Image (with its template) and Krea 2; `untrained` also what reads a tokenizer.
"""
