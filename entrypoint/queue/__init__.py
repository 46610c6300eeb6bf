"""Several jobs from one start: JOBS (a queue), SWEEP (combinations), BASE_MODEL with several names.

A thin layer above one job: each is the same program with its own variables and its own output folder, in processes of
its own, so that a job that fails, hangs or runs out of memory takes nothing with it. `jobs` makes the jobs of the
variables, and refuses what is wrong with any before one starts; `record` is queue.json, by which a restart goes on;
`run` starts and stops them, on all GPUs; `table` and `sheet` are what is left for people.

Imports settings, system, dataset_config, report, processes and monitor.
"""
