"""Prompts in JSON and TOML. Their texts, like the lines of prompts.txt, are parsed by `trainer.spec.prompts`."""

from __future__ import annotations

from typing import Any

from trainer.spec.prompts import FIELDS, FLAGS, LONG_FLAGS, PromptRequest, make_request, parse_line, read_value
from trainer.spec.values import Key, Problems, show, suggestion

KEYS = {**FLAGS, **LONG_FLAGS}  # of an object
_SHAPE = "a list of prompts, each a text or an object with the key prompt"


def parse_tree(
    raw: Any, *, origin: str, problems: Problems, notes: list[str] | None = None
) -> tuple[PromptRequest, ...]:
    """A list of texts (like a line of prompts.txt) and objects.

    Also {"prompts": [...]}, and sd-scripts' {"prompt": {..., "subset": [...]}} with defaults for the subset around it.
    `notes` gets what was read otherwise than it is written.
    """
    defaults: dict[str, Any] = {}
    if isinstance(raw, dict) and raw.keys() == {"prompts"}:
        raw = raw["prompts"]
    elif isinstance(raw, dict) and raw.keys() == {"prompt"} and isinstance(raw["prompt"], dict):
        defaults = {key: value for key, value in raw["prompt"].items() if key != "subset"}
        raw = raw["prompt"].get("subset", [{}])
    if not isinstance(raw, list):
        problems.add(f"{origin}: it is not {_SHAPE}.")
        return ()
    requests = []
    for index, item in enumerate(raw):
        place = f"{origin}, prompts[{index}]"
        if isinstance(item, str):
            requests.append(parse_line(item, place=place, problems=problems, notes=notes))
        elif isinstance(item, dict):
            requests.append(_parse_object({**defaults, **item}, place=place, problems=problems))
        else:
            problems.add(f"{place}: {show(item)} is neither a text nor an object with the key prompt.")
    return tuple(request for request in requests if request)


def _parse_object(raw: dict[str, Any], *, place: str, problems: Problems) -> PromptRequest | None:
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key == "prompt" or value is None:
            continue
        field = KEYS.get(key)
        if field is None:
            problems.add(f"{place}: {show(key)} is not a key of a prompt; {suggestion(key, ['prompt', *KEYS])}")
        elif field in values:
            problems.add(f"{place}: {key} sets what another key sets already.")
        else:
            values[field] = read_value(FIELDS[field], value, f"{place}: {key}", problems)
    text = read_value(Key("text"), raw.get("prompt"), f"{place}: prompt", problems) or ""
    return make_request(text, values, place=place, problems=problems)
