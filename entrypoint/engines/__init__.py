"""The job for an engine that people have already: SkyPilot, dstack, Hugging Face Jobs, Kubernetes, Slurm and others.

`python -m entrypoint job ENGINE` writes what the engine's own tool starts, for the variables that are set here. Nothing
of it schedules anything. Read `request` first: the variables as the engine gets them, which of them are secrets, and
the GPUs that the planner found to fit. Then `documents` (what an engine's module returns) and one module for each
engine: `sky`, `dstack`, `hugging_face`, `kubernetes`, `slurm`, `vast`, `modal` and `runpod`. `again` is how a job is
tried again where the engine cannot tell exit codes apart; `gpu_names` has each engine's names of the GPUs. `command` is
the command line.

No secret is in any text that is made here: each engine's own way of secrets carries them.

Imports settings, system, dataset_config, planning, runpod, processes and queue.
"""
