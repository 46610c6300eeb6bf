"""Train in the memory there is, fast: quantised frozen weights, adapters, recomputation, offload, CUDA graphs.

How a step runs, end to end:

1. `load` brings the denoiser to the device block by block, quantises its frozen weights (`quantization/`) and puts
   fused forward passes on its blocks (`fused_linear`, `rope`), if their kernels pass the self-test (`kernels/`).
   `adapters` adds the LoRA, and `flat_parameters` joins its parameters for the optimiser. A `training_adapter` is
   merged into the weights before they are quantised, and subtracted where samples are drawn.
2. `execution.Engine` installs the planned memory mode on the regions: checkpointing, activation offload, weight
   streaming (`memory/`), compilation, and the attention kernel (`attention/`).
3. A step calls `cuda_graphs.GraphStep` or `EagerStep` with a micro-batch, which runs in the engine's contexts:

       step(function, inputs)                            replays a captured graph, or runs the pass:
         with engine.forward_backward(AdapterCast):      casts the adapters once; at the end, joins all copies
           with engine.saved_tensors():                  saved activations go to the host
             denoiser(...)                               each region: its weights come, it runs, checkpointed
           loss.backward()                               weights and activations come back, regions are recomputed
       -> flat_grad                                      one tensor with all gradients

4. If memory runs out in the rehearsal step, `Engine.drop_adapter_columns` frees what serves speed alone, and
   `Engine.step_down` takes the next memory mode of `trainer.spec.strategies`.

Between two steps, samples and validation run in the memory of the captured steps (`graph_pool`, `pooled_calls`).

Read `load`, `quantization/`, `adapters`, `fused_linear`, `kernels/`, `memory/`, `execution`, `cuda_graphs`. The design
and the figures are in docs/engine.md. `encoders` loads text encoders and the VAE, `device` limits and frees memory, and
`adapter_strength` lets the adapters act more or less for samples.

Knows no model family. Imports `trainer.spec`, `trainer.storage`, `trainer.lora_files` and `trainer.base_model`.
"""
