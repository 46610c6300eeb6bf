"""Each package imports only those below it, families are plug-ins, and no imports run in circles.

The layers are those of docs/architecture.md. Imports inside functions count as well: a late import may only delay a
heavy library, never hide a circle.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = {  # from the bottom; packages on one layer do not import each other
    "trainer": (
        ("process",),
        ("spec",),
        ("storage", "network"),
        ("lora_files", "base_model"),
        ("engine",),
        ("families", "data"),
        ("captioning",),
        ("training",),
        ("checkpoints",),
        ("job",),
        ("__main__", "sample", "export"),
    ),
    "entrypoint": (
        ("settings",),
        ("system",),
        ("dataset_config",),
        ("fetch",),
        ("planning",),
        ("runpod",),
        ("report", "nodes"),
        ("processes",),
        ("notify", "trackers", "monitor"),
        ("queue",),
        ("engines",),
        ("bake", "health", "unprivileged"),
        ("job",),
        ("__main__",),
    ),
}
ENGINE_LAYERS = (  # within the engine, likewise
    ("kernels", "attention", "flat_parameters"),
    ("quantization",),
    ("memory",),
)
WITHOUT_TORCH = (
    *("trainer.process", "trainer.spec", "trainer.storage", "trainer.network"),
    *("trainer.base_model.charsmap", "trainer.base_model.configs", "trainer.base_model.light_tokenizer"),
    "trainer.base_model.tokenizer_files",
    *("trainer.base_model.model_folder", "trainer.base_model.weight_kinds", "trainer.base_model.without_weights"),
    *(
        "trainer.captioning.kinds",
        "trainer.captioning.known",
        "trainer.captioning.requests",
        "trainer.captioning.store",
    ),
    *("trainer.lora_files.blocks", "trainer.lora_files.contents"),
    *("trainer.lora_files.inspect", "trainer.lora_files.key_names"),
    *("trainer.lora_files.numbers", "trainer.lora_files.other_kinds"),
    *("trainer.data.caption_files", "trainer.data.caption_length", "trainer.data.captions", "trainer.data.folder"),
    *(
        "trainer.data.compact.seen",
        "trainer.data.decode",
        "trainer.data.epochs",
        "trainer.data.identity",
        "trainer.data.records",
        "trainer.data.scan",
        "trainer.data.shards.stream",
    ),
)
NEEDS_TORCH = "trainer.storage.safetensors_writer"
MOST_MODULES = 14
HEAVY = (
    *("torch", "diffusers", "transformers", "peft", "numpy", "datasets", "huggingface_hub", "PIL", "safetensors"),
    *("httpx", "httpcore", "starlette", "uvicorn", "anyio"),
)


def name_of(path: Path) -> str:
    """The dotted name of the module in `path`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for top in LAYERS for path in sorted((ROOT / top).rglob("*.py"))}
PACKAGES = sorted(name for name, path in MODULES.items() if path.name == "__init__.py")


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imported(node: ast.AST, module: str) -> Iterator[str]:
    """The names of the modules that an import statement in `module` brings in."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = module.split(".")[: -node.level] if MODULES[module].name != "__init__.py" else module.split(".")
            base = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            whole = f"{base}.{alias.name}"
            yield whole if whole in MODULES else base


@functools.cache
def imports(module: str) -> frozenset[str]:
    """The modules of this repository that `module` imports, also inside functions; not for the type checker alone."""
    skipped: set[int] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped |= {id(inner) for inner in ast.walk(node)}
    found: set[str] = set()
    for node in ast.walk(tree(module)):
        if id(node) not in skipped:
            found |= {name for name in imported(node, module) if name in MODULES}
    return frozenset(found - {module})


def level(parts: list[str], layers: tuple[tuple[str, ...], ...], depth: int) -> int | None:
    """The layer of a module by its part at `depth`; None where it has none."""
    if len(parts) <= depth:
        return None
    return next((i for i, names in enumerate(layers) if parts[depth] in names), None)


def is_allowed(importer: str, target: str) -> bool:
    here, there = importer.split("."), target.split(".")
    if here[0] != there[0]:
        across = target == "trainer" or (target.startswith(WITHOUT_TORCH) and target != NEEDS_TORCH)
        return here[0] == "entrypoint" and across
    if len(here) == 1 or len(there) == 1 or here[1] == there[1]:
        return True
    own, other = level(here, LAYERS[here[0]], 1), level(there, LAYERS[here[0]], 1)
    return own is not None and other is not None and other < own


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_the_layers_below_its_own(module):
    assert [target for target in sorted(imports(module)) if not is_allowed(module, target)] == []


def test_every_package_has_a_layer():
    for top, layers in LAYERS.items():
        named = {name for names in layers for name in names}
        here = {path.stem for path in (ROOT / top).glob("*.py")} - {"__init__"}
        here |= {path.parent.name for path in (ROOT / top).glob("*/__init__.py")}
        assert here == named, top


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("trainer.engine.")))
def test_inside_the_engine_imports_go_down_as_well(module):
    """Kernels know no layers, layers no step: what is in no sub-package may import all of them."""
    own = level(module.split("."), ENGINE_LAYERS, 2)
    if own is None:
        return
    for target in imports(module):
        if target.startswith("trainer.engine."):
            inside = target.split(".")[2] == module.split(".")[2]
            other = level(target.split("."), ENGINE_LAYERS, 2)
            assert inside or (other is not None and other < own), f"{module} imports {target}"


def test_no_module_imports_itself_by_way_of_others():
    graph = {module: imports(module) for module in MODULES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as problem:
        pytest.fail(" -> ".join(problem.args[1]))


def test_families_are_looked_up_and_never_imported_by_name():
    for module in MODULES:
        if not module.startswith("trainer.families"):
            assert not [t for t in imports(module) if t.startswith("trainer.families")], module


def test_what_the_entrypoint_uses_of_the_trainer_imports_no_torch():
    modules = [m for m in MODULES if m.startswith(WITHOUT_TORCH) and m != NEEDS_TORCH]
    modules += [m for m in MODULES if m.startswith("entrypoint")]
    script = f"""
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "diffusers", "transformers", "peft"):
            raise ImportError(f"{{name}} is not for the entrypoint")
sys.meta_path.insert(0, Refuse())
for module in {modules!r}:
    importlib.import_module(module)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_a_folder_has_few_modules(package):
    modules = [path for path in MODULES[package].parent.glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= MOST_MODULES


@pytest.mark.parametrize("package", [name for name in PACKAGES if name.count(".") >= 1])
def test_a_package_says_what_is_in_it_and_names_each_module(package):
    text = ast.get_docstring(tree(package)) or ""
    modules = {path.stem for path in MODULES[package].parent.glob("*.py")} - {"__init__", "__main__"}
    assert [name for name in sorted(modules) if name not in text] == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_late_import_delays_a_heavy_library_or_a_module_that_needs_one(module):
    """Never to break a circle: what is imported late is heavy itself, or imports something heavy at its top."""
    late = []
    for function in ast.walk(tree(module)):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                late += [name for name in imported(node, module) if not is_heavy(name)]
    assert late == []


@functools.cache
def is_heavy(name: str) -> bool:
    if name.split(".")[0] in HEAVY or name.split(".")[0] not in LAYERS:
        return True
    if name not in MODULES:
        return False
    for node in tree(name).body:
        if any(is_heavy(target) for target in imported(node, name) if target.split(".")[0] in (*HEAVY, *LAYERS)):
            return True
    return False
