"""Environment variables become `Settings`: names, defaults and ranges, read and checked together.

Read `variables` (a module for each group of the table in docs/variables.md; how to add a variable), `row` (what an
entry of the table holds), `read` (the three steps from text to values, and every problem in one message), then a
module for each step: `names` (whose name is it; `aliases` are those of other trainers), `clean` (what was meant by a
text that a form or a shell has changed), `parsers` (which value that is). `schema` says the same for programs.
`given` says in one line what was set.
`checks` has strict parsing and words for messages, which dataset.json and the plan use too.

Nothing else in the program reads PARAMS_* from the environment.

Imports `trainer.spec`, for the names of models, optimisers and formats.
"""

from entrypoint.settings.read import help_env, read_settings
from entrypoint.settings.schema import json_schema
from entrypoint.settings.variables import Settings

__all__ = ("Settings", "help_env", "json_schema", "read_settings")
