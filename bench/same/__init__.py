"""The proof that a refactoring changes no result: the same jobs on two trees, and every difference between them.

    python -m bench same BASE                          # BASE (a commit) against the working tree as it stands
    python -m bench same BASE --only flux-default …    # some of the jobs; --list names them
    python -m bench same BASE --strict-words           # changed sentences fail as well

Differences are of two kinds, and both are always printed. RESULTS are LoRA bytes, losses, plans, states, samples, exit
codes, lists of files and predicted memory: any of them ends the command with exit code 1. WORDS are messages, log
lines and help texts: they are listed as old and new sentences, and fail only with `--strict-words`. A line in which
nothing but a number changed is a result. `.same/last.json` has all differences.

Read in this order: `jobs` and `bad_input` (what is run), `data` (on which files), `record` (how a tree is run),
`outputs` (what is kept of an output folder), `normalise` (what may differ from run to run), `compare`, `report`,
`trees` and `command`.

A tree is driven only through its command lines (`python -m entrypoint`, `python -m trainer.export`, `python -m bench
plans` …). Nothing here imports a module of a tree, because modules move and get other names.
"""

from bench.same.command import main

__all__ = ["main"]
