"""Every environment variable: a module and a frozen dataclass for each group of the table in docs/variables.md.

In the order of the table: `model`, `data`, `training`, `adapter`, `engine`, `output`, `finish`, `many`.

Reading (`settings.read`), `--help-env` and the table in docs/variables.md all come from the rows here. A field has
the name of its variable, in small letters and without PARAMS_. A row's default is text, as a user would write it; an
empty default means "not set" (None), and `if_unset` says what the plan then chooses.

How to add a variable:
1. Add a field with its row to the section that it belongs to. The order of the fields is the order in the table.
2. Its kind is a key of `settings.read.PARSERS`. A new kind needs a parser there, and words in `allowed_values`.
3. Use it in `entrypoint.planning`, which hands its value on in a field of `trainer.spec.plan.Plan`. Below planning,
   functions take the value or the section, never all of `Settings`.
4. Add its name to FROZEN in tests/entrypoint/settings/test_settings.py, run `make readme`, and name it in
docs/settings.md.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass

from entrypoint.settings.row import SECRET_KINDS, Row
from entrypoint.settings.variables.adapter import AdapterSettings
from entrypoint.settings.variables.data import DataSettings
from entrypoint.settings.variables.engine import EngineSettings
from entrypoint.settings.variables.finish import FinishSettings
from entrypoint.settings.variables.many import ManySettings
from entrypoint.settings.variables.model import ModelSettings
from entrypoint.settings.variables.output import OutputSettings
from entrypoint.settings.variables.training import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The values of all variables, in the sections of the table in docs/variables.md."""

    model: ModelSettings
    data: DataSettings
    training: TrainingSettings
    adapter: AdapterSettings
    engine: EngineSettings
    output: OutputSettings
    finish: FinishSettings
    many: ManySettings
    given: frozenset[str] = frozenset()  # the variables that the user has set
    reasons: tuple[str, ...] = ()  # what was read otherwise than it is written, for the log
    warnings: tuple[str, ...] = ()  # what is set, but not read


def _sections() -> dict[str, type[typing.Any]]:
    hints = typing.get_type_hints(Settings)
    return {name: kind for name, kind in hints.items() if isinstance(kind, type) and dataclasses.is_dataclass(kind)}


SECTIONS = _sections()  # a field of Settings → its dataclass


def section_rows(section: str) -> dict[str, Row]:
    """The rows of one section, by the names of its fields."""
    return {field.name: field.metadata["row"] for field in dataclasses.fields(SECTIONS[section])}


def _all_rows() -> dict[str, Row]:
    rows = {}
    for section in SECTIONS:
        for row in section_rows(section).values():
            rows[row.name] = row
    return rows


ROWS = _all_rows()  # by the name of the variable, in the order of the table
CONFIG_JSON = "CONFIG_JSON"  # one JSON object with any of the others
ALIASES = ("HF_TOKEN_FILE", "HUGGING_FACE_HUB_TOKEN")  # other ways to give HF_TOKEN
SECRETS = (*ALIASES, *(row.name for row in ROWS.values() if row.kind in SECRET_KINDS))
NAMES: tuple[str, ...] = (*ROWS, *ALIASES, CONFIG_JSON)
