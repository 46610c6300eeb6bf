"""What the configs of a model may say. The rules themselves are in `trainer/families/published/`, by class.

A config decides which classes are made and how large they are. So no class is made from a value that its rules do not
allow: a negative number of layers, a size of 10¹², a name where a number belongs. Keys without a rule have no effect.
Whether the sizes are those of the weights is found later (`trainer.base_model.loading`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.spec.values import span


@dataclass(frozen=True)
class Rule:
    """Which values a key may have. `text` completes "allowed is"."""

    text: str
    fits: Callable[[Any], bool]


Rules = Mapping[str, Rule]

# ---- rules


def whole(low: int, high: int) -> Rule:
    return Rule(f"a whole number, {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float) -> Rule:
    def fits(value: Any) -> bool:
        return type(value) in (int, float) and low <= value <= high

    return Rule(f"a number, {span(low, high)}", fits)


def only(*values: Any) -> Rule:
    """One of `values`, in its own type: 1 is not true."""
    known = [(type(value), value) for value in values]
    words = {None: "null", True: "true", False: "false"}
    text = " or ".join(words[v] if v is None or type(v) is bool else repr(v) for v in values)
    return Rule(text, lambda value: (type(value), value) in known)


def each(rule: Rule, least: int, most: int) -> Rule:
    """A list."""
    count = f"{least}" if least == most else f"{least} to {most}"

    def fits(value: Any) -> bool:
        return isinstance(value, list) and least <= len(value) <= most and all(rule.fits(item) for item in value)

    return Rule(f"a list of {count} values, each {rule.text}", fits)


def either(*rules: Rule) -> Rule:
    return Rule(", or ".join(rule.text for rule in rules), lambda value: any(rule.fits(value) for rule in rules))


def optional(rule: Rule) -> Rule:
    return either(only(None), rule)


def text(longest: int) -> Rule:
    return Rule(
        f"a text of at most {longest} characters", lambda value: isinstance(value, str) and len(value) <= longest
    )


FLAG = only(True, False)
FALSE = only(False)
NOTHING = only(None)
SHARE = number(0, 1)
EPSILON = number(1e-12, 0.1)
WIDTH = whole(1, 65536)
LAYERS = whole(1, 200)
HEADS = whole(1, 512)
ACTIVATION = only("silu", "swish", "mish", "gelu", "relu")
GROUPS = whole(1, 1024)

# What every config may have besides.
_VERSION = re.compile(r"\d{1,4}(\.\d{1,4}){0,3}(\.?(dev|rc|post)\d{0,4})?", re.ASCII)
VERSION = Rule(
    "a version such as 0.30.0", lambda value: isinstance(value, str) and _VERSION.fullmatch(value) is not None
)
COMMON: Rules = {
    "_diffusers_version": VERSION,
    "_use_default_values": each(text(100), 0, 200),
}
# Keys that name code in the repository. Kiln never runs it, so that a model which needs it cannot be used.
CODE_KEYS = ("auto_map", "custom_pipeline", "custom_pipelines", "custom_generate", "trust_remote_code")
# Keys that name another way to store weights.
QUANTISED_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class ConfigKind:
    """What the config of one part of a model may say, and of which class the part is.

    `names`: of the classes that a family loads it as, by the names that configs give. `required`: keys without which it
    is another model. `model_type`: of transformers' configs; None: diffusers', which name their class.
    """

    library: str  # diffusers | transformers
    names: tuple[str, ...]
    rules: Rules
    required: tuple[str, ...] = ()
    model_type: str | None = None
    saved_as: tuple[str, ...] = ()  # further names in `architectures`: of larger models, which contain it
    differing: Callable[[Mapping[str, Any]], str | None] = lambda _: None  # two values that do not go together
    # `model_type` of the larger model that has this one as its `text_config`; None if there is none.
    whole_type: str | None = None
