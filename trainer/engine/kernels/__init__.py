"""Triton kernels around the FP8 products, their references in plain torch, and the self-test that compares the two.

Read `reference` and `rope_reference` for the arithmetic. `quantize_triton`, `norm_gelu_triton`, `swiglu_triton` and
`rope_triton` do the same on a GPU. `dispatch` is the only place that chooses between the two, and `self_test` decides
before a job whether its GPU may use them. Imports `trainer.spec.adapter_columns` and nothing else of ours.

Letters: M rows (tokens of B images), K input and N output features, R the adapter's rank, H heads of D features.

Why kernels of our own
----------------------
cuBLAS computes the FP8 products and a library attention; the time between them is bound by memory. Quantisation in
compiled torch code ran at 0.9 to 1.4 TB/s, a Triton kernel at 2.9 to 3.7 (H200). And what comes before a product (a
norm, a GELU) can write its result in 8 bits at once, instead of 16 bits that another kernel reads and quantises.

    kernel                  reads -> writes                                 used by
    quantize_rows           x (M, K) -> values (M, K), scales (M, 1)        attention's output, text, gradients
    dequantize_rows         values (N, K), scales -> weight in 16 bits      modulations, storage formats, verification
    transpose               W (N, K) -> Wᵀ (K, N), in bytes                 the backward pass
    append_adapter_columns  h (M, R), B (N, R) -> columns of x8 and w8      each FP8 product with an adapter, both ways
    norm_rows               x -> LayerNorm and modulation, quantised;       fused_linear.norm_linear
                            not centred RMSNorm                             fused_linear.rms_linear
    norm_gradient           g, x -> gx, and the rows again                  their backward pass
    norm_residual           x, y, weight -> x + weight * RMSNorm(y)         fused_linear.norm_residual
    gelu_rows               y -> GELU or GEGLU, quantised                   fused_linear.gelu_linear
    gelu_gradient           g, y -> gy, and the rows again                  its backward pass
    swiglu_rows             left, a, b -> [left, silu(a) * b], quantised;   fused_linear.swiglu_linear
                            without silu sigmoid(a) * b                     fused_linear.gated_linear
    swiglu_gradient         g, a, b -> ga, gb, g_left, and the rows again   its backward pass
    gated_residual          x, gate, y -> x + gate * y                      fused_linear.gated_residual
    rotate                  qkv -> RMSNorm by head and rotary embedding     rope.norm_rope
    rotate_gradient         gq, gk, gv, qkv -> gradient of qkv              its backward pass
    rotate_heads            q (or k) -> the same, of a separate layer       rope.head_norm_rope
    rotate_heads_gradient   g, q -> gradient of q                           its backward pass

Adapters need the inputs of products in 16 bits as well. Forward kernels write these rows too (`keep_rows`), from the
same values that they quantise. They are not saved: the gradient's kernel reads x or y anyway and writes them again.

How they are built
------------------
- A row has one scale, so its largest value must be known before any of it is quantised. A program therefore handles one
  row. Norms hold all of it in registers, since they need its mean and variance first; GELU and `quantize_rows` go over
  it twice in chunks, because long rows (15,360) would leave too few programs on each multiprocessor.
- All arithmetic is in fp32 and rounded once. NaN stays NaN in FP8, so that a broken step is noticed; an inf becomes the
  largest value of its row.
- Kernels are `triton_op`s where compiled code calls them, so that torch.compile sees what they launch. On CPU tensors,
  `dispatch` calls the references instead.
  `append_adapter_columns` runs inside the operator `kiln::fp8_product`, and compiled code has its own `gated_residual`:
  these two are plain launches, which cost the host less.
- No kernel synchronises or allocates on the host, so that steps can be captured as CUDA graphs.

What goes wrong
---------------
- Values that a program converted to FP8 in registers came back in permuted positions: the low parts of adapter columns
  were wrong for one number in two. High parts are rounded by bit operations instead.
- int8 values rounded halves up, where torch rounds them to even: 0.3 % of the values of bf16 rows.
- A kernel without the low parts would be only 1.9 % off in the whole row: the self-test compares each part.

A new kernel needs its reference here, a line in `dispatch` for each side, a comparison in `self_test`, and a test in
`tests/gpu/test_fused_kernels.py` or `test_engine.py`, and a comparison in `tests/support/interpreted_kernels.py`.
`python -m bench targets` compiles each for cards that are not here, `python -m bench kernels` prints the bandwidth that
each reaches.
Attempts that were slower are in docs/lab-notes.md ("Adapter columns in the GEMM").
"""
