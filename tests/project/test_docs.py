"""The user documents say what the code says: every key, variable, exit code and shape letter is in its document."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from entrypoint.dataset_config.manifest import LEVELS, read_manifest
from entrypoint.processes import launch
from entrypoint.settings.variables import NAMES
from trainer.data import report
from trainer.spec import errors, prompts
from trainer.spec.plan import Dataset, Subset

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
USERS = (  # the documents for users
    *("tutorial", "settings", "variables", "data", "dataset-json", "prompts", "outputs", "notifications"),
    *("troubleshooting", "glossary"),
)
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")))
# Variables that no table has, and names of the code.
OTHERS = {"SOURCE_DATE_EPOCH", "HEALTH_PATIENCE_MINUTES", "HF_HUB_OFFLINE", "WEIGHT_FORMATS", "MEMORY_MODES"}
OTHERS |= {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_ENDPOINT_URL"}
OTHERS |= {"AWS_SKIP_SIGNATURE", "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SKIP_SIGNATURE", "AZURE_SKIP_SIGNATURE"}
OTHERS |= {"AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN"}
OTHERS |= {"AZURE_STORAGE_CONNECTION_STRING", "GOOGLE_SERVICE_ACCOUNT_KEY", "AWS_WEB_IDENTITY_TOKEN_FILE"}
OTHERS |= {"AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET", "AZURE_TENANT_ID", "AZURE_STORAGE_ENDPOINT"}
OTHERS |= {"HF_ENDPOINT", "KILN_REQUESTS_USE_HF_TOKEN", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"}
OTHERS |= {"WANDB_API_KEY", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_BASE_URL", "WANDB_MODE", "TRACKIO_SPACE_ID"}
OTHERS |= {"MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN", "MLFLOW_EXPERIMENT_NAME"}
LETTERS = {"general": "G", "a dataset": "D", "a subset": "S"}  # levels of dataset.json, as its document names them


def text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def rows(name: str, header: str) -> Iterator[list[str]]:
    """The cells of each row of every table in a document whose header begins with the column `header`."""
    inside = False
    for line in text(name).splitlines():
        cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not cells:
            inside = False
        elif cells[0] == header:
            inside = True
        elif inside and set(cells[0]) != {"-"}:
            yield cells


# ---- dataset-json.md

KEY_ROWS = {cells[0].strip("`"): cells for cells in rows("dataset-json.md", "key")}
KNOWN_KEYS = {name: key for keys in LEVELS.values() for name, key in keys.items()}
DEFAULTS = {  # those that no plan chooses
    field.name: field.default
    for kind in (Dataset, Subset)
    for field in fields(kind)
    if field.name in KNOWN_KEYS and field.default not in (MISSING, None)
}


def test_every_key_of_dataset_json_has_a_row_and_no_other():
    assert set(KEY_ROWS) == set(KNOWN_KEYS)


@pytest.mark.parametrize("name", sorted(KNOWN_KEYS))
def test_a_key_stands_at_the_levels_that_its_row_names(name):
    levels = [LETTERS[level] for level, keys in LEVELS.items() if name in keys]
    assert KEY_ROWS[name][1].split() == levels


@pytest.mark.parametrize("name", sorted(KNOWN_KEYS))
def test_the_range_of_a_key_is_in_its_row(name):
    key, kind = KNOWN_KEYS[name], KEY_ROWS[name][2]
    words = {"integer": "whole number", "number": "number", "boolean": "true or false", "text": "text", "size": "width"}
    assert ", ".join(key.choices) in kind if key.choices else words[key.kind] in kind
    limits = [f"{limit:.12g}" for limit in (key.low, key.high) if limit is not None]
    assert re.findall(r"[\d.]+", kind) == limits


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_the_default_of_a_key_is_in_its_row(name):
    default = DEFAULTS[name]
    written = str(default).lower() if isinstance(default, bool) else str(default)
    assert KEY_ROWS[name][3].strip("`") == written.removesuffix(".0")


def examples(form: str) -> list[str]:
    return re.findall(rf"```{form}\n(.*?)```", text("dataset-json.md"), re.DOTALL)


def test_examples_of_dataset_json_are_accepted():
    for form in ("json", "yaml", "toml"):
        assert examples(form)
        for example in examples(form):
            assert read_manifest(example, '["a"]').datasets


def test_the_forms_of_dataset_json_that_are_shown_mean_the_same():
    first = [read_manifest(examples(form)[0], '["a"]').datasets for form in ("json", "yaml", "toml")]
    assert first[0] == first[1] == first[2]


def test_every_key_of_dataset_json_is_in_an_example():
    shown = set(re.findall(r'"(\w+)":', "".join(examples("json"))))
    assert set(KNOWN_KEYS) - shown == {"caption_extension"} - shown


# ---- prompts.md


def test_every_flag_of_a_prompt_has_a_row_with_its_other_names():
    named = {}
    for cells in rows("prompts.md", "flag"):
        also = [name.strip("`- ") for name in cells[1].split(",")]
        named[cells[0].strip("`-")] = {*also}
    assert named.keys() == prompts.FLAGS.keys()
    for flag, field in prompts.FLAGS.items():
        assert named[flag] == {name for name, other in prompts.LONG_FLAGS.items() if other == field}, flag


def test_the_range_of_a_flag_is_in_its_row():
    for cells in rows("prompts.md", "flag"):
        key = prompts.FIELDS[prompts.FLAGS[cells[0].strip("`-")]]
        limits = [f"{limit:d}" for limit in (key.low, key.high) if limit is not None]
        assert re.findall(r"\d+", cells[3]) == limits


def test_the_examples_of_prompts_are_read():
    for form in ("json", "toml"):
        (example,) = re.findall(rf"```{form}\n(.*?)```", text("prompts.md"), re.DOTALL)
        assert len(read_manifest(None, example).prompts) == 2


# ---- outputs.md


def test_every_column_of_the_report_is_explained():
    named = [name for cells in rows("outputs.md", "column") for name in re.findall(r"`([^`]+)`", cells[0])]
    assert tuple(named) == report.COLUMNS


def test_every_phase_of_a_job_is_named():
    phases = set(re.findall(r'(?:\.phase\(|"phase": )"([a-z ]+)"', SOURCES)) | {"stopped", "failed"}
    (row,) = (cells[1] for cells in rows("outputs.md", "key") if cells[0] == "`phase`")
    assert set(re.findall(r"`([^`]+)`", row)) == phases


# ---- all of them


def anchors(document: str) -> set[str]:
    """What links may name after #, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.+)$", document, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", USERS)
def test_every_variable_that_a_document_names_exists(name):
    named = set(re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b", text(f"{name}.md")))
    assert named - {*NAMES} - OTHERS == set()


@pytest.mark.parametrize("page", PAGES, ids=[path.stem for path in PAGES])
def test_every_link_inside_the_repository_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


# ---- troubleshooting.md


def exit_codes() -> set[int]:
    """All that a job may end with: of the errors, of the command line, and of the signals that are passed on."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.KilnError)]
    stopped = {128 + signal for signal in launch.FORWARDED}
    return {0, 64} | {kind.exit_code for kind in kinds} | stopped


def test_every_exit_code_is_explained():
    named = {int(number) for number in re.findall(r"\b\d{1,3}\b", " ".join(rest("troubleshooting.md")))}
    assert exit_codes() <= named


def rest(name: str) -> list[str]:
    """The headings of a document, and the lines that begin with a number."""
    return [line for line in text(name).splitlines() if re.match(r"#+ |\d", line)]


SOURCES = "".join(
    path.read_text(encoding="utf-8")
    for folder in ("entrypoint", "trainer")
    for path in sorted((ROOT / folder).rglob("*.py"))
)
CODE = re.sub(r'"\s*\n\s*f?"', "", SOURCES)  # as one reads a text that is written in several pieces
OF_OTHERS = ("No space left on device", "Input/output error", "/datasets/")


def test_every_message_that_is_quoted_is_one_of_the_code():
    cells = [cells[0] for header in ("message", "what you see") for cells in rows("troubleshooting.md", header)]
    quoted = {quote for cell in cells for quote in re.findall(r'"([^"]+)"', cell)} - {*OF_OTHERS, "Room on the volume"}
    assert len(quoted) > 80
    assert [quote for quote in sorted(quoted) if quote not in CODE] == []


# ---- glossary.md

SHAPED = re.compile(r"[a-z][a-z0-9_]*_([A-Z0-9]*[A-Z][A-Z0-9]*)")
OF_PEFT = {"lora_A", "lora_B"}  # names of its matrices


def identifiers(path: Path) -> Iterator[str]:
    """Every name that a module gives to a value."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Attribute):
            yield node.attr


def test_every_shape_letter_of_the_trainer_is_in_the_legend():
    names = {name for path in (ROOT / "trainer").rglob("*.py") for name in identifiers(path)} - OF_PEFT
    letters = {letter for name in names if (found := SHAPED.fullmatch(name)) for letter in re.sub(r"\d", "", found[1])}
    legend = [cells[0] for cells in rows("glossary.md", "letter")]
    assert len(letters) > 8
    assert letters <= set(legend)
    assert len(legend) == len(set(legend))


def test_a_term_of_the_glossary_stands_once_and_is_explained():
    found = [(cells[0], cells[1]) for cells in rows("glossary.md", "term")]
    assert len({term for term, _ in found}) == len(found) > 80
    assert all(len(meaning.split()) >= 3 for _, meaning in found)


PRODUCT = ("trainer", "entrypoint")
# Public classes that are no terms: one module uses them, as a record of what its functions pass on, and explains them.
NO_TERMS = {
    **dict.fromkeys(
        ("Keys", "Version", "Place", "HubPlace", "Requests", "Target"), "parts of an address or a request to a service"
    ),
    **dict.fromkeys(("AdaptedModels", "Backward", "Session"), "parts of a run, passed between two modules"),
    **dict.fromkeys(("PreparedData", "Folder", "AdapterShape"), "the result of one function"),
    **dict.fromkeys(("AskedColumns", "Columns", "Decoded", "ImageNames", "Inspected"), "the result of one function"),
    **dict.fromkeys(
        ("Metrics", "Status", "Progress", "Problems", "Findings", "CheckReport", "Summary"),
        "an output or a list that its name describes",
    ),
    **dict.fromkeys(
        ("DatasetSummary", "SubsetSummary", "TrainingRun", "LoraSummary", "Training"),
        "contents of a LoRA file's header",
    ),
    **dict.fromkeys(("Float", "Kind", "LayerTensors", "Parser"), "rows and records of the readers of LoRA files"),
    **dict.fromkeys(("Pair", "Stored"), "the matrices of a LoRA file on their way to it"),
    **dict.fromkeys(("Prompt", "PromptRequest"), "a prompt line, which the documents call a prompt"),
    **dict.fromkeys(("Length", "Request"), "what a row of a table of sanity checks looks at"),
    **dict.fromkeys(("Reader", "Cut", "PredictionMarks"), "what one function finds in a caption or a file"),
    **dict.fromkeys(("Made", "Answers", "Outlook"), "captions that a model has made, and how many are missing"),
    **dict.fromkeys(("Way", "TextTokens", "Named"), "how a captioning model is named, loaded and asked"),
    "Loader": "YAML without types that surprise",
    **dict.fromkeys(("AskedColumns", "Compared", "NamedBase"), "what one function hands to the next"),
    **dict.fromkeys(("LightTokenizer", "Encoded"), "a tokenizer without its library, and what it returns"),
    **dict.fromkeys(("ConfigKind", "Rule", "TokenTable", "TokenizerFiles"), "what the files of a model may say"),
    "LineFormatter": "how a log line is written",
    **dict.fromkeys(("Chart", "Line", "Gathered", "Sample"), "what a report shows"),
    **dict.fromkeys(("Queue", "Waiting", "Watch", "Teller", "Pace"), "parts of the process that tells of events"),
    **dict.fromkeys(("Feed", "About"), "what a tracker is given"),
    **dict.fromkeys(
        ("Numbers", "LogTail", "SampleList", "SampleHead", "SmallImages", "TrainedImages"),
        "what the monitor page reads",
    ),
    **dict.fromkeys(("Server", "Keeper"), "the process of the monitor page, and what starts it again"),
    **dict.fromkeys(
        ("Connection", "OwnConnection"), "a connection to the monitor page, which uvicorn asks for as a class"
    ),
    **dict.fromkeys(("Known", "HidingStream"), "how known secrets are kept out of what is printed"),
    **dict.fromkeys(("PartlyJoinedProcessor", "PartlyJoinedFlux2Processor"), "one case of a class of diffusers"),
    **dict.fromkeys(("Card", "TorchKernels"), "what a card, and this torch, can do"),
    **dict.fromkeys(("Machine", "Answers"), "what the jobs of a command ask once"),
    **dict.fromkeys(("Budget", "Limits", "Names"), "bounds on archives"),
    **dict.fromkeys(("Cached", "Listing", "RemoteFile", "Repo"), "records of the Hub's client"),
    **dict.fromkeys(("Asked", "Found", "Layout", "Place"), "how a dataset was named, and what was found of it"),
    **dict.fromkeys(("Download", "Hash", "SshHost"), "records of downloads"),
    **dict.fromkeys(("Job", "Uploader", "Times", "Identity"), "parts of one process"),
    **dict.fromkeys(("Background", "Scene", "Subject", "Thing", "Vessel"), "contents of the miniatures' drawings"),
    **dict.fromkeys(
        ("Attempt", "MaskedAttention", "OneFrame", "Recipe", "Taught", "Task", "Work"),
        "parts of the making of the miniatures",
    ),
}


def modules(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def defined_names(path: Path) -> Iterator[str]:
    """The names of a module, of its functions and classes, and of every value and attribute in it."""
    yield path.stem
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
    yield from identifiers(path)


def imported_names(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom | ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name


def public_classes() -> set[str]:
    names = set()
    for path in modules(*PRODUCT):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not node.name.endswith("Error"):
                names.add(node.name)
    return names


def names_in_the_glossary() -> set[str]:
    cells = [row[2] for row in rows("glossary.md", "term")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_every_name_in_the_glossary_exists_in_the_code():
    defined = {name for path in modules(*PRODUCT, "bench") for name in defined_names(path)}
    assert len(names_in_the_glossary()) > 150
    assert names_in_the_glossary() - defined == set()


def test_every_public_class_is_in_the_glossary_or_needs_no_entry():
    assert public_classes() - names_in_the_glossary() - set(NO_TERMS) == set()


def test_a_class_without_an_entry_exists_and_has_none():
    assert set(NO_TERMS) - public_classes() == set()
    assert set(NO_TERMS) & names_in_the_glossary() == set()


# ---- paths and names of the code, in all documents and docstrings

PATHS = re.compile(r"(?<![\w/.-])((?:trainer|entrypoint|bench|docs|tests)/[\w/]*\w\.(?:py|md|sh|png|json|txt|lock))\b")
DOTTED = re.compile(r"(?<![\w/.-])((?:trainer|entrypoint|bench)(?:\.\w+)+)\b(?![/\w])")
TEST_FILES = re.compile(r"(?<![\w/.-])test_\w+\.py\b")  # a test that is named without its folder
FILE_ENDINGS = ("py", "md", "sh", "json", "lock", "egg")


def prose(path: Path) -> str:
    """The docstrings and comments of a module."""
    source = path.read_text(encoding="utf-8")
    pieces = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            pieces.append(ast.get_docstring(node) or "")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            pieces.append(token.string)
    return "\n".join(pieces)


def texts() -> dict[str, str]:
    """The documents, and the docstrings and comments of each module, by path."""
    written = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
    for path in modules("trainer", "entrypoint", "bench", "runpod"):
        written[str(path.relative_to(ROOT))] = prose(path)
    return written


TEXTS = texts()


@pytest.mark.parametrize("name", TEXTS)
def test_every_path_of_the_product_that_a_text_names_exists(name):
    named = PATHS.findall(TEXTS[name]) + [f"tests/**/{file}" for file in TEST_FILES.findall(TEXTS[name])]
    missing = [path for path in named if "NAME" not in path and not list(ROOT.glob(path))]
    assert missing == []


def names_a_module_or_what_it_defines(dotted: str) -> bool:
    """Whether a.b.c is a package, a module, or a name in module a.b. A package has the names that it imports."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:length])
        rest = parts[length:]
        if place.is_dir() and not rest:
            return True
        module = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if module.is_file():
            return set(rest) <= {*defined_names(module), *imported_names(module)}
    return False


@pytest.mark.parametrize("name", TEXTS)
def test_every_dotted_name_of_the_product_exists(name):
    wrong = []
    for dotted in DOTTED.findall(TEXTS[name]):
        if dotted.rpartition(".")[2] not in FILE_ENDINGS and not names_a_module_or_what_it_defines(dotted):
            wrong.append(dotted)
    assert wrong == []
