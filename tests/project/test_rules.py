"""The rules that keep the house easy to live in, as far as they can be read off the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.spec.family import base_models, family_names

ROOT = Path(__file__).parents[2]
FILES = sorted(path for folder in ("entrypoint", "trainer") for path in (ROOT / folder).rglob("*.py"))
VENDORS = r"nvidia|amd|rocm|geforce|radeon|hopper|ampere|mi[23]\d\dx?|gfx\d\w+|[ah]100|h200"
WITH_VENDORS = {
    "entrypoint/engines/gpu_names.py",
    "entrypoint/settings/variables/engine.py",
    "entrypoint/system/cards.py",
    "entrypoint/system/hardware.py",
    "entrypoint/system/prices.py",
    "entrypoint/system/speeds.py",
    "trainer/engine/quantization/formats.py",
    "trainer/spec/weight_formats.py",
}
# They make the miniatures, from nothing that others published.
MAKERS = ("trainer/families/miniatures/make.py", "trainer/families/miniatures/tokens.py")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


every_file = pytest.mark.parametrize("path", FILES, ids=name)


def walk(path: Path) -> Iterator[ast.AST]:
    yield from ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def imports(path: Path) -> set[str]:
    """The modules that are imported anywhere in a file."""
    found = set()
    for node in walk(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def found_in(path: Path, pattern: str) -> list[str]:
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    return [f"{name(path)}:{i}: {line.strip()}" for i, line in lines if re.search(pattern, line, re.IGNORECASE)]


def lines_of_code(path: Path) -> set[int]:
    """The numbers of the lines that hold code: comments, docstrings and blank lines do not count."""
    text = path.read_text(encoding="utf-8")
    lines = enumerate(text.splitlines(), start=1)
    code = {number for number, line in lines if line.strip() and not line.strip().startswith("#")}
    for node in walk(path):
        holds_docstring = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if holds_docstring and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            code -= set(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return code


@every_file
def test_a_file_has_at_most_400_lines_of_code(path):
    assert len(lines_of_code(path)) <= 400


@every_file
def test_a_function_has_at_most_60_lines_of_code(path):
    code = lines_of_code(path)
    functions = [node for node in walk(path) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert [f.name for f in functions if len(code & set(range(f.lineno, (f.end_lineno or 0) + 1))) > 60] == []


# They stand in for the forward of a module, whatever its arguments are.
PASSING_ON = (
    "_forward",
    "attempt",
    "_recompute_all",
    "_recompute_all_but_attention",
    "_recompute_all_but_products",
    "_keep",
    "_load_and_call",
    "call_in_pool",
    "launch_around",
)


@every_file
def test_no_signature_swallows_what_is_misspelt(path):
    functions = [node for node in walk(path) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))]
    assert [f.lineno for f in functions if f.args.kwarg and getattr(f, "name", "") not in PASSING_ON] == []


CATCH_ALL = {
    "trainer/spec/commands/ending.py",  # the same for the commands that are no jobs
    "trainer/process/pool.py",  # raised again by the process that asked for the work
}


@every_file
def test_only_what_ends_a_program_catches_everything(path):
    if path.name != "__main__.py" and name(path) not in CATCH_ALL:
        caught = [ast.unparse(n.type) if n.type else "bare" for n in walk(path) if isinstance(n, ast.ExceptHandler)]
        assert not [kind for kind in caught if re.search(r"\b(bare|Exception|BaseException)\b", kind)]


@every_file
def test_nothing_is_unpickled(path):
    assert not imports(path) & {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
    assert found_in(path, r"torch\.load\b|allow_pickle\s*=\s*True|weights_only\s*=\s*False") == []


# Calls that read what others published, with code in it or not, and the only files that may make them.
READERS_OF_MODELS = {
    "from_pretrained": ("trainer/base_model/loading.py", *MAKERS),
    "from_config": ("trainer/base_model/loading.py",),
    "load_dataset_builder": ("entrypoint/fetch/hub_dataset/hub_rows.py",),
    "snapshot_download": ("trainer/base_model/hub_files.py",),
    "hf_hub_download": ("trainer/base_model/hub_files.py",),
    **dict.fromkeys(("load_config", "load_dataset", "from_single_file", "load_lora_weights", "load_attn_procs"), ()),
    **dict.fromkeys(
        ("load_state_dict_from_url", "get_class_from_dynamic_module", "from_pt", "load_textual_inversion"), ()
    ),
}


@every_file
def test_what_others_published_is_read_in_one_place(path):
    """There, configs and tokenizers are checked first, and no code of a repository is run."""
    calls = [node for node in walk(path) if isinstance(node, ast.Call)]
    found = []
    for call in calls:
        function = ast.unparse(call.func).split(".")[-1]
        if function in READERS_OF_MODELS and name(path) not in READERS_OF_MODELS[function]:
            found.append(f"{call.lineno}: {function}")
        trusted = [word.value for word in call.keywords if word.arg == "trust_remote_code"]
        if any(not isinstance(value, ast.Constant) or value.value is not False for value in trusted):
            found.append(f"{call.lineno}: trust_remote_code")
    names = [alias.name for node in walk(path) if isinstance(node, ast.ImportFrom) for alias in node.names]
    # These classes take the name of another class, or a file of code, from a config.
    found += [word for word in names if re.match(r"Auto(?!encoder)[A-Z]", word) and name(path) not in MAKERS]
    assert found == []


def test_transformers_is_told_to_run_no_code():
    path = ROOT / "trainer/base_model/loading.py"
    calls = [node for node in walk(path) if isinstance(node, ast.Call) and "from_pretrained" in ast.unparse(node.func)]
    words = [{word.arg for word in call.keywords} for call in calls]
    assert len(calls) == 3 and sum("trust_remote_code" in own for own in words) == 2
    assert all({"use_safetensors", "local_files_only"} <= own for own in words)


@every_file
def test_one_client_speaks_http(path):
    """Its bounds (trainer/network) hold for every server that is asked."""
    if path.parent.name == "network":
        return
    assert not imports(path) & {"requests", "urllib3", "aiohttp", "http.client", "urllib.request", "httpcore"}
    opened = r"httpx\.(Client|AsyncClient|HTTPTransport|get|head|post|put|patch|delete|stream|request)\("
    assert found_in(path, opened) == []


@every_file
def test_programs_are_started_with_an_environment_made_for_them(path):
    """Never with all of ours, in which the secrets are. (The trainer's own is such a one already.)

    Nor with our stdin: no library may ask a question there.
    """
    if path.is_relative_to(ROOT / "entrypoint"):
        calls = [n for n in walk(path) if isinstance(n, ast.Call) and ast.unparse(n.func).startswith("subprocess.")]
        starts = [c for c in calls if ast.unparse(c.func).split(".")[-1] in ("run", "Popen", "call", "check_output")]
        # That one runs what the user types, with the user's own terminal.
        needed = {"env"} if name(path) == "entrypoint/runpod/download.py" else {"env", "stdin"}
        assert [c.lineno for c in starts if not needed <= {k.arg for k in c.keywords}] == []


@every_file
def test_families_are_known_under_families_alone(path):
    """Comments and docstrings may tell of them; code may not."""
    if "families" in path.parts:
        return
    known = "|".join({re.escape(n) for n in (*family_names(), *base_models())} | {"sdxl", "sd3"})
    # flux_shift is the name of a timestep sampling, which users set.
    pattern = rf"(?<![a-z0-9])({known})(?!_shift)(?![a-z0-9])"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = [t.value for t in ast.walk(tree) if isinstance(t, ast.Expr) and isinstance(t.value, ast.Constant)]
    words = [(n, n.value) for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    words += [(n, n.id) for n in ast.walk(tree) if isinstance(n, ast.Name)]
    words += [(n, n.attr) for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    assert [w for n, w in words if n not in texts and re.search(pattern, w, re.IGNORECASE)] == []


@every_file
def test_vendors_are_named_where_they_must_be_alone(path):
    """Comments and docstrings may say on which card something was measured; code may not know vendors."""
    if name(path) in WITH_VENDORS:
        return
    code = lines_of_code(path)
    named = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        statement = line.split("  #")[0]
        if number in code and re.search(rf"(?<![a-z0-9])({VENDORS})(?![a-z0-9])", statement, re.IGNORECASE):
            named.append(f"{number}: {statement.strip()}")
    assert named == []


@every_file
def test_parameters_are_read_from_the_environment_in_one_place(path):
    if name(path) != "entrypoint/settings/read.py":
        assert found_in(path, r"(environ|getenv).*PARAMS_") == []


# Which files may open what they read by its path, and why nothing can wait there, or be what it is not.
OPENS = {
    "entrypoint/bake.py": "while the image is built",
    "entrypoint/dataset_config/manifest.py": "the files of this program",
    "entrypoint/fetch/archive.py": "members of an archive; the archive was looked at by `local_archive`",
    "entrypoint/fetch/flash_attention.py": "a file of this program",
    "entrypoint/fetch/http.py": "its own download",
    "entrypoint/fetch/hub.py": "blobs that were downloaded",
    "entrypoint/fetch/hub_dataset/hub_folder.py": "what was downloaded and unpacked",
    "entrypoint/fetch/hub_dataset/hub_layout.py": "what was downloaded",
    "entrypoint/fetch/hub_dataset/hub_rows.py": "what was downloaded",
    "entrypoint/fetch/local_weights.py": "what was downloaded",
    "entrypoint/health.py": "/proc",
    "entrypoint/monitor/server.py": "/proc",
    "entrypoint/nodes/interfaces.py": "/proc",
    "entrypoint/planning/preflight.py": "its own probe",
    "entrypoint/processes/farewell.py": "the lock, in a process that has a limit of time",
    "entrypoint/processes/launch.py": "in its own temporary folder",
    "entrypoint/runpod/request.py": "on the machine of the user, who waits for it",
    "entrypoint/runpod/serverless.py": "its own pipe",
    "entrypoint/system/hardware.py": "/sys and /proc",
    "trainer/__main__.py": "in the temporary folder of the entrypoint",
    "trainer/base_model/lazy_tensors.py": "weights, after their header",
    "trainer/base_model/light_tokenizer.py": "files of a model, after `check_folder`",
    "trainer/base_model/model_folder.py": "files of a model, by names that are looked at",
    "trainer/base_model/single_file.py": "files of a model, after `check_folder`",
    "trainer/base_model/without_weights.py": "files of a model, after `check_folder`",
    "trainer/checkpoints/state_files.py": "tensors, after their digest",
    "trainer/data/cache.py": "an item, after `is_regular`",
    "trainer/data/packs/pack_file.py": "a new file of its own, and without waiting",
    "trainer/data/scan.py": "/proc",
    "trainer/families/miniatures/pools.py": "its own files",
    "trainer/families/miniatures/score.py": "its own images",
    "trainer/families/miniatures/tokens.py": "its own files",
    "trainer/families/miniatures/workshop.py": "its own files",
    "trainer/data/shards/members.py": "a tar that was opened without waiting",
    "trainer/job/build.py": "files of a model, after `check_folder`",
    "trainer/captioning/fitting.py": "/proc",
    "trainer/job/handover.py": "in the temporary folder of the entrypoint",
    "trainer/job/reporting/metrics.py": "what `_truncated` has just written",
    "trainer/job/watchdog.py": "its own file",
    "trainer/lora_files/contents.py": "what lies beside a LoRA file whose header was read",
    "trainer/lora_files/convert.py": "a LoRA file, after its header",
    "trainer/lora_files/write.py": "what it has just written",
    "trainer/process/guard.py": "/proc",
    "trainer/process/memory_kills.py": "/proc and /sys",
    "trainer/process/vitals.py": "its own file",
    "trainer/storage/atomic.py": "what it has just written",
    "trainer/storage/locks.py": "without waiting",
    "trainer/storage/read.py": "without waiting",
    "trainer/storage/safetensors_header.py": "a name that was looked at",
    "trainer/training/text_encoders.py": "files of a model, after `check_folder`",
}
READERS = ("open", "read_text", "read_bytes", "safe_open", "load_file", "copyfile", "copytree", "copy2")


@every_file
def test_files_of_users_are_read_by_the_one_function_that_never_waits(path):
    """`trainer.storage.read`: a FIFO or a device with the name of an image must hold up nothing."""
    if name(path) in OPENS:
        return
    bare = []
    for node in walk(path):
        if not isinstance(node, ast.Call) or (isinstance(node.func, ast.Name) and node.func.id == "read_text"):
            continue
        function = ast.unparse(node.func)
        from_memory = function == "Image.open" and ast.unparse(node.args[0]).startswith("io.BytesIO(")
        if not from_memory and (function.split(".")[-1] in READERS or function in ("json.load", "np.load")):
            bare.append(f"{node.lineno}: {ast.unparse(node)}")
    assert bare == []
