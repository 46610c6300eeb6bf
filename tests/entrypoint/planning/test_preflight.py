"""Preflight, before anything is downloaded: places, free space, models and images. Without a network."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from entrypoint.fetch import flash_attention, http
from entrypoint.fetch.doors.keys import Keys
from entrypoint.fetch.fetch import fetch_model, fetch_source
from entrypoint.planning import preflight as module
from entrypoint.planning.preflight import _cache_bytes_per_image, preflight
from tests.support.bucket_server import Buckets
from trainer.base_model.model_folder import check_folder, problems
from trainer.spec.errors import DataError, KilnError, SettingsError, StorageError
from trainer.spec.family import get_family
from trainer.spec.plan import (
    DataPlan,
    Dataset,
    EnginePlan,
    LoraPlan,
    ModelPlan,
    OptimPlan,
    OutputPlan,
    Plan,
    Source,
    Subset,
    TrainPlan,
)

ROOT = Path(__file__).parents[3]
FACTS = get_family("flux").FACTS
PATTERNS = FACTS.files
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder in the layout of diffusers, with tiny weights."""
    folder = tmp_path / "model"
    shutil.copytree(FACTS.models["mini-flux"].source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for part in PARTS:
        save_file({"w": np.zeros(10, np.float32)}, folder / part / "model.safetensors")
    (folder / "transformer" / "config.json").write_text("{}")  # it may be of any size
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "1.JPG").write_bytes(b"x")
    return folder


@pytest.fixture
def plan(tmp_path: Path, model: Path, images: Path) -> Plan:
    (tmp_path / "volume").mkdir()
    return Plan(
        model=ModelPlan("mini-flux", "flux", str(model)),
        data=DataPlan((Dataset((Subset(Source("folder", str(images))),), (64, 64)),)),
        lora=LoraPlan(),
        optim=OptimPlan(),
        train=TrainPlan(),
        engine=EnginePlan(),
        output=OutputPlan(str(tmp_path / "volume" / "out"), "x", str(tmp_path / "volume" / "cache")),
    )


def with_source(plan: Plan, *sources: Source) -> Plan:
    return dataclasses.replace(plan, data=DataPlan((Dataset(tuple(Subset(s) for s in sources), (64, 64)),)))


def check(plan: Plan, tmp_path: Path) -> None:
    preflight(plan, token=None, hub_cache=tmp_path / "volume" / "hf" / "hub")


def test_a_good_plan_passes_and_leaves_nothing_behind(plan: Plan, tmp_path: Path) -> None:
    check(plan, tmp_path)
    assert list((tmp_path / "volume").iterdir()) == []


@pytest.mark.alone
def test_the_licence_is_said_before_anything_is_fetched(plan: Plan, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("INFO")
    check(dataclasses.replace(plan, model=dataclasses.replace(plan.model, base="flux")), tmp_path)
    first, *_ = caplog.messages
    said = "Licence of flux, and so of its LoRAs: flux-1-dev-non-commercial-license. Non-commercial use"
    assert first.startswith(said)
    caplog.clear()
    check(plan, tmp_path)  # of a part of this program
    assert "Licence" not in caplog.text


def test_it_is_quick_and_loads_no_client_of_the_hub_for_local_places(plan: Plan, tmp_path: Path) -> None:
    code = (
        "import sys, time; began = time.perf_counter()\n"
        "from pathlib import Path; from trainer.spec.plan import Plan; "
        "from entrypoint.planning.preflight import preflight\n"
        "preflight(Plan.from_json(sys.stdin.read()), token=None, hub_cache=Path('hf'))\n"
        "heavy = {'torch', 'huggingface_hub', 'httpx', 'datasets', 'numpy', 'PIL'} & set(sys.modules)\n"
        "print(heavy or '', time.perf_counter() - began)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        input=plan.to_json(),
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert float(run.stdout) < 0.7  # and nothing heavy before the number


def test_all_problems_are_reported_in_one_message(plan: Plan, tmp_path: Path, model: Path, images: Path) -> None:
    (model / "model_index.json").unlink()
    (images / "deep" / "1.JPG").unlink()
    plan = dataclasses.replace(plan, lora=LoraPlan(resume_from=str(tmp_path / "no.safetensors")))
    with pytest.raises(SettingsError) as problem:
        check(plan, tmp_path)
    assert all(word in str(problem.value) for word in ("PARAMS_RESUME_FROM=", "model_index.json", "no image in it"))


# --- places and room


@pytest.mark.parametrize("variable", ["OUTPUT_PATH", "CACHE_PATH"])
def test_a_place_that_is_a_file_is_named(plan: Plan, tmp_path: Path, variable: str) -> None:
    name = {"OUTPUT_PATH": "out", "CACHE_PATH": "cache"}[variable]
    (tmp_path / "volume" / name).write_text("a file")
    with pytest.raises(SettingsError, match=f"{variable}=.*is a file"):
        check(plan, tmp_path)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_place_that_cannot_be_written_is_named(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "volume").chmod(0o555)
    with pytest.raises(StorageError, match=r"OUTPUT_PATH=.*cannot be written"):
        check(plan, tmp_path)


def test_a_place_without_files_is_named(plan: Plan, tmp_path: Path) -> None:
    plan = dataclasses.replace(plan, output=dataclasses.replace(plan.output, path="/proc/kiln"))
    with pytest.raises(StorageError, match=r"OUTPUT_PATH=/proc/kiln cannot be written.*choose another"):
        check(plan, tmp_path)


def test_a_name_that_no_volume_takes_is_refused(plan: Plan, tmp_path: Path) -> None:
    plan = dataclasses.replace(plan, output=dataclasses.replace(plan.output, path=f"{tmp_path}/{'é' * 150}/out"))
    with pytest.raises(SettingsError, match=r"OUTPUT_PATH=.*a name in it has 300 bytes.*no .* more than 255\. Fix:"):
        check(plan, tmp_path)


def test_too_little_room_shows_both_numbers(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def usage(path: Path) -> Usage:
        asked.append(path)
        return Usage(0, 0, 10 * 2**20)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    archive = tmp_path / "big.zip"
    with zipfile.ZipFile(archive, "w") as container:
        container.writestr("1.png", bytes(60 * 2**20))
    with pytest.raises(StorageError) as problem:
        check(with_source(plan, Source("archive", str(archive))), tmp_path)
    assert asked and problem.value.exit_code == 74
    assert all(
        word in str(problem.value) for word in ("CACHE_PATH", "67 MiB are needed", "10 MiB are free", "unpacked")
    )


def test_checkpoints_count(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    save_file({"w": np.zeros(2**20, np.float32)}, model / "transformer" / "model.safetensors")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 10_000))
    with pytest.raises(StorageError, match=r"OUTPUT_PATH.*4 checkpoints"):
        check(plan, tmp_path)


def test_what_flash_attention_takes_is_told_and_counted_unless_it_is_there(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = dataclasses.replace(plan, engine=EnginePlan(attention="flash_4"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, flash_attention.INSTALL_BYTES // 2))
    monkeypatch.setattr(flash_attention, "is_installed", lambda cache: False)
    with caplog.at_level("INFO"), pytest.raises(StorageError, match=r"CACHE_PATH.*FlashAttention 4: 420 MiB"):
        preflight(wanted, token=None, hub_cache=Path(wanted.output.cache))
    assert "To fetch: FlashAttention 4 with its compiler, 420 MiB." in caplog.messages
    caplog.clear()
    preflight(plan, token=None, hub_cache=Path(plan.output.cache))
    monkeypatch.setattr(flash_attention, "is_installed", lambda cache: str(cache) == wanted.output.cache)
    preflight(wanted, token=None, hub_cache=Path(wanted.output.cache))
    assert not [message for message in caplog.messages if "FlashAttention" in message]


def test_the_cache_needs_space_for_every_image_and_caption_variant(plan: Plan) -> None:
    """At 1024 px in bf16: 2 MiB of latents for each image variant, 4 MiB for the 512 tokens of each caption.

    FLUX.2 has latents of 32 channels, and three states of each of 512 tokens, dev's being 5,120 wide. Krea 2 keeps
    twelve states of 2,560 numbers of a token, and captions as long as they are: 160 tokens, say.
    """

    def needed(base: str = "flux", **keys: object) -> float:
        varied = dataclasses.replace(plan.data.datasets[0].subsets[0], **keys)
        data = DataPlan((Dataset((varied,), (1024, 1024)),))
        model = dataclasses.replace(plan.model, base=base)
        full = dataclasses.replace(plan, model=model, data=data, engine=EnginePlan(precision="bf16"))
        (encoded,) = _cache_bytes_per_image(full).values()
        return encoded / 2**20

    assert needed() == pytest.approx(2 + 4, rel=1e-3)
    assert [needed(f"flux2-{size}") for size in ("klein-4b", "klein-9b", "dev")] == [4 + 7.5, 4 + 12, 4 + 15]
    assert needed("krea2") == 2 + 160 * 12 * 2560 * 2 / 2**20
    assert needed(random_crop=True) == pytest.approx(8 * 2 + 4, rel=1e-3)
    assert needed(shuffle_caption=True, flip_aug=True) == pytest.approx(2 * 2 + 8 * 4, rel=1e-3)


def test_encoded_images_that_do_not_fit_are_encoded_part_by_part_on_one_machine(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "bytes_per_image", lambda *_, **__: 10**13)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 10**12))
    with caplog.at_level("INFO"):
        check(plan, tmp_path)
    assert "the job encodes them part by part" in caplog.text
    several = dataclasses.replace(plan, engine=dataclasses.replace(plan.engine, nodes=2))
    with pytest.raises(StorageError, match="encoded images"):
        check(several, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 10**8))  # not even room for a part
    with pytest.raises(StorageError, match="encoded images"):
        check(plan, tmp_path)


# --- pictures


def test_a_folder_that_is_not_there(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="DATASET_NAME=/nowhere"):
        check(with_source(plan, Source("folder", "/nowhere")), tmp_path)


def test_room_is_not_said_to_be_enough_where_a_size_is_unknown(
    plan: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"), pytest.raises(SettingsError):
        check(with_source(plan, Source("folder", "/nowhere")), tmp_path)
    assert " about " not in caplog.text
    (room,) = [message for message in caplog.messages if message.startswith("Room on")]
    assert "at least" in room and "and what could not be looked up" in room


def test_an_empty_folder(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image"):
        check(with_source(plan, Source("folder", str(tmp_path / "empty"))), tmp_path)


def test_a_folder_with_an_archive_alone(plan: Plan, tmp_path: Path) -> None:
    folder = tmp_path / "mount"
    folder.mkdir()
    (folder / "images.zip").write_bytes(b"x")
    with pytest.raises(DataError, match=r"only images\.zip\. Name the archive itself, .*/mount/images\.zip"):
        check(with_source(plan, Source("folder", str(folder))), tmp_path)


def test_an_archive_of_archives(plan: Plan, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as container:
        container.writestr("inner.zip", "x")
    with pytest.raises(DataError, match=r"only archives \(inner\.zip\)\. Unpack it"):
        check(with_source(plan, Source("archive", str(tmp_path / "a.zip"))), tmp_path)


def test_an_archive_without_pictures(plan: Plan, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as container:
        container.writestr("1.txt", "x")
    with pytest.raises(DataError, match="no image"):
        check(with_source(plan, Source("archive", str(tmp_path / "a.zip"))), tmp_path)


def test_images_of_formats_that_are_not_read_are_refused_before_anything_is_fetched(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "phone").mkdir()
    for name in ("IMG_1.HEIC", "IMG_2.heic", "clip.mov"):
        (tmp_path / "phone" / name).write_text("x")
    with pytest.raises(
        DataError, match=r"no image in it can be read\. IMG_1\.HEIC: format \.HEIC .*clip\.mov: a video"
    ):
        check(with_source(plan, Source("folder", str(tmp_path / "phone"))), tmp_path)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as container:
        container.writestr("IMG_1.HEIC", "x")
    with pytest.raises(DataError, match=r"no image among its first entries\. Read are \.jpg"):
        check(with_source(plan, Source("archive", str(tmp_path / "a.zip"))), tmp_path)


def test_a_folder_with_the_output_of_a_job_alone_is_empty(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "pictures_of_none"
    (out / "sample").mkdir(parents=True)
    for name in ("sample/step-00000002-00.png", "plan.json", "status.json"):
        (out / name).write_text("{}")
    with pytest.raises(DataError, match="there is no image in it"):
        check(with_source(plan, Source("folder", str(out))), tmp_path)


def test_a_dangerous_archive(plan: Plan, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as container:
        container.writestr("../1.png", "x")
    with pytest.raises(DataError, match="leads out"):
        check(with_source(plan, Source("archive", str(tmp_path / "a.zip"))), tmp_path)


def test_a_folder_source_becomes_absolute(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(images.parent)
    assert fetch_source(Source("folder", "pictures"), cache=tmp_path, token=None).path == str(images)


# --- models


def test_a_good_folder_is_taken_as_it_is(model: Path) -> None:
    done = fetch_model(ModelPlan("flux", "flux", str(model)), patterns=PATTERNS, token=None)
    assert done.path == str(model) and done.commit is None


def refuse(model: Path) -> str:
    with pytest.raises(SettingsError) as problem:
        fetch_model(ModelPlan("flux", "flux", str(model)), patterns=PATTERNS, token=None)
    assert "MODEL_PATH=" in str(problem.value)
    return str(problem.value)


def test_missing_parts_are_named_together(model: Path) -> None:
    shutil.rmtree(model / "vae")
    (model / "text_encoder" / "model.safetensors").unlink()
    assert "vae/ is missing" in refuse(model) and "text_encoder/ has no .safetensors" in refuse(model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.ckpt", "model.pt", "model.pth", "model.pkl"])
def test_pickles_alone_are_refused_unopened(model: Path, name: str) -> None:
    (model / "vae" / "model.safetensors").unlink()
    (model / "vae" / name).write_bytes(b"cos\nsystem\n(S'touch evil'\ntR.")
    assert f"vae/{name} is a pickle" in refuse(model) and not Path("evil").exists()


def test_pickles_beside_safetensors_do_not_matter(model: Path) -> None:
    (model / "vae" / "pytorch_model.bin").write_bytes(b"x")
    check_folder("MODEL_PATH=x", model, PATTERNS, FACTS)


def test_a_missing_shard_is_named(model: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "model-00001.safetensors", "b": "model.safetensors"}}
    (model / "transformer" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "transformer/model-00001.safetensors is missing" in refuse(model)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: data[:4],
        lambda data: b"",
        lambda data: (2**60).to_bytes(8, "little") + data[8:],
    ],
)
def test_damaged_weights_are_named(model: Path, damage: Callable[[bytes], bytes]) -> None:
    path = model / "vae" / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert "vae/model.safetensors is damaged" in refuse(model)


def test_a_single_file_and_no_folder(model: Path, tmp_path: Path) -> None:
    assert "single file" in refuse(model / "vae" / "model.safetensors")
    assert "there is no folder" in refuse(tmp_path / "nowhere")


def test_the_layout_is_judged_by_names_alone() -> None:
    assert problems(["a.safetensors"], PATTERNS) == [
        "it has no model_index.json, so it is not a model in the folder layout of diffusers; name its .safetensors "
        "files one by one: MODEL_PATH, VAE_PATH and the like"
    ]
    assert len(problems(["model_index.json"], PATTERNS)) == 7


def test_the_embedded_miniature_is_whole(tmp_path: Path) -> None:
    base = get_family("flux").FACTS.models["mini-flux"]
    if not Path(base.source).is_dir():
        pytest.skip("the miniature has not been made")
    fetch_model(ModelPlan("mini-flux", "flux", base.source), patterns=PATTERNS, token=None)


def test_every_error_has_an_exit_code() -> None:
    assert {k.exit_code for k in (SettingsError, DataError, StorageError)} == {78, 65, 74}
    assert all(issubclass(k, KilnError) for k in (SettingsError, DataError, StorageError))


# --- paths of every kind


@pytest.mark.parametrize("kind", ["folder", "archive"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/dev/zero", "a device"),
        ("fifo", "a FIFO"),
        ("round", "there is no"),
        ("x" * 300, "there is no"),
        ("/".join("d" * 1500), "there is no"),
        ("new\nline", "new\\nline"),
        ("caf\udce9", "caf\\udce9"),
    ],
)
def test_a_path_that_is_no_source_is_named_on_one_line(
    plan: Plan, tmp_path: Path, kind: str, name: str, said: str
) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(SettingsError) as caught:
        check(with_source(plan, Source(kind, str(tmp_path / name))), tmp_path)
    message = str(caught.value)
    assert said in message
    assert "DATASET_NAME=" in message and message.isprintable() and len(message) < 800


def test_an_archive_of_a_terabyte_is_refused_and_not_read(plan: Plan, tmp_path: Path) -> None:
    with (tmp_path / "a.zip").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match="the archive has more than 100"):
        check(with_source(plan, Source("archive", str(tmp_path / "a.zip"))), tmp_path)


def test_a_bucket_that_an_earlier_run_has_brought_is_listed_again(plan: Plan, tmp_path: Path, caplog: Any) -> None:
    quick = http.RetryPolicy(budget=0.2, first_wait=0.01, timeout=5.0)
    hub_cache = tmp_path / "volume" / "hf" / "hub"
    source = Source("bucket", "s3://mine/set")
    plan = with_source(plan, source)
    caplog.set_level("INFO")
    with Buckets() as server:
        server.objects["mine/set/a.png"] = b"a" * 1000
        keys = Keys(clouds=server.keys)
        preflight(plan, token=None, hub_cache=hub_cache, keys=keys, retries=quick)
        assert "To fetch: DATASET_NAME=s3://mine/set, 1 files" in caplog.text
        fetch_source(source, cache=Path(plan.output.cache), token=None, keys=keys, retries=quick)
        caplog.clear()
        preflight(plan, token=None, hub_cache=hub_cache, keys=keys, retries=quick)
        assert "To fetch: DATASET_NAME" not in caplog.text
        server.objects["mine/set/b.png"] = b"b" * 1000
        preflight(plan, token=None, hub_cache=hub_cache, keys=keys, retries=quick)
        assert "To fetch: DATASET_NAME=s3://mine/set, 2 files" in caplog.text
        revoked = Keys(clouds={**server.keys, "AWS_ACCESS_KEY_ID": "AKIAcAnaryOther12345"})
        preflight(plan, token=None, hub_cache=hub_cache, keys=revoked, retries=quick)
        assert "the key may not do this there" in caplog.text and "Using what was downloaded before" in caplog.text
