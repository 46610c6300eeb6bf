"""The JSON schema of the variables, against a validator that is not ours, and against what the settings read."""

from __future__ import annotations

import json

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrypoint.settings import json_schema, read_settings
from entrypoint.settings.variables import ROWS, SECTIONS, section_rows
from trainer.spec.errors import SettingsError

SCHEMA = json_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
NEEDED = {"BASE_MODEL": "mini-flux", "DATASET_NAME": "/photos"}


def read(values):
    return read_settings({"CONFIG_JSON": json.dumps({**NEEDED, **values})})


def test_it_is_a_schema_of_all_variables_with_defaults_that_it_allows():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert list(SCHEMA["properties"]) == list(ROWS)
    for name, entry in SCHEMA["properties"].items():
        assert entry["description"] and entry["x-section"], name
        if "default" in entry:
            VALIDATOR.evolve(schema=entry).validate(entry["default"])


@pytest.mark.parametrize(
    ("values", "fits"),
    [
        ({}, True),
        ({"PARAMS_NETWORK_DIM": 16, "PARAMS_LEARNING_RATE": 1e-4, "STRICT_DATASET": True}, True),
        ({"PARAMS_BATCH_SIZE": "auto", "PARAMS_RESOLUTION": "1024x768"}, True),
        ({"DATASET_CONFIG": {"datasets": [{"subsets": [{"image_dir": "/photos"}]}]}}, True),
        ({"PARAMS_NETWORK_DIM": 0}, False),
        ({"PARAMS_NETWORK_DIM": 1.5}, False),
        ({"PARAMS_LEARNING_RATE": -1}, False),
        ({"BASE_MODEL": "flux-2"}, False),
        ({"PARAMS_NETWORK_DIMS": 16}, False),
        ({"BACKEND": "abacus"}, False),
    ],
)
def test_what_it_allows_is_read_and_what_it_refuses_is_refused(values, fits):
    assert VALIDATOR.is_valid({**NEEDED, **values}) == fits
    if fits:
        read(values)
    else:
        with pytest.raises(SettingsError):
            read(values)


def test_a_job_needs_a_model_and_images():
    for name in NEEDED:
        assert not VALIDATOR.is_valid({key: value for key, value in NEEDED.items() if key != name})
    assert VALIDATOR.is_valid({"BASE_MODEL": "mini-flux", "DATASET_CONFIG": "/dataset.json"})


@given(st.data())
def test_any_number_that_it_allows_is_read_as_that_number(data):
    numeric = [name for name, row in ROWS.items() if row.kind in ("integer", "number")]
    name = data.draw(st.sampled_from(numeric))
    entry = SCHEMA["properties"][name]
    low = entry.get("minimum", entry.get("exclusiveMinimum", -(10**6)))
    high = entry.get("maximum", 10**6)
    if entry["type"] == "integer":
        value = data.draw(st.integers(low, high))
    else:
        value = data.draw(st.floats(low, high, exclude_min="exclusiveMinimum" in entry, allow_subnormal=False))
    settings = read({name: value})
    assert name in settings.given
    fields = {}
    for section in SECTIONS:
        for field, row in section_rows(section).items():
            fields[row.name] = getattr(getattr(settings, section), field)
    assert fields[name] == value
