"""Environment variables become `Settings`: names, defaults and ranges, read and checked together.

Read `variables` (the table that the README prints), `row` (one entry of it), `read` and `checks`.

Imports `trainer.spec` only.
"""

from entrypoint.settings.read import help_env, read_settings
from entrypoint.settings.variables import Settings

__all__ = ("Settings", "help_env", "read_settings")
