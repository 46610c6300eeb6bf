"""Ways to train with less device memory.

Read `checkpointing` (what the backward pass recomputes), `activation_offload` (saved activations wait on the host),
`weight_streaming` (frozen weights come from the host region by region) and `pinned` (page-locked buffers).
"""
