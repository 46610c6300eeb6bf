"""What the commands beside the job have in common: `sample`, `export`, `bake`, `health` and `runpod`.

Read `parser` (their arguments) and `ending` (their exit codes, which docs/outputs.md lists). What becomes of their
answers where nobody reads them is in `trainer.process.streams`.
"""
