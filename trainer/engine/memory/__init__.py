"""Ways to train with less device memory. `trainer.spec.strategies` says in which order they are tried.

Read in this order:

- `checkpointing`: the backward pass recomputes what the forward pass did not keep. Its policies `none`, `products`,
  `attention` and `all` keep less and less.
- `activation_offload`: what the forward pass keeps waits in host memory until the backward pass needs it.
- `weight_streaming`: frozen weights wait elsewhere; each region's weights come to the device before it runs.
- `sharding`: they wait in parts on the GPUs of the job, instead of in host memory.
- `pinned`: page-locked host buffers, which both kinds of offload copy from and to.

What is on the device, with all three (policy `all`, offload `weights`). A region is a module that is compiled and
recomputed as one, mostly a block; each line is a CUDA stream, and time goes to the right:

    computation    | forward 0 | forward 1 | forward 2 |   …   | recompute + backward 2 | recompute + backward 1 |
    weights in     | weights 1 | weights 2 | weights 3 |   …   | weights 1              | weights 0              |
    activations out            | input 0   | input 1   |   …
    activations in                                         …   | input 1                | input 0                |

    slot A           0           2           2                   2                        0
    slot B           1           1           3                   1                        1

Two slots (`RESIDENT_REGIONS`) hold weights: those of the running region, and those of the next one. Copies wait for the
computation on whose memory they write, and the computation waits for the copies that it reads, by CUDA events; the host
never waits. At most a sixteenth of the activations (`IN_FLIGHT_SHARE`) is on its way out, and as much on its way in.

Parts of torch that we work around, and what breaks otherwise:

- `torch.utils.checkpoint` before version 2.13 leaves its hooks and modes in place when the region fails, until the
  generator that holds them is collected. What runs next, such as a step with less memory, would run inside them
  (`checkpointing._checkpointed`).
- `torch.utils.checkpoint` saves the random generator's state, which cannot be read during a CUDA graph capture. No
  region draws random numbers, so it is told not to (`checkpointing.CHECKPOINT_OPTIONS`).
- `saved_tensors_hooks` that return the saved result to the operation that made it create a reference cycle, which only
  the backward pass breaks: a failed pass would stay on the device (`activation_offload.without_graph`).
- torch's pinned allocator rounds sizes up to powers of two, up to twice the memory (`pinned.pinned_bytes`).
- Dynamo stops compiling a function after 8 recompilations; regions share one function (`checkpointing.apply`).
- A capture that fails leaves torch's allocator and random generator in capture mode (`trainer.engine.cuda_graphs`).

Imports `trainer.spec` and `trainer.storage`, and from `trainer.engine` only `quantization`.
"""
