"""Triton kernels of the 8-bit engine, their references in plain torch, and the self-test that compares the two.

Read `reference` and `rope_reference` for the arithmetic; `quantize_triton`, `norm_gelu_triton` and `rope_triton` are
the same on a GPU. `self_test` decides whether a device may use them.
"""
