"""Frozen weights in 8 or 4 bits, and the LoRA layers on top of them.

Read `formats` (how each weight format stores and multiplies), `frozen_linear` (the layer, its autograd function),
`lora_linear` (peft's LoRA layer on it) and `cast_adapters` (all adapters cast to 16 bits at once). Imports
`trainer.engine.kernels`, `trainer.engine.flat_parameters` and `trainer.spec`, and knows no model. The sizes of adapter
columns are in `trainer.spec.adapter_columns`; `trainer.engine.fused_linear` fuses these layers with the operation
before them.

Letters: M rows (the tokens of a micro-batch), K input and N output features of a layer, R the adapter's rank,
F = K + padding (the length of a row of an FP8 matrix). In code, `down` is A (R, K) and `up` is B (N, R) times
alpha / rank.

Which products run in which format
----------------------------------
A layer with an adapter computes y = x Wᵀ + bias + h Bᵀ, with h = x Aᵀ. A linear layer that trains needs three large
products: the forward pass x Wᵀ, the input's gradient g W, and the weight's gradient gᵀ x. The frozen weight needs no
gradient, so the third one is never computed, and W can be quantised once, when it is loaded. Only the quantised copy is
kept. What trains is A and B, whose products are skinny, bound by memory, and stay in 16 bits.

    product             shapes                       format fp8
    y = x Wᵀ            (M, K) (K, N) -> (M, N)      FP8 x FP8 -> bf16. x by row, W by output channel
    gx = g W            (M, N) (N, K) -> (M, K)      FP8 x FP8 -> bf16. g by row, after W's scales are multiplied in
    h = x Aᵀ            (M, K) (K, R) -> (M, R)      16 bits
    h Bᵀ                (M, R) (R, N) -> (M, N)      adapter columns of the first product (below)
    gh = g B            (M, N) (N, R) -> (M, R)      16 bits
    gh A                (M, R) (R, K) -> (M, K)      adapter columns of the second product
    gA = ghᵀ x          (R, M) (M, K) -> (R, K)      16 bits, then fp32
    gB = gᵀ h           (N, M) (M, R) -> (N, R)      16 bits, then fp32

FP8 is e4m3 for gradients as well: with a scale for each row, its range is enough, and it has 3 bits of mantissa where
e5m2 has 2. A scale for each row, where torchao's default has one for each tensor: rows of x differ by orders of
magnitude, and a scale of its own costs a row nothing in the GEMM.

W's scales belong to its rows n. In the forward pass n is a column of the result, so cuBLAS applies the scale there. In
the backward pass the GEMM sums over n, so the scale must be applied before: g is multiplied by it and then quantised by
a new scale for each of its rows.

The other formats: `fp8-fnuz` and `fp8-fnuz-storage` are the same in the types of CDNA 3. `int8` multiplies in int8 and
adds LoRA terms afterwards. `fp8-storage`, `int8-storage` and `nf4` dequantise the weight to 16 bits and multiply there.
`torchao` is torchao's float8 training, to compare with.

Adapter columns
---------------
Added as a product of its own, h Bᵀ reads and writes the whole output once more: all of them took 73 of 1,039 ms a step
(Flux.1, batch 4, H200). Instead, h and B are appended as columns to x and W, and one GEMM computes both terms: this
takes 16 ms, and writing the columns 3. Columns share the scale of the row that they extend. One FP8 number has 4
significant bits, which is too few for a term that trains, so each value is written as two FP8 numbers: high, the
nearest one, and low, the one nearest to the remainder.

    forward: y = x Wᵀ + h Bᵀ, one GEMM over F columns

                K columns             R        R        R      to 128 bytes
            +---------------------+--------+--------+--------+-----+
    x8    M |  x                  | h high | h low  | h high |  0  |   times a scale for each row, (M, 1)
            +---------------------+--------+--------+--------+-----+
            +---------------------+--------+--------+--------+-----+
    w8    N |  W                  | B high | B high | B low  |  0  |   times a scale for each channel, (1, N)
            +---------------------+--------+--------+--------+-----+
    sum        x Wᵀ              + hi·hi  + lo·hi  + hi·lo           =  x Wᵀ + h Bᵀ  (then the bias)

    backward: gx = g W + gh A, one GEMM over N + padding columns

                N columns             R         R         R      to 128 bytes
            +---------------------+---------+---------+---------+-----+
    g8    M |  g times W's scales | gh high | gh low  | gh high |  0  |   times a scale for each row, (M, 1)
            +---------------------+---------+---------+---------+-----+
            +---------------------+---------+---------+---------+-----+
    wt8   K |  Wᵀ                 | Aᵀ high | Aᵀ high | Aᵀ low  |  0  |   times 1
            +---------------------+---------+---------+---------+-----+

Of the four products of high and low parts, low times low is left out. A low part is at most 1 / 16 of its high part
(half a step of 3 bits), so that product is at most 1 / 256 of the term: about what bf16 rounds by
(`tests/trainer/engine/quantization/test_adapter_columns.py` allows an error of 4e-3).

Both sides are shifted into FP8's range by a factor: B is written times `FORWARD_UP_FACTOR`, A times
`backward_up_factor`, and h or gh divided by the same. Activations and gradients use only a quarter of the range,
weights 1 / 32 of it; the rest is for the columns (`kernels.reference`). What is still too large saturates.

The LoRA term is added after the product instead, in 16 bits, if its columns would be more than a fifth of the layer's
shorter side; if all weights of the layer are below `MIN_LARGEST_WEIGHT`; and in all layers, if the columns do not fit
in memory or a kernel fails its self-test.

Saved for the backward pass
---------------------------
x and h in 16 bits, if the layer has an adapter, for gA and gB; otherwise nothing. W, A and B are saved as references.
The columns of w8 are not: the backward pass writes its own into the transposed weight. In `fused_linear`, the input of
the fused operation is saved in x's place, and the rows x are recomputed.

The layout that cuBLAS wants, and its limits
--------------------------------------------
- `torch._scaled_mm` multiplies a row-major and a column-major matrix: both are contiguous along the summed axis. W is
  stored (N, K) for the forward pass. The backward pass needs (K, N) and transposes W each time, in 30 µs for 45 M
  weights, or keeps a second, transposed copy where memory allows (`FrozenLinear.keep_transposed`).
- Both sides must be multiples of 16. Layers with other sizes stay in 16 bits.
- Rows are padded to a multiple of 128 bytes. GEMMs on rows of 3,120 bytes took 25 % longer than on 3,072, with the
  padding 4 % longer.
- With row scales the output is bf16.
- With K above 5,120 and M x N below 2**17, cuBLAS 13.0 has no kernel with a bias: it is added after the product.
- `use_fast_accum=True` in both directions. With it, gradients have a worst cosine of 0.9958 to those of bf16, and a
  median of 0.9990 (Flux.1, docs/performance.md).

What breaks without it
----------------------
- `allow_in_graph` on the autograd functions: dynamo fails on one inside a checkpoint inside a compiled region.
- Operators instead of plain functions: selective checkpoints could not keep `kiln::fp8_product`, and the compiler would
  keep dequantised nf4 weights. With `torch.library.custom_op` the host was busy for 94 ms a step instead of 49.
- Writing the columns through `.data`: autograd would refuse the saved weight because its version has changed.
- Scales rounded to bf16 before W is divided by them: a scale that is rounded later puts the largest value of a row
  between two FP8 numbers; powers of two made the error of gradients a third larger.

Measurements are from docs/lab-notes.md ("Adapter columns in the GEMM") and docs/engine.md, where they say the GPU and
the command.
"""
