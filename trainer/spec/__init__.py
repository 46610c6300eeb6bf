"""What can be said about a job without torch: errors, the plan, families, prompts, weight formats, memory.

Plans are made from these modules in milliseconds, so none of them imports torch at import time. Read in this order:
`errors`, `plan` and `resume_rules` (which changes a resumed job allows); `family` (the interface and the facts of a
model family), `targets` (which of its layers get adapters), `published` (the configs of its published models) and
`prediction_marks` (what a file of weights predicts);
`values` and `prompts` (strict reading of what users write); `optimizers`; `sanity` (settings that make no sense with as
many steps as a job has); `weight_formats`, `adapter_columns` and
`strategies` (ways to save memory), then `memory_model`, which predicts what they take.

Imports nothing else of the trainer. Everybody may import it, the entrypoint included.
"""
