"""States on disk: written while training continues, kept, pruned and resumed from.

A state holds everything that makes the next step the same step: the adapters, the optimiser, the schedule, the average
(EMA), the step guard, all random generators (`trainer.training.state`), and beside them the essence of the plan, the
fingerprint of the dataset, and which software and device made it.

Order of a save: copy in memory; the LoRA files; the state. Each file or folder is written under a temporary name,
flushed, read back, and renamed. So a kill at any moment leaves complete LoRA files and complete states: what a kill cut
off has a temporary name, which the next save or start removes. A state comes last, so where there is one, its LoRA is
there too; only a stop writes the state first, because it may leave few seconds. A state is removed by a rename first.

Read `open_run` (the run that a job is, among those of an output folder), `state_files` (the format), `snapshots`
(copies for a save), `retention` (which saves stay) and `resume`.

Imports `trainer.training` and the packages below it; `trainer.job` imports it.
"""
