"""One optimiser step, and everything that changes with it.

Read `loop` (the step, in order), `gradients` (seeds, mean, halving when memory runs out), `objective` (noise, target,
loss), `state` (all that a checkpoint restores), `optimizers`, `ema`, `step_guard` (skips steps with bad numbers),
`text_encoders` (that train too), `distributed` (several GPUs: what is summed when), `band_losses` (the loss by noise
level), `random_state`, `stop_flag` and `page_requests`.

Shapes: a suffix of letters names the axes of a tensor; each file that uses them has a legend.

Imports `trainer.data`, `trainer.engine` and the packages below them; names no model family. `trainer.checkpoints` and
`trainer.job` import it.
"""
