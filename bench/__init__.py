"""The measurements behind every figure in docs/, and the proof that a refactoring changes no result (`bench.same`).

`python -m bench` lists them. Each module's `main` prints JSON lines; `report` formats them, `step`, `full_size` and
`original_names` have what several share.
"""
