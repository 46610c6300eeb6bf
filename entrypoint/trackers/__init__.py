"""LOG_WITH: a process beside the job sends numbers, samples and the plan to wandb, mlflow or trackio.

Read `beside` (what the entrypoint sees), `install` (the library comes into the cache), `feed` (what the run's files
say, each thing once), `__main__` (the process), and `wandb_run`, `mlflow_run`, `trackio_run` (how each library takes
it). TensorBoard's files are the trainer's own (`trainer/job/reporting/metrics.py`).
"""
