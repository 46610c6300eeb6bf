"""One optimiser step, and what changes with it.

Read `loop`, `gradients`, `objective`, `optimizers`, `state` (all that a checkpoint restores), `step_guard` (steps
with bad
numbers are skipped), `ema`, `text_encoders`, `distributed` (several GPUs), `random_state` and `stop_flag`.

Imports `trainer.data`, `trainer.engine` and the packages below them.
"""
