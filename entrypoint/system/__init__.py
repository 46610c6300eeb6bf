"""The machine: its accelerators, its secrets, the environment of child processes.

Read `hardware` (which GPUs there are and what they can do), `machine` (which is asked once for all jobs of a command),
`answers` (what else these jobs ask alike), `cards` (GPUs to plan for that are not here), `speeds` (how fast they are by
their makers' data sheets), `prices` (what they cost to rent), then `secrets` (which texts of the environment are
secret, and how none is printed), `environment` (what a child process gets to see), `raw_value` (a variable before all
are checked), `private_folders` (where compiled code is kept) and `public_addresses` (which bounds where a job may
connect to whose addresses come from a stranger).

Imports `entrypoint.settings`, and `trainer.spec` and `trainer.storage`.
"""
