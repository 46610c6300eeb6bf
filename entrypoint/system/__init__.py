"""The machine: its accelerators, the environment of child processes, folders on its volumes.

Imports `entrypoint.settings`.
"""
