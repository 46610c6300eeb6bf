"""Attention on accelerators: a fix for torch's cuDNN backward pass, and FlashAttention 4 in place of torch's kernel.

Models call `torch.nn.functional.scaled_dot_product_attention`; torch dispatches to one of its operators, and both
modules here register kernels of their own for these operators. So diffusers' code needs no change, and `torch.compile`
and CUDA graphs work as with torch's own kernels.

- `cudnn_fix`: torch (2.11 at least) builds one cuDNN graph for the backward pass of all calls whose q, k and v have the
  same sizes and strides. The graph contains the strides of the first call's gradient, and reads any other layout in
  the wrong places, even past its end: no error, other numbers. Flux.1 calls it with two layouts when q, k and v are
  separate layers. The fix gives each gradient the layout of the output, in every process that trains.
- `flash_attention_4`: Dao-AILab's kernels for compute capability 9.0 and above, if the package is installed and
  PARAMS_ATTENTION asks for it. Sizes that it does not take go to torch's own kernel. Before use, its results are
  compared with plain torch on the job's device.

Figures: docs/engine.md, "Attention". Imports nothing of the project.
"""
