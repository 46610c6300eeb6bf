"""What can be said about a job without torch: errors, the plan, families, prompts, weight formats, memory.

Plans are made from these modules in milliseconds, so none of them imports torch at import time. Read in this order:
`errors`, `plan` and `rules` (what follows from a plan); `family` (the interface and the facts of a model family, with
the configs of its published models), `targets` (which of its layers get adapters) and `prediction_marks` (what a file
of weights predicts); `values` (also names in messages), `prompts` and `documents` (strict reading of what users write);
`optimizers`; `weight_formats`, `adapter_columns` and `strategies` (ways to save memory), then `memory_model`, which
predicts what they take; `library_noise` silences other libraries, `log_lines` says what of it reaches a terminal, and
`messages` keeps secrets out of it. `commands` has what the commands beside the job share.

Imports nothing else of the trainer. Everybody may import it, the entrypoint included.
"""
