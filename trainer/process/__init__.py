"""The program as the system sees it: how it is stopped, what it prints to, where its temporary files go.

Read `guard` first: the parent process that ends a program when that is asked for, whatever the program is doing. It
learns from `vitals`, a file that it shares with the program, how long a stop may take. `streams` keeps a job alive
whose output cannot be written, `scratch` finds a place for temporary files, and `memory_kills` tells whether the kernel
ended a process because memory ran out. `pool` spreads work over processes that leave nothing behind.

Standard library only, and as little of it as possible at import time: a stop must be a stop while the rest is still
loading. Imports nothing else of the trainer; everybody may import it, the entrypoint included.
"""
