"""On PYTHONPATH of a program under test: every volume has 2 TB free, whatever this machine's disk has."""

import shutil
from types import SimpleNamespace

TB = 10**12
shutil.disk_usage = lambda path: SimpleNamespace(total=4 * TB, used=2 * TB, free=2 * TB)
