"""States on disk: written while training goes on, kept, pruned and resumed from.

Read `state_files` (the format), `snapshots` (copies for a save), `retention` (which saves stay) and `resume`.

Imports `trainer.training` and the packages below it.
"""
