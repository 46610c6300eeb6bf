"""Jobs whose weights are named by address: the same result as from local files, and nothing of the keys anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.original_names import flux_files, miniature
from tests.support.shelf import Shelf

TOKEN = "cAnary-shelf-token-1"


@pytest.fixture
def shelf():
    with Shelf() as running:
        yield running


@pytest.fixture
def named(shelf, tmp_path):
    """The four files of the miniature, on a server that asks for a token and breaks off; variables that name them."""
    local = flux_files(tmp_path, torch.float16)
    addresses = {}
    for variable, path in local.items():
        place = f"/{Path(path).name}"
        shelf.files[place] = Path(path).read_bytes()
        shelf.tokens[place] = TOKEN
        addresses[variable] = f"{shelf.url}{place}?X-Amz-Signature=cAnarySig1234567"
    about = {"MODEL_CONFIG_PATH": str(miniature("flux"))}
    tokens = {"DOWNLOAD_TOKENS": f"{shelf.url.removeprefix('http://')}={TOKEN}"}
    return local | about, addresses | about | tokens


def test_weights_by_address_give_what_local_files_give(job, shelf, named, tmp_path):
    local, by_address = named
    cache = {"CACHE_PATH": str(tmp_path / "cache")}
    code, printed = job.run(**local, OUTPUT_PATH=str(tmp_path / "local"))
    assert code == 0, printed
    code, printed = job.run("--check", **by_address, **cache)
    assert code == 0 and "To fetch: MODEL_PATH=http://127.0.0.1" in printed and "Checked: this job can run" in printed
    fetched = sum(path.stat().st_blocks * 512 for path in (tmp_path / "cache").rglob("*.safetensors"))
    assert fetched < sum(map(len, shelf.files.values())) / 2
    shelf.cuts = {place: [len(data) // 2] for place, data in shelf.files.items()}
    shelf.asked.clear()
    code, printed = job.run(**by_address, **cache)
    assert code == 0, printed
    assert not any(shelf.cuts[place] for place in shelf.files)
    ours, theirs = job.out / "x.safetensors", tmp_path / "local" / "x.safetensors"
    assert ours.read_bytes() == theirs.read_bytes()
    shelf.asked.clear()
    shelf.rules = dict.fromkeys(shelf.files, lambda _: (403, {}, b"Request has expired"))
    code, printed = job.run(**by_address, **cache, PARAMS_MAX_STEPS="14")
    assert code == 0 and "signature has expired" in printed and "14/14" in printed, printed
    written = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and tmp_path / "local" not in p.parents]
    assert b"cAnary" not in b"".join(written) + printed.encode()


def test_all_that_is_wrong_is_named_at_once_and_before_the_model_is_fetched(job, shelf, named, tmp_path):
    _, by_address = named
    shelf.rules["/ae.safetensors"] = lambda _: (403, {}, b"<Code>AccessDenied</Code>Request has expired")
    shelf.files["/clip_l.safetensors"] = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    code, printed = job.run(**by_address, CACHE_PATH=str(tmp_path / "cache"))
    assert code == 78 and "cAnary" not in printed, printed
    assert "VAE_PATH=" in printed and "signature has expired" in printed and "Git LFS pointer" in printed
    assert not (job.out / "plan.json").exists()
    del shelf.rules["/ae.safetensors"], by_address["CLIP_L_PATH"], by_address["DOWNLOAD_TOKENS"]
    code, printed = job.run(**by_address, CACHE_PATH=str(tmp_path / "cache"))
    assert code == 77 and "Set DOWNLOAD_TOKENS=127.0.0.1:" in printed, printed


def test_a_lora_by_address_is_where_training_goes_on(job, shelf, tmp_path):
    code, printed = job.run(OUTPUT_PATH=str(tmp_path / "first"))
    assert code == 0, printed
    shelf.files["/x.safetensors"] = (tmp_path / "first" / "x.safetensors").read_bytes()
    code, printed = job.run(PARAMS_RESUME_FROM=f"{shelf.url}/x.safetensors", PARAMS_NETWORK_DIM="")
    assert code == 0 and "the rank of the LoRA file" in printed and "Started from the weights of" in printed, printed
    code, printed = job.run(PARAMS_RESUME_FROM=f"{shelf.url}/x.safetensors", PARAMS_NETWORK_DIM="8")
    assert code == 78 and "has rank 4" in printed, printed


def test_prefetch_brings_all_and_the_job_downloads_nothing(job, shelf, named, tmp_path):
    _, by_address = named
    cache = {"CACHE_PATH": str(tmp_path / "cache")}
    code, printed = job.run("prefetch", **by_address, **cache)
    assert code == 0 and "Fetched: all that this job downloads is here" in printed, printed
    assert not job.out.exists() or not (job.out / "plan.json").exists()
    shelf.asked.clear()
    shelf.rules = dict.fromkeys(shelf.files, lambda request: (500, {}, b"") if request.command != "GET" else None)
    code, printed = job.run(**by_address, **cache)
    assert code == 0 and "x.safetensors" in printed, printed
    assert len(shelf.asked) == len(shelf.files)  # whether they have changed


def test_prefetch_of_a_full_size_model_needs_no_gpu_and_names_what_is_wrong(job, shelf, tmp_path):
    shelf.files["/a.safetensors"] = b"version https://git-lfs.github.com/spec/v1"
    code, printed = job.run("prefetch", BASE_MODEL="sdxl", MODEL_PATH=f"{shelf.url}/a.safetensors")
    assert code == 78 and "Git LFS pointer" in printed and "No GPU" not in printed, printed
