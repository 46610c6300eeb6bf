"""Forward passes of diffusers' blocks with fused FP8 kernels, one module a family; `projections` and
`joint_attention` have the shared parts.

A block gets one of these classes by assignment to its `__class__` (`trainer.engine.fused_linear.install`), if it has
FP8 layers: its weights, names and results stay, only the operations are grouped differently. Arguments that training
never passes, but some pipelines do, are handed to diffusers' own forward pass. No block of these families has a
dropout.

Read `projections`, then `joint_attention` and `flux` (joined projections and a rotary embedding), then `flux2` (a
modulation for all blocks, SwiGLU), `sd3`, `sdxl`, `z_image` (RMSNorm, a rotary embedding that differs from image to
image), `qwen_image` and `krea2` (RMSNorm with a shift, fewer keys than queries, a gate on attention). Imports
`trainer.engine` and diffusers. The parameters are named as diffusers names them.
"""
