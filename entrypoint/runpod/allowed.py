"""What a request to the serverless worker may say: an allow-list, variable by variable.

Whoever sends a request is a stranger to the machine that serves it. So a request has values, names of the Hub and
https addresses of public hosts, and names nothing that is on the worker: no file to read, no place to write to, no
program's setting. What is not known to be one of these is refused, so that a variable that is added later is refused
until it gets a rule here.

Documents are read here, and handed on as the text of what was checked: an address could give another one next time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from entrypoint.dataset_config.documents import is_inline, read_text
from entrypoint.dataset_config.sources import ARCHIVES, AT_REVISION, HUB_ID, classify
from entrypoint.fetch.training_adapter import ON_THE_HUB
from entrypoint.settings import clean, names
from entrypoint.settings.checks import Notes
from entrypoint.settings.variables import CONFIG_JSON, NAMES, ROWS, SECRETS
from entrypoint.system.environment import REPOSITORY
from entrypoint.system.public_addresses import problem_of
from trainer.spec.documents.forms import parse_text
from trainer.spec.rules.captioners import SHORT_NAMES
from trainer.spec.values import Problems, is_text, nearest, show

Rule = Callable[[str], str | None]  # a text → why it may not be in a request, as the rest of a sentence; None: it may

PACKAGED_IMAGES = str(REPOSITORY / "trainer/families/miniatures/concept")  # of this program, for a first try
# Kinds of variables whose text is the value itself, whatever it is.
INLINE_KINDS = (
    *("integer", "auto_integer", "auto_count", "number", "numbers", "size", "switch", "auto_switch", "choice"),
    *("pairs", "names", "name", "repo"),
)
TOKENS = ("HF_TOKEN", "HF_WRITE_TOKEN", "HUGGING_FACE_HUB_TOKEN")
MAX_BYTES = 100_000  # of one variable: Linux has a limit of 128 KiB
_TOKEN = re.compile(r"[A-Za-z0-9_.~+/-]{6,}")
_REVISION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)
_EXTENSION = re.compile(r"(\.\w[\w-]*){1,4}", re.ASCII)
OWN_PLACE = "is a place on the worker, which each request gets anew. Fix: remove it"
OWN_FILE = "names a file on the worker, and a request may name none"


# ---- the rules


def _anything(_: str) -> str | None:
    return None


def _hub_name(text: str) -> str | None:
    if HUB_ID.fullmatch(text) and "/" in text and not text.lower().endswith(".safetensors"):
        return None
    return f"{OWN_FILE}. Fix: a repository of the Hub, owner/name"


def _captioner(text: str) -> str | None:
    """A short name, or a repository, maybe with a revision."""
    if text.lower() in SHORT_NAMES:
        return None
    name, _, revision = text.partition("@")
    return _hub_name(name) or (_revision(revision) if revision else None)


def _hub_file(text: str) -> str | None:
    return None if ON_THE_HUB.fullmatch(text) else f"{OWN_FILE}. Fix: a file of the Hub, owner/name/file.safetensors"


def _hub_dataset(text: str) -> str | None:
    with_revision = AT_REVISION.fullmatch(text)
    if with_revision:
        return _revision(with_revision[3])
    if HUB_ID.fullmatch(text) and not text.lower().endswith(ARCHIVES):
        return None
    return f"{OWN_FILE}. Fix: a dataset of the Hub, owner/name"


def _images(text: str) -> str | None:
    if text == PACKAGED_IMAGES or _hub_dataset(text.removeprefix("hf://datasets/")) is None:
        return None
    if "://" in text:
        return _address(text)
    return f"{OWN_FILE}. Fix: a dataset of the Hub (owner/name), or the https address of an archive"


def _address(text: str) -> str | None:
    """An address of an archive, or of a dataset's page, which may name a revision."""
    problem = problem_of(text)
    if problem is not None:
        return problem
    try:
        revision = classify(text).revision
    except ValueError:  # the job says why
        return None
    return _revision(revision) if revision else None


def _archive(text: str) -> str | None:
    if "://" in text:
        return _address(text)
    return f"{OWN_FILE}. Fix: the https address of an archive, or the key dataset with a dataset of the Hub"


def _revision(text: str) -> str | None:
    return None if _REVISION.fullmatch(text) else "is no branch, tag or commit. Fix: the 40 digits of the commit"


def _word(text: str) -> str | None:
    return "holds a slash, which no such name has. Fix: correct it" if re.search(r"[/\\]|^\.\.", text) else None


def _token(text: str) -> str | None:
    """What would not count as a token, such as none, must not count as one here either."""
    if _TOKEN.fullmatch(text) and text.lower() not in clean.NOTHING:
        return None
    return "is no token. Fix: copy it again"


def _webhooks(text: str) -> str | None:
    """Addresses that a stranger has the job call: each may name a public host alone."""
    for address in re.split(r"[\s,;]+", text):
        problem = problem_of(address) if address else None
        if problem is not None:
            return problem
    return None


def _key(text: str) -> str | None:
    return None if re.fullmatch(r"[\x21-\x7e]+", text) else "has characters that no key has. Fix: write it again"


def _none(text: str) -> str | None:
    if text.lower() == "none":
        return None
    return f"{OWN_FILE}. Fix: MODEL_PATH with a repository of the Hub that has all parts"


def _refused(problem: str) -> Rule:
    return lambda _: problem


# What no request may say, whatever the value. Nor is a worker's own value one for every stranger's job.
REFUSED = {
    "CAPTION_WRITE": "writes beside images on the worker, where they are lost. Fix: remove it",
    "OUTPUT_PATH": OWN_PLACE,
    "CACHE_PATH": OWN_PLACE,
    "HF_HOME": OWN_PLACE,
    "PARAMS_RESUME_FROM": f"{OWN_FILE}. Fix: remove it",
    "CIVITAI_TOKEN": "is for files of weights by address, and a request names none. Fix: remove it",
    "DOWNLOAD_TOKENS": "is for addresses that ask for a login. Fix: an address that needs none",
    "HF_TOKEN_FILE": f"{OWN_FILE}. Fix: HF_TOKEN with the token itself",
    "LOG_WITH": "sends to an account, and a request has none. Fix: remove it, or WEBHOOK_URL",
    "JOBS": "makes several jobs of one request. Fix: send a request for each",
    "SWEEP": "makes several jobs of one request. Fix: send a request for each",
    "NODES": "waits for other machines, and a request runs on one. Fix: remove it",
    "NODES_TIMEOUT": "waits for other machines, and a request runs on one. Fix: remove it",
    "MONITOR_PORT": "opens a port of the worker. Fix: remove it",
    "MONITOR_TOKEN": "is for a page that a request does not have. Fix: remove it",
    "ON_FINISH": "is the operator's choice. Fix: remove it",
}
RULES: dict[str, Rule] = {
    **{row.name: _anything for row in ROWS.values() if row.kind in INLINE_KINDS},
    **dict.fromkeys(TOKENS, _token),
    "TRIGGER_WORD": _anything,
    "IMAGE_COLUMN": _anything,
    "CAPTION_COLUMN": _anything,
    "CAPTION_WITH": _captioner,
    "CAPTION_PROMPT": _anything,
    "DATASET_SPLIT": _word,
    "DATASET_SUBSET": _word,
    "DATASET_REVISION": _revision,
    "MODEL_REVISION": _revision,
    "DATASET_NAME": _images,
    "MODEL_PATH": _hub_name,
    "MODEL_CONFIG_PATH": _hub_name,
    "T5_PATH": _none,
    "PARAMS_TRAINING_ADAPTER": _hub_file,
    "UPLOAD_TO": problem_of,
    "WEBHOOK_URL": _webhooks,
    "WEBHOOK_SECRET": _key,
    **{name: _refused(problem) for name, problem in REFUSED.items()},
}
DOCUMENTS = {  # with the format of a text whose form does not tell, and what to write instead of a path
    "DATASET_CONFIG": ("json", "the object itself"),
    "SAMPLE_PROMPTS": ("txt", 'a list of prompts, ["a photo of a dog"], or several lines'),
}
# By the key of a dataset.json, at any depth.
KEY_RULES: dict[str, Rule] = {
    "image_dir": _archive,
    "dataset": _hub_dataset,
    "revision": _revision,
    "split": _word,
    "subset": _word,
    "metadata_file": _refused(f"{OWN_FILE}. Fix: remove it: metadata.jsonl and metadata.csv are found"),
    "conditioning_data_dir": _refused(f"{OWN_FILE}. Fix: alpha_mask, with the masks in the images"),
    "caption_extension": lambda text: None if _EXTENSION.fullmatch(text) else "is no extension. Fix: .txt",
}


# ---- a request


def variables_of(request: Any) -> dict[str, str]:
    """The variables of a job, from the input of a request.

    Raises SettingsError with a line for each that a request may not have, UnreachableError if the address of a
    document does not answer.
    """
    notes = Notes()
    texts = _texts(request, notes)
    notes.raise_if_any("The request cannot be served")
    allowed = {}
    found = names.variables(texts, notes)
    found.pop(CONFIG_JSON, None)  # its variables are among the others now
    for name, text in found.items():
        try:
            value = _allowed(name, text, notes)
            if value:  # none, null and the like stand for no value
                allowed[name] = value
            if len(value.encode()) > MAX_BYTES:
                raise ValueError(f"has more than {MAX_BYTES:,} bytes. Fix: put it at an https address, or shorten it")
        except ValueError as problem:
            shown = name if name in SECRETS else f"{name}={show(text)}"
            notes.add(f"{shown} {problem}.")
    if "PUSH_TO_HUB" in allowed and not allowed.keys() & set(TOKENS):
        notes.add("PUSH_TO_HUB needs a token of the request. Fix: HF_WRITE_TOKEN, with a token that may write there.")
    notes.raise_if_any("The request cannot be served")
    return allowed


def _texts(request: Any, notes: Notes) -> dict[str, str]:
    if not isinstance(request, dict):
        notes.add('The input must be an object of variables: {"BASE_MODEL": ..., "DATASET_NAME": ...}.')
        return {}
    texts = {}
    for name, value in request.items():
        if name not in NAMES:
            guess = nearest(name, NAMES)
            hint = f" Did you mean {guess}?" if guess else ""
            notes.add(f"{show(name)[1:-1]} is not a variable of Kiln, and a request has no others.{hint}")
        elif value is not None:
            texts[name] = value if isinstance(value, str) else json.dumps(value)
    return texts


def _allowed(name: str, text: str, notes: Notes) -> str:
    """The text of a variable as the job gets it. Raises ValueError with why the request may not have it."""
    if not is_text(text):
        raise ValueError("is not UTF-8 text. Fix: write it again")
    rule = RULES.get(name)
    if rule is _anything:
        return text
    meant = clean.clean(text, ROWS[name]) if name in ROWS else text
    if name in DOCUMENTS:
        return _document(name, meant, notes) if meant else ""
    if rule is None:
        raise ValueError(f"{OWN_FILE}. Fix: remove it")
    problem = rule(meant) if meant or name not in ROWS else None
    if problem is not None:
        raise ValueError(problem)
    return meant


# ---- documents


def _document(name: str, text: str, problems: Problems) -> str:
    """A document as JSON. Raises ValueError for a path, and for what names one."""
    default_format, instead = DOCUMENTS[name]
    if not is_inline(text):
        problem = problem_of(text) if "://" in text else OWN_FILE
        if problem is not None:
            raise ValueError(f"{problem}. Fix: {instead}")
    read, text_format = read_text(text, name, problems, default_format=default_format)
    if read is None:
        return ""
    tree = _lines(read)
    if text_format != "txt":
        tree = parse_text(read, text_format=text_format, origin=name, problems=problems)
        if tree is None:
            return ""
    if not isinstance(tree, dict | list):  # written as JSON, it could be taken for a path
        raise ValueError(f"is neither an object nor a list. Fix: {instead}")
    rules = KEY_RULES if name == "DATASET_CONFIG" else {}
    for place, key, value in _pairs_of(tree):
        problem = rules.get(key, _anything)(value)
        if problem is not None:
            problems.add(f"{name}: {place} {show(value)} {problem}.")
    return json.dumps(tree, default=str)


def _lines(text: str) -> Any:
    """The lines of prompts.txt, without comments."""
    lines = [line for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
    return [line for line in lines if not line.strip().startswith("#")]


def _pairs_of(tree: Any) -> Iterator[tuple[str, str, str]]:
    """Each text in a tree: where it stands, the key that it belongs to (also by way of lists), and itself."""
    waiting: list[tuple[str, str, Any]] = [("", "", tree)]
    while waiting:
        place, key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{place}.{name}".lstrip("."), str(name), inner) for name, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{place}[{number}]", key, inner) for number, inner in enumerate(value)]
        elif isinstance(value, str):
            yield place, key, value
