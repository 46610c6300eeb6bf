"""Compiled code is kept where nobody else can write: what lies in such a folder is run."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from entrypoint.fetch import flash_attention
from entrypoint.processes import launch
from entrypoint.system.private_folders import CACHES, compile_caches, make_private
from tests.support.plans import job_plan
from trainer.spec.errors import SettingsError

SOMEBODY = 12345
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_folder_is_made_for_its_user_alone(tmp_path):
    assert make_private(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert mode(tmp_path / "a" / "b") == 0o700


@pytest.mark.parametrize(("bits", "is_private"), [(0o700, True), (0o755, True), (0o777, False), (0o757, False)])
def test_a_folder_that_others_can_write_to_is_not_used_and_left_as_it_is(tmp_path, bits, is_private):
    place = tmp_path / "cache"
    place.mkdir()
    place.chmod(bits)
    assert (make_private(place) is not None) is is_private and mode(place) == bits


@as_root
@pytest.mark.parametrize(
    ("uid", "gid", "is_private"), [(SOMEBODY, SOMEBODY, True), (SOMEBODY, 77, False), (SOMEBODY, 0, False)]
)
def test_a_group_of_one_user_is_nobody_else(tmp_path, monkeypatch, uid, gid, is_private):
    """With a umask of 002, which such systems have, every folder can be written by the group."""
    place = tmp_path / "cache"
    place.mkdir()
    os.chown(place, uid, gid)
    place.chmod(0o775)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    os.chown(tmp_path, uid, gid)
    found = make_private(place)
    assert (found is not None) is is_private


@pytest.mark.parametrize(("bits", "is_private"), [(0o755, True), (0o1777, True), (0o777, False), (0o775, False)])
def test_the_folder_above_is_what_could_be_replaced(tmp_path, bits, is_private):
    """With the sticky bit, as /tmp has it, only the owner of a folder may rename it."""
    above = tmp_path / "volume"
    (above / "cache").mkdir(parents=True)
    above.chmod(bits)
    assert (make_private(above / "cache") is not None) is is_private


@as_root
@pytest.mark.parametrize("whose", ["", "cache", "cache/x.so", "cache/deep/er/x.so"])
def test_what_belongs_to_somebody_else_is_not_used(tmp_path, whose):
    """Also where the folder was open to others once, and is closed now."""
    (tmp_path / "volume/cache/deep/er").mkdir(parents=True)
    for name in ("x.so", "deep/er/x.so"):
        (tmp_path / "volume/cache" / name).touch()
    assert make_private(tmp_path / "volume/cache") is not None
    os.chown(tmp_path / "volume" / whose, SOMEBODY, SOMEBODY)
    assert make_private(tmp_path / "volume/cache") is None


def test_a_link_is_followed_once_and_not_at_each_use(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert make_private(tmp_path / "link") == tmp_path / "real"


@pytest.mark.parametrize("kind", ["file", "fifo", "loop", "nowhere", "long", "proc"])
def test_what_is_no_folder_is_not_used(tmp_path, kind):
    place = tmp_path / "cache"
    if kind == "file":
        place.touch()
    elif kind == "fifo":
        os.mkfifo(place)
    elif kind == "loop":
        place.symlink_to(place)
    elif kind == "nowhere":
        place.symlink_to("/proc/nowhere")
    else:
        place = {"long": tmp_path / ("a" * 300), "proc": Path("/proc/cache")}[kind]
    assert make_private(place) is None


@pytest.fixture
def volume(tmp_path):
    """A folder that everybody can write to, with a library that somebody has put into a cache there."""
    place = tmp_path / "volume"
    (place / "inductor").mkdir(parents=True)
    (place / "inductor" / "x.so").touch()
    place.chmod(0o777)
    return place


def test_a_cache_that_others_can_write_to_is_replaced_and_said(tmp_path, volume, caplog):
    asked = {"TORCHINDUCTOR_CACHE_DIR": str(volume / "inductor")}
    own = compile_caches(asked, tmp_path / "cache", scratch=tmp_path)
    assert own["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "cache/kernels/inductor")
    assert f"Compiled kernels go to {tmp_path}/cache/kernels instead of {volume}/inductor" in caplog.text
    assert "Fix: set TORCHINDUCTOR_CACHE_DIR to a folder" in caplog.text


def test_where_all_places_are_open_to_others_each_job_compiles_anew(tmp_path, volume, caplog):
    (tmp_path / "scratch").mkdir()
    asked = {"TORCHINDUCTOR_CACHE_DIR": str(volume / "inductor")}
    for number in (1, 2):
        own = compile_caches(asked, volume / "cache", scratch=tmp_path / "scratch")
        fresh = Path(own["TORCHINDUCTOR_CACHE_DIR"])
        assert len(caplog.records) == number  # one line for all of them
        assert fresh.parent == tmp_path / "scratch" and list(fresh.iterdir()) == [] and mode(fresh) == 0o700
    assert len(list((tmp_path / "scratch").iterdir())) == 4


def test_each_cache_has_a_place(tmp_path, caplog):
    """Without the variable, torch would use a name below /tmp that everybody can guess."""
    asked = {name: str(tmp_path / name) for name in CACHES}
    assert compile_caches(asked, tmp_path / "cache", scratch=tmp_path) == asked
    kernels = tmp_path / "cache/kernels"
    own = compile_caches({}, tmp_path / "cache", scratch=tmp_path)
    assert own == {"TORCHINDUCTOR_CACHE_DIR": f"{kernels}/inductor", "TRITON_CACHE_DIR": f"{kernels}/triton"}
    assert caplog.text == ""


def test_the_trainer_gets_these_folders(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nenv > {tmp_path}/seen\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    (tmp_path / "job").mkdir()
    (tmp_path / "volume" / "triton").mkdir(parents=True)
    (tmp_path / "volume").chmod(0o777)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TRITON_CACHE_DIR": f"{tmp_path}/volume/triton"}
    assert launch.launch(job_plan(tmp_path / "job", "flux"), environment=environment) == 0
    seen = dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines() if "=" in line)
    assert seen["TORCHINDUCTOR_CACHE_DIR"] == f"{tmp_path}/job/cache/kernels/inductor"
    assert "volume" not in seen["TRITON_CACHE_DIR"]


def test_flash_attention_is_neither_used_nor_installed_where_others_can_write(tmp_path, monkeypatch):
    monkeypatch.setattr(flash_attention, "version", lambda: None)
    monkeypatch.setattr(flash_attention, "completed", lambda place: {})
    flash_attention.folder(tmp_path / "cache").mkdir(parents=True)
    assert flash_attention.is_installed(tmp_path / "cache")
    (tmp_path / "cache").chmod(0o777)
    assert not flash_attention.is_installed(tmp_path / "cache")
    with pytest.raises(SettingsError, match=r"others can write to .*/flash_4 or a folder above it"):
        flash_attention.install(tmp_path / "cache")
