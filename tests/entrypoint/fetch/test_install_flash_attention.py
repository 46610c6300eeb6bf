"""FlashAttention 4 is brought once, by the real pip, from a folder with a tiny package; and who is given it."""

from __future__ import annotations

import base64
import dataclasses
import fcntl
import hashlib
import os
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from entrypoint.dataset_config.manifest import read_manifest
from entrypoint.fetch import flash_attention, packages
from entrypoint.planning.plan import make_plan
from entrypoint.processes.launch import launch
from entrypoint.settings.read import read_settings
from entrypoint.system.hardware import Hardware
from tests.support.machines import CPU, FULL, LARGE_GPU, MINI, NOW
from trainer.spec.errors import SettingsError, StorageError, UnreachableError
from trainer.spec.family import base_models, get_family
from trainer.spec.plan import Plan
from trainer.storage import folders

SOURCES = {"tiny/__init__.py": "from inside import HERE\n", "tiny/dsl_packages/inside.py": "HERE = __file__\n"}
OLDER = dataclasses.replace(LARGE_GPU, architecture="8.9")
NEWER = dataclasses.replace(LARGE_GPU, architecture="10.0")
AMD = dataclasses.replace(LARGE_GPU, vendor="amd", architecture="gfx942")


@pytest.fixture
def links(tmp_path: Path) -> Path:
    """A folder with a wheel."""
    about = {
        "tiny-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\nRequires-Dist: nowhere\n",
        "tiny-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    (tmp_path / "links").mkdir()
    with zipfile.ZipFile(tmp_path / "links" / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in {**SOURCES, **about}.items():
            wheel.writestr(name, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
            record += f"{name},sha256={digest},{len(text)}\n"
        wheel.writestr("tiny-1.0.dist-info/RECORD", record + "tiny-1.0.dist-info/RECORD,,\n")
    return tmp_path / "links"


@pytest.fixture
def lock(tmp_path: Path, links: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock of that wheel alone, which pip finds in its folder; it is in no environment."""
    (wheel,) = links.iterdir()
    path = tmp_path / "tiny.lock"
    path.write_text(f"tiny==1.0 \\\n    --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n")
    monkeypatch.setattr(flash_attention, "LOCK", path)
    monkeypatch.setattr(flash_attention, "version", lambda: None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, str]]]:
    """The environment of each pip that ran."""
    real, found = subprocess.run, []

    def run(command: list[str], **options):
        if "pip" in command:
            found.append(options["env"])
        return real(command, **options)

    monkeypatch.setattr(packages.subprocess, "run", run)
    yield found


def left(cache: Path) -> list[str]:
    return sorted(p.name for p in (cache / "flash_4").iterdir() if not p.name.endswith(".lock"))


def imported(cache: Path) -> str:
    """Where a process finds the module that is not where modules are."""
    own = {"PATH": os.environ["PATH"], **flash_attention.environment(cache, {})}
    command = [sys.executable, "-c", "import tiny; print(tiny.HERE)"]
    return subprocess.run(command, env=own, capture_output=True, text=True, check=True).stdout.strip()


def test_it_is_brought_once_and_stays_after_it_was_used(tmp_path, lock, links, started, monkeypatch):
    monkeypatch.setenv("PIP_COMPILE", "0")  # what is compiled later would make the folder another
    assert not flash_attention.is_installed(tmp_path)
    flash_attention.install(tmp_path)
    place = flash_attention.folder(tmp_path)
    assert flash_attention.is_installed(tmp_path) and left(tmp_path) == [place.name]
    assert imported(tmp_path) == str(place / "tiny" / "dsl_packages" / "inside.py")
    assert {p.name for p in place.iterdir()} == {"tiny", "tiny-1.0.dist-info", folders.MARKER}
    next(links.iterdir()).unlink()
    flash_attention.install(tmp_path)
    assert flash_attention.is_installed(tmp_path) and len(started) == 1


def test_pip_gets_no_secret_and_room_in_the_cache(tmp_path, lock, started, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of-mine")
    flash_attention.install(tmp_path)
    (own,) = started
    assert "HF_TOKEN" not in own and Path(own["TMPDIR"]).is_relative_to(tmp_path / "flash_4")


def test_two_jobs_at_once_bring_it_once(tmp_path, lock, started):
    both = [threading.Thread(target=flash_attention.install, args=(tmp_path,)) for _ in range(2)]
    for job in both:
        job.start()
    for job in both:
        job.join()
    assert flash_attention.is_installed(tmp_path) and len(started) == 1


def test_other_versions_have_another_folder(tmp_path, lock):
    before = flash_attention.folder(tmp_path)
    lock.write_text(lock.read_text() + "\n")
    assert flash_attention.folder(tmp_path) != before and sys.implementation.cache_tag in before.name


@pytest.mark.parametrize(
    ("entry", "why"), [("--hash=sha256:" + 64 * "0", "DO NOT MATCH THE HASHES"), ("", "Hashes are required")]
)
def test_a_file_that_is_not_the_locked_one_is_refused(tmp_path, lock, entry, why):
    lock.write_text(f"tiny==1.0 {entry}\n")
    with pytest.raises(UnreachableError, match=rf"(?s){why}.*or set PARAMS_ATTENTION=native"):
        flash_attention.install(tmp_path)
    assert left(tmp_path) == [] and not flash_attention.is_installed(tmp_path)


def test_without_a_package_index_it_is_told_what_to_do(tmp_path, lock, links):
    next(links.iterdir()).unlink()
    with pytest.raises(UnreachableError, match=r"(?s)No matching distribution.*reach a package index"):
        flash_attention.install(tmp_path)
    assert left(tmp_path) == []


def test_a_pip_that_hangs_is_ended(tmp_path, lock, monkeypatch):
    monkeypatch.setattr(flash_attention, "PIP_TIMEOUT_S", 0.01)
    with pytest.raises(UnreachableError, match=r"did not end in 0 s"):
        flash_attention.install(tmp_path)
    assert left(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, lock):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StorageError, match=r"^CACHE_PATH: "):
        flash_attention.install(tmp_path / "cache")


def test_the_real_lock_has_hashes_and_nothing_that_the_images_have():
    text = flash_attention.LOCK.read_text(encoding="utf-8")
    names = {line.split("==")[0] for line in text.splitlines() if "==" in line}
    images = "".join(
        (flash_attention.LOCK.parents[2] / name).read_text() for name in ("requirements.lock", "torch.lock")
    )
    assert "flash-attn-4" in names and text.count("--hash=sha256:") >= len(names)
    assert names.isdisjoint({line.split("==")[0] for line in images.splitlines() if "==" in line})


def test_what_is_in_the_environment_needs_no_folder(tmp_path, lock, started, monkeypatch):
    monkeypatch.setattr(flash_attention, "version", lambda: "4.0")
    flash_attention.install(tmp_path)
    assert started == [] and flash_attention.is_installed(tmp_path)
    assert flash_attention.environment(tmp_path, {"PYTHONPATH": "/a:/b"})["PYTHONPATH"] == "/a:/b"


def test_kernels_are_kept_where_the_volume_has_locks(tmp_path, lock, monkeypatch):
    """Without them the package would wait for each, and give up."""
    name = "FLASH_ATTENTION_CUTE_DSL_CACHE_"
    own = flash_attention.environment(tmp_path, {"PYTHONPATH": "/a"})
    assert (own[f"{name}ENABLED"], own[f"{name}DIR"]) == ("1", str(tmp_path / "flash_4" / "kernels"))
    assert own["PYTHONPATH"] == f"/a:{flash_attention.folder(tmp_path)}"

    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert flash_attention.environment(tmp_path, {})[f"{name}ENABLED"] == "0"


# ---- who gets it


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    def plan(on: Hardware, asked: str, *, there: bool = False, base: str = FULL) -> Plan:
        monkeypatch.setattr(flash_attention, "is_installed", lambda cache: there)
        settings = read_settings({"BASE_MODEL": base, "DATASET_NAME": "org/pictures", "PARAMS_ATTENTION": asked})
        return make_plan(settings, read_manifest(None, None), on, now=NOW)

    return plan


@pytest.mark.parametrize(
    ("on", "there", "chosen", "why"),
    [
        (LARGE_GPU, True, "flash_4", "the fastest here"),
        (LARGE_GPU, False, "native", "flash_4 is faster here, and PARAMS_ATTENTION=flash_4 installs it"),
        (OLDER, True, "native", "torch picks the kernel)"),
        (NEWER, True, "native", "torch picks the kernel)"),
        (AMD, True, "native", "torch picks the kernel)"),
        (CPU, True, "native", "torch picks the kernel)"),
    ],
)
def test_auto_takes_it_where_it_is_there_and_the_fastest(planned, on, there, chosen, why):
    made = planned(on, "auto", there=there, base=FULL if on is not CPU else MINI)
    (reason,) = (r for r in made.reasons if r.startswith("PARAMS_ATTENTION"))
    assert made.engine.attention == chosen and why in reason


def test_auto_leaves_a_miniature_to_torch(planned):
    """Its heads are narrower than those that are taken."""
    assert planned(LARGE_GPU, "auto", there=True, base=MINI).engine.attention == "native"


@pytest.mark.parametrize("on", [LARGE_GPU, NEWER])
@pytest.mark.parametrize("base", sorted({name: base for base, (name, _) in base_models().items()}.values()))
def test_it_runs_on_request_with_any_model(planned, on, base):
    made = planned(on, "flash_4", base=base)
    assert made.engine.attention == "flash_4" and not [r for r in made.reasons if r.startswith("PARAMS_ATTENTION")]


@pytest.mark.parametrize("on", [OLDER, AMD, CPU])
def test_it_is_refused_where_it_cannot_run(planned, on):
    with pytest.raises(
        SettingsError, match=r"flash_4 needs compute capability 9\.0 or more, which .*_ATTENTION=auto\."
    ):
        planned(on, "flash_4", there=True, base=MINI)


def test_native_is_native_although_it_is_there(planned):
    assert planned(LARGE_GPU, "native", there=True).engine.attention == "native"


def test_a_model_that_cannot_switch_is_told_that_it_may_have_it(planned):
    rigid = [base for base, (name, _) in base_models().items() if not get_family(name).FACTS.attention_backends]
    for base in rigid:
        with pytest.raises(SettingsError, match=r"Allowed: auto, native, flash_4\."):
            planned(LARGE_GPU, "flex", base=base)


def test_the_trainer_finds_it(tmp_path, lock, planned, monkeypatch):
    """And only where the plan wants it."""
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\necho "$PYTHONPATH|$FLASH_ATTENTION_CUTE_DSL_CACHE_DIR" > {tmp_path}/told\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    flash_attention.install(tmp_path)
    place = flash_attention.folder(tmp_path)
    monkeypatch.setattr(sys, "executable", str(program))
    for asked in ("flash_4", "native"):
        made = planned(LARGE_GPU, asked)
        made = dataclasses.replace(made, output=dataclasses.replace(made.output, cache=str(tmp_path)))
        assert launch(made, environment={"PYTHONPATH": "/of/the/user"}) == 0
        path, kernels = (tmp_path / "told").read_text().strip().split("|")
        own = [str(place), str(place / "tiny" / "dsl_packages")] if asked == "flash_4" else []
        assert path.split(":") == [str(Path(flash_attention.__file__).parents[2]), "/of/the/user", *own]
        assert kernels == (str(tmp_path / "flash_4" / "kernels") if own else "")
