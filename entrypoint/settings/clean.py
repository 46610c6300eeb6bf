"""The text of one variable, as web forms, shells and env files leave it → the text that its author meant.

What can be understood without doubt is mended (quotes around the whole value, a comma at its end); the log then shows
the value that is used. For what cannot, a sentence says what it looks like and what to write instead. Free text, such
as a trigger word, is changed least: only what no one writes on purpose.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from entrypoint.settings.row import SECRET_KINDS, Row
from entrypoint.settings.variables import NAMES
from trainer.spec.values import as_number, shorten

MAX_CHARACTERS = 4096  # the longest path that Linux takes; longer values are texts that got into the wrong variable
# Free text and files that may be given inline, which have no such limit.
DOCUMENTS = ("DATASET_CONFIG", "SAMPLE_PROMPTS")
# Variables of kind "text" that name a file, a folder, a repository or an address.
LOCATIONS = (
    "MODEL_PATH",
    "MODEL_CONFIG_PATH",
    "VAE_PATH",
    "CLIP_L_PATH",
    "CLIP_G_PATH",
    "T5_PATH",
    "TEXT_ENCODER_PATH",
    "DATASET_NAME",
    "CAPTION_WITH",
    "DATASET_CONFIG",
    "SAMPLE_PROMPTS",
    "PARAMS_RESUME_FROM",
    "UPLOAD_TO",
    "PARAMS_TRAINING_ADAPTER",
)
NUMBERS = ("integer", "auto_integer", "auto_count", "number", "numbers", "size")
NOTHING = ("none", "null", "nil", "undefined", "n/a")  # what forms and programs write for no value
QUOTES = {'"': '"', "'": "'", "`": "`", "“": "”", "‘": "’", "„": "“", "«": "»"}
INVISIBLE = "\ufeff\u200b\u200c\u200d\u2060"  # a byte order mark, and blanks of no width, which copying brings along
DASHES = dict.fromkeys(map(ord, "‐‑‒–—−－"), "-")
_TEMPLATE = re.compile(r"\{\{\s*([\w.]+)\s*\}\}")
_UNEXPANDED = re.compile(r"\$\{?([A-Za-z_][A-Za-z0-9_]*)\}?|%([A-Za-z_][A-Za-z0-9_]*)%")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\[^\\]|\.{1,2}\\|[^\\/]+\\[^\\]")
_ASSIGNMENT = re.compile(r"^\s*(?:export\s+|-e\s+)?([A-Z][A-Z0-9_]*)\s*=", re.MULTILINE)
_PLACEHOLDER = re.compile(
    r"(?i)(hf_)?(x+|\.+|…|\*+|_+|<.*>|\[.*\]|change_?me|(your|my)[\w-]*|(hf_)?(token|key)([_-]?here)?|\w*_here|)"
)
_COMMENT = re.compile(r"\s+#(\s.*)?$")
NOT_EXPANDED = "env files and web forms do not expand variables. Fix: write its value"
FULL = "Fix: write the whole path, beginning with /"
RUNPOD_SECRET = "RUNPOD_SECRET_"  # noqa: S105 (the beginning of a name)


def clean(text: str, row: Row) -> str:
    """The text that was meant; empty: the variable counts as not set.

    Raises ValueError with the rest of a sentence that begins with the variable and its value.
    """
    text = text.strip().strip(INVISIBLE).strip()
    text = _without_own_name(text, row)
    for _ in range(3):
        text = without_quotes(text)
    _refuse_other_things(text, row)
    if row.kind in SECRET_KINDS:
        return _secret(text)
    if row.name in DOCUMENTS and text[:1] in ("{", "["):
        return text
    _refuse_unexpanded(text, row)
    if _means_nothing(text, row):
        return ""
    if row.kind == "path" or row.name in LOCATIONS:
        return _path(text, row)
    if row.kind == "name":
        return _file_name(text)
    if row.kind in NUMBERS:
        return _number(text, row)
    if row.kind in ("choice", "switch", "auto_switch", "repo", "names"):
        text = _COMMENT.sub("", text).rstrip(",;").rstrip()
        return _items(text) if row.kind == "names" else text
    return text


# ---- any kind


def _without_own_name(text: str, row: Row) -> str:
    """`NAME=value` as the value of NAME is a line of an env file; a whole file is refused."""
    if row.kind == "sweep":  # names of others are what it is made of
        return text
    named = _ASSIGNMENT.findall(text[:MAX_CHARACTERS])
    others = [name for name in named if name in NAMES and name != row.name]
    if others:
        names = shorten(", ".join(others))
        raise ValueError(
            f"holds lines of other variables ({names}). Fix: set each variable by itself; docker run --env-file FILE "
            "reads such a file"
        )
    if named and named[0] == row.name and "\n" not in text:
        return text.partition("=")[2].strip()
    return text


def is_env_file(text: str) -> bool:
    """Whether the text begins with a NAME=value line."""
    return _ASSIGNMENT.match(text) is not None


def without_quotes(text: str) -> str:
    """`text` without quotes around all of it. Quotes inside are part of the value."""
    closing = QUOTES.get(text[:1])
    inner = text[1:-1]
    if closing is None or len(text) < 2 or text[-1] != closing or text[0] in inner or closing in inner:
        return text
    return inner.strip()


def _refuse_other_things(text: str, row: Row) -> None:
    """Refuse placeholders of templates, and texts of absurd length."""
    if found := _TEMPLATE.search(text[:MAX_CHARACTERS]):
        name = found[1]
        if name.startswith(RUNPOD_SECRET):
            secret = name.removeprefix(RUNPOD_SECRET)
            raise ValueError(
                f"holds {found[0]} as it stands, because RunPod gave this container no secret of that name. "
                f"Fix: create the secret {secret} at RunPod (Settings, Secrets) and deploy again, or set the value "
                "itself"
            )
        raise ValueError(f"holds the placeholder {found[0]}, which nothing has replaced. Fix: set the value itself")
    if len(text) > MAX_CHARACTERS and row.name not in DOCUMENTS:
        raise ValueError(f"is {len(text):,} characters long, and {MAX_CHARACTERS:,} are allowed. Fix: shorten it")


def _refuse_unexpanded(text: str, row: Row) -> None:
    """Refuse $NAME where no variable of a shell was put in. A trigger word may begin with $."""
    if row.kind in ("text", "pairs") and row.name not in LOCATIONS:
        found = re.fullmatch(r"\$\{(\w+)\}()", text)
    else:
        found = _UNEXPANDED.search(text)
    if found:
        raise ValueError(f"holds {found[0]} as it stands: {NOT_EXPANDED}")


def _means_nothing(text: str, row: Row) -> bool:
    """Whether the text stands for no value: none, null; or auto where the plan chooses anyway if nothing is set."""
    lower = text.lower()
    if lower == "auto":
        return not row.default and row.kind in (*NUMBERS, "choice", "name") and row.kind != "auto_integer"
    if lower not in NOTHING:
        return False
    allowed = [choice.lower() for choice in (row.choices() if row.choices else ())]
    if lower in allowed or (row.name == "T5_PATH" and lower == "none"):
        return False
    if row.kind in NUMBERS and row.low == 0 and row.default != "0":
        default = f" for the default ({row.default or row.if_unset})"
        raise ValueError(f"may mean 0 or the default. Fix: 0, or leave it empty{default}")
    return True


# ---- by kind


def _secret(text: str) -> str:
    """A token without the word that goes before it in a header."""
    if text.lower() in NOTHING:
        return ""
    if re.fullmatch(r"\$\{?[A-Za-z_]\w*\}?", text):  # which is not shown: it might be a secret all the same
        raise ValueError(f"holds the name of a variable, and not its value: {NOT_EXPANDED}")
    return re.sub(r"(?i)^(authorization:\s*)?(bearer|token)\s+", "", text)


def token_problem(token: str) -> str | None:
    """Why `token` cannot be one of huggingface.co, as the rest of a sentence; None if it may be one."""
    page = "huggingface.co/settings/tokens"
    if _PLACEHOLDER.fullmatch(token):
        return f"is a placeholder. Fix: copy a token from {page}, or leave it empty"
    if not token.startswith(("hf_", "api_org_")):
        return f"does not begin with hf_, as the Hub's tokens do. Fix: copy a token from {page}, or leave it empty"
    return None


def _path(text: str, row: Row) -> str:
    """A path from the root where it begins with ~; one of Windows is refused with its counterpart here."""
    if "://" in text:
        return text
    if text.startswith("~"):
        try:
            return str(Path(text).expanduser())
        except RuntimeError:
            raise ValueError(f"begins with {text.partition('/')[0]}, but there is no such user here. {FULL}") from None
    if re.search(r"\\[ ()&'\[\]]", text):
        unescaped = re.sub(r"\\(.)", r"\1", text)
        raise ValueError(f"has the backslashes of a shell. Fix: write it without them: {shorten(unescaped)}")
    if not _WINDOWS.match(text):
        return text
    host, inside = text.rstrip("\\/"), "/data"
    if not re.match(r"[A-Za-z]:|\\\\", text):
        raise ValueError(f"is a Windows path. Fix: write it with slashes: {text.replace(chr(92), '/')}")
    drive = re.match(r"([A-Za-z]):[\\/]*(.*)", host)
    on_wsl = ""
    if drive:
        on_wsl = f"; in WSL without docker it is /mnt/{drive[1].lower()}/{drive[2].replace(chr(92), '/')}"
    raise ValueError(
        f"is a Windows path, which a Linux container does not have. Fix: docker run -v {shorten(host)}:"
        f"{inside} and {row.name}={inside}{shorten(on_wsl)}"
    )


def _file_name(text: str) -> str:
    text = re.sub(r"(?i)\.safetensors$", "", text)
    if "/" in text or "\\" in text:
        folder, _, name = text.replace("\\", "/").rpartition("/")
        raise ValueError(f"is a path. Fix: OUTPUT_PATH={folder or '/'} and OUTPUT_NAME={name or 'a name'}")
    return text


def _number(text: str, row: Row) -> str:
    """A number without what copying adds: a comment, a comma at the end, other dashes than ASCII's."""
    text = _COMMENT.sub("", text).rstrip(",;").rstrip().translate(DASHES)
    narrow = unicodedata.normalize("NFKC", text)
    if narrow != text and re.search(r"[０-９．]", text):
        raise ValueError(f"has full-width digits. Fix: {row.name}={narrow}")
    if row.kind == "size":
        if text[:1] + text[-1:] in ("[]", "()"):
            text = text[1:-1].strip()
        return re.sub(r"\s*[,*x×]\s*|\s+", "x", text.lower())
    if row.kind == "numbers":
        return _items(text)
    return _single_number(text, row)


def _single_number(text: str, row: Row) -> str:
    if text.endswith("%") and (share := as_number(text[:-1].strip())) is not None:
        if row.kind == "number" and row.high is not None and row.high <= 1:
            return f"{share / 100:.12g}"
        raise ValueError(f"is a percentage. Fix: {row.name}=, and a number")
    if re.fullmatch(r"[+-]?\d{1,3}([,_ ' ]\d{3})+", text):
        raise ValueError(f"has separators between its digits. Fix: {row.name}={re.sub('[^0-9+-]', '', text)}")
    if re.fullmatch(r"[+-]?\d+,\d+([eE][+-]?\d+)?", text):
        raise ValueError(f"has a comma. Fix: {row.name}={text.replace(',', '.')}")
    whole = as_number(text)
    if (
        row.kind in ("integer", "auto_integer", "auto_count")
        and whole is not None
        and not re.fullmatch(r"[+-]?\d+", text)
    ):
        fix = f"{row.name}={whole:.0f}" if whole == int(whole) and abs(whole) < 1e9 else "a number without a point"
        raise ValueError(f"is not written as a whole number. Fix: {fix}")
    return text


def _items(text: str) -> str:
    """The items of a list in brackets and quotes, with commas between: [1, 2] → 1,2."""
    if text[:1] + text[-1:] in ("[]", "()"):
        text = text[1:-1]
    items = [item.strip().strip("\"'").strip() for item in re.split(r"[,\s]+", text)]
    return ",".join(item for item in items if item)
