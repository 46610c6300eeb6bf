"""The configs of the published base models, one module for each family: numbers that their repositories state.

Values that equal the defaults of diffusers' and transformers' classes may be left out. Read `common` first, which has
what several families share (text encoders, VAEs, tokenizers); then `flux`, `flux2`, `sdxl`, `sd3`, `z_image`,
`qwen_image`, `krea2`. `licences`: what a model card says of each.
"""
