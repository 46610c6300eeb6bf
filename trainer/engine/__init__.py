"""Train in the memory there is, fast: frozen weights in 8 or 4 bits, adapters, recomputation, offload, CUDA graphs.

Read `load` (weights come in and are quantised), `quantization/` (their arithmetic), `adapters`, `fused_linear` and
`rope` (operations fused with FP8 products), `kernels/`, `memory/` (checkpointing, activation offload, weight
streaming),
`execution` (which of these apply, and how to step down), and `cuda_graphs`.

Knows no model family. Imports `trainer.spec`, `trainer.storage`, `trainer.lora_files` and `trainer.base_model`.
"""
