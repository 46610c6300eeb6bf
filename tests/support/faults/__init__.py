"""Faults that are put into a trainer's process: KILN_FAULT says which, and `PLACE` is on its PYTHONPATH."""

from pathlib import Path

PLACE = str(Path(__file__).parent / "site")
