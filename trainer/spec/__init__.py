"""What can be said about a job without torch: errors, the plan, families, weight formats, memory.

Read `errors`, `plan`, `family`, `weight_formats`, `strategies`, then `memory_model`. Plans are made from these
modules in
milliseconds, so none of them imports torch at import time.

Imports nothing else of the trainer. Everybody may import it, the entrypoint included.
"""
