"""The machine: its accelerators, the environment of child processes.

Read `hardware` (which GPUs there are and what they can do: the only module that tells vendors apart), `cards` (GPUs to
plan for that are not here), then `environment` (what a child process gets to see).

Imports `entrypoint.settings`, and `trainer.spec` and `trainer.storage`.
"""
