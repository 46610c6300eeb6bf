"""The real client of the Hub against a local stand-in: what is fetched, and what happens when the Hub fails."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save

from tests.support.hub import Hub, read_folder
from tests.support.hub_process import Done, Process
from trainer.spec.family import get_family

PATTERNS = get_family("flux").FACTS.files
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
QUICK = {"budget": 3.0, "first_wait": 0.05, "longest_wait": 0.2, "timeout": 2.0}
TOKEN = "hf_canaryTOKENcanary"


class Client:
    """Calls the entrypoint with caches of its own in `place`."""

    def __init__(self, process: Process, place: Path) -> None:
        self.process, self.place = process, place
        self.hub_cache = place / "hf" / "hub"

    def run(self, job: dict[str, Any]) -> Done:
        self.process.send(job)
        return self.process.receive()

    def job(self, call: str, token: str | None, **more: Any) -> dict[str, Any]:
        common = {"call": call, "token": token, "patience": QUICK, "hub_cache": str(self.hub_cache)}
        return {**common, **more}

    def model_job(self, token: str | None = None, **fields: Any) -> dict[str, Any]:
        return self.job("model", token, source="org/model", patterns=PATTERNS, fields=fields)

    def model(self, token: str | None = None, **fields: Any) -> Done:
        return self.run(self.model_job(token, **fields))

    def source(self, kind: str, source: str, token: str | None = None, **fields: Any) -> Done:
        cache = str(self.place / "cache")
        return self.run(self.job("source", token, kind=kind, source=source, cache=cache, fields=fields))

    def dataset(self, token: str | None = None, **fields: Any) -> Done:
        return self.source("hub", "org/pictures", token, **fields)


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with Hub() as running:
        yield running


@pytest.fixture
def hub(server: Hub) -> Iterator[Hub]:
    yield server
    server.reset()


@pytest.fixture(scope="module")
def process(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    running = Process(server.endpoint, tmp_path_factory.mktemp("home"))
    yield running
    running.kill()


@pytest.fixture
def new_process(server: Hub, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """More processes, for what one alone cannot show."""
    made: list[Process] = []

    def make(endpoint: str = server.endpoint) -> Process:
        made.append(Process(endpoint, tmp_path / "home"))
        return made[-1]

    yield make
    for one in made:
        one.kill()


@pytest.fixture
def client(hub: Hub, process: Process, tmp_path: Path) -> Client:
    return Client(process, tmp_path)


def image(seed: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def weights(size: int, seed: int = 0) -> bytes:
    """A safetensors file of about `size` bytes that do not compress."""
    return save({"weight": np.random.default_rng(seed).integers(0, 255, size, dtype=np.uint8)})


def model_files(size: int = 2000) -> dict[str, bytes]:
    """A repository with the configs and tokenizers of a real model, small weights, and files that nobody needs."""
    mini = read_folder(Path(get_family("flux").FACTS.models["mini-flux"].source))
    files = {name: data for name, data in mini.items() if not name.endswith(".safetensors")}
    files["transformer/config.json"] = b"{}"  # it may be of any size
    for seed, part in enumerate(("vae", "text_encoder", "text_encoder_2")):
        files[f"{part}/model.safetensors"] = weights(500, seed)
    files |= {"flux-dev.safetensors": weights(9000, 9), TRANSFORMER: weights(size, 5)}
    return {**files, "text_encoder/pytorch_model.bin": b"pickle", "README.md": b"# x"}


def simple_table(count: int, first: int = 0) -> bytes:
    """A parquet file as `datasets` writes it: pictures and their captions in the column text."""
    import datasets

    rows = [{"image": {"bytes": image(i), "path": None}, "text": f"caption {i}"} for i in range(first, first + count)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    buffer = io.BytesIO()
    datasets.Dataset.from_list(rows, features=features).to_parquet(buffer)
    return buffer.getvalue()


def captions(folder: str) -> dict[str, str | None]:
    lines = (Path(folder) / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["file_name"]: row.get("caption") for row in map(json.loads, lines)}


# --- models


def test_a_model_arrives_whole_and_without_what_is_not_needed(hub: Hub, client: Client) -> None:
    files = model_files()
    commit = hub.add("model", "org/model", files)
    done = client.model()
    assert done.code == 0 and done.data["commit"] == commit
    found = {
        str(p.relative_to(done.data["path"])): p.read_bytes() for p in Path(done.data["path"]).rglob("*") if p.is_file()
    }
    unneeded = ("flux-dev.safetensors", "text_encoder/pytorch_model.bin", "README.md")
    assert found == {name: data for name, data in files.items() if name not in unneeded}


def test_a_quantised_model_is_refused_before_its_weights_are_downloaded(hub: Hub, client: Client) -> None:
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    hub.add("model", "org/model", {**model_files(), "transformer/config.json": json.dumps(quantised).encode()})
    done = client.model()
    assert done.code == 78 and "transformer/config.json is quantised by bitsandbytes" in done.data["message"]
    assert hub.sent("/cdn/*") == 0


def test_the_client_of_the_hub_finds_what_was_brought(hub: Hub, client: Client) -> None:
    hub.add("model", "org/model", model_files())
    path = client.model().data["path"]
    hub.down = True
    code = "import sys, huggingface_hub as h; print(h.snapshot_download('org/model', cache_dir=sys.argv[1]), end='')"
    command = [sys.executable, "-c", code, str(client.hub_cache)]
    run = subprocess.run(command, env=client.process.environment, capture_output=True, text=True, check=True)
    assert run.stdout == path


def test_a_second_run_downloads_nothing(hub: Hub, client: Client) -> None:
    hub.add("model", "org/model", model_files())
    client.model()
    before = hub.sent("*/resolve/*") + hub.sent("/cdn/*")
    assert client.model().code == 0
    assert hub.sent("*/resolve/*") + hub.sent("/cdn/*") == before > 0


def test_a_pinned_commit_that_is_cached_needs_no_network(hub: Hub, client: Client) -> None:
    commit = hub.add("model", "org/model", model_files())
    client.model()
    hub.log.clear()
    assert client.model(commit=commit).data["commit"] == commit
    assert hub.log == []


def test_a_new_commit_brings_only_what_changed(hub: Hub, client: Client) -> None:
    files = model_files(400_000)
    hub.add("model", "org/model", files)
    client.model()
    before = hub.sent()
    commit = hub.add("model", "org/model", {**files, "vae/config.json": files["vae/config.json"] + b"\n"})
    assert client.model().data["commit"] == commit
    assert hub.sent() - before < 10_000


def test_the_token_goes_to_the_hub_and_to_no_other_host(hub: Hub, client: Client) -> None:
    hub.add("model", "org/model", model_files(), gated=True)
    hub.granted.add(TOKEN)
    assert client.model(token=TOKEN).code == 0
    assert all(a.authorized for a in hub.asked("/org/model/*")) and hub.asked("/org/model/*")
    assert not any(a.authorized for a in hub.asked("/cdn/*")) and hub.asked("/cdn/*")


@pytest.mark.parametrize(("token", "status"), [(None, 401), (TOKEN, 403)])
def test_a_gated_model_names_the_page_to_accept(hub: Hub, client: Client, token: str | None, status: int) -> None:
    hub.add("model", "org/model", model_files(), gated=True)
    hub.known_tokens.add(TOKEN)
    done = client.model(token=token)
    assert done.code == 77
    assert f"{hub.endpoint}/org/model" in done.data["message"] and "HF_TOKEN" in done.data["message"]
    assert str(status) in done.data["message"]
    assert any(a.status == status for a in hub.asked("/org/model/resolve/*"))


def test_an_invalid_token_is_told_as_such(hub: Hub, client: Client) -> None:
    hub.add("model", "org/model", model_files())
    done = client.model(token=TOKEN)
    assert done.code == 77 and "HF_TOKEN" in done.data["message"] and "expired" in done.data["message"]


@pytest.mark.parametrize(("token", "status"), [(None, 401), (TOKEN, 404)])
def test_a_repository_that_does_not_exist(hub: Hub, client: Client, token: str | None, status: int) -> None:
    hub.known_tokens.add(TOKEN)
    done = client.model(token=token)
    assert done.code == 78
    assert all(word in done.data["message"] for word in ("MODEL_PATH=org/model", "spelling", "private", "HF_TOKEN"))
    assert [a.status for a in hub.log] == [status]


def test_a_revision_that_does_not_exist(hub: Hub, client: Client) -> None:
    hub.add("model", "org/model", model_files())
    done = client.model(revision="v9")
    assert done.code == 78 and "MODEL_REVISION=v9" in done.data["message"]


def test_a_revision_is_resolved_to_its_commit(hub: Hub, client: Client) -> None:
    hub.add("model", "org/model", model_files(3000))
    tagged = hub.add("model", "org/model", model_files(4000), ref="v1.0")
    assert client.model(revision="v1.0").data["commit"] == tagged


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_index.json": None}, "model_index.json"),
        ({"vae/config.json": None, "vae/model.safetensors": None}, "vae/"),
        ({"vae/model.safetensors": None, "vae/diffusion_pytorch_model.bin": b"x"}, "pickle"),
    ],
)
def test_an_unfit_model_is_refused_before_it_is_downloaded(
    hub: Hub, client: Client, change: dict[str, bytes | None], told: str
) -> None:
    files = {k: v for k, v in {**model_files(), **change}.items() if v is not None}
    hub.add("model", "org/model", files)
    done = client.model()
    assert done.code == 78 and told in done.data["message"]
    assert hub.asked("*/resolve/*") == []


# --- faults


def test_a_download_that_is_cut_goes_on_where_it_was(hub: Hub, client: Client) -> None:
    files = model_files(3_000_000)
    hub.add("model", "org/model", files)
    cut = hub.fault("/cdn/*", cut_at=2_000_000, times=4)  # four large files, of which one is that long
    done = client.model()
    assert done.code == 0 and cut.fired == 4
    assert (Path(done.data["path"]) / TRANSFORMER).read_bytes() == files[TRANSFORMER]
    assert hub.sent("/cdn/*") <= 1.1 * sum(len(v) for k, v in files.items() if k.endswith(".safetensors"))
    assert any(a.status == 206 for a in hub.asked("/cdn/*"))


def test_a_download_whose_process_is_killed_goes_on_in_the_next(
    hub: Hub, client: Client, new_process: Callable[..., Process]
) -> None:
    files = model_files(5_000_000)
    hub.add("model", "org/model", files)
    stall = hub.fault(cdn(files[TRANSFORMER]), stall_at=4_750_000)
    doomed = new_process()
    doomed.send(client.model_job())
    assert stall.reached.wait(60)
    part = wait_for_part(client.place, 4_700_000)
    doomed.kill()
    assert part.stat().st_size >= 4_700_000 and stall.fired == 1
    done = client.model()
    assert done.code == 0 and (Path(done.data["path"]) / TRANSFORMER).read_bytes() == files[TRANSFORMER]
    assert hub.sent(cdn(files[TRANSFORMER])) <= 1.1 * len(files[TRANSFORMER])


def cdn(data: bytes) -> str:
    return f"/cdn/{hashlib.sha256(data).hexdigest()}"


def wait_for_part(place: Path, size: int) -> Path:
    """The file that the client is writing, once it has `size` bytes: what was sent may still be on its way."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for part in place.rglob("*.part"):
            if part.stat().st_size >= size:
                return part
        time.sleep(0.01)
    raise AssertionError("the client has not written what it was sent")


def test_a_stall_is_ended_and_the_download_goes_on(hub: Hub, client: Client) -> None:
    files = model_files(1_000_000)
    hub.add("model", "org/model", files)
    stall = hub.fault(cdn(files[TRANSFORMER]), stall_at=500_000)
    done = client.model()
    assert done.code == 0 and stall.fired == 1
    assert hub.sent(cdn(files[TRANSFORMER])) <= 1.1 * len(files[TRANSFORMER])


def test_one_wrong_byte_is_found_and_the_file_brought_again(hub: Hub, client: Client) -> None:
    files = model_files(300_000)
    hub.add("model", "org/model", files)
    flip = hub.fault(cdn(files[TRANSFORMER]), flip_at=200_000)
    done = client.model()
    assert done.code == 0 and flip.fired == 1 and "not the announced one" in done.log
    assert (Path(done.data["path"]) / TRANSFORMER).read_bytes() == files[TRANSFORMER]


def test_a_small_file_is_verified_too(hub: Hub, client: Client) -> None:
    hub.add("model", "org/model", model_files())
    flip = hub.fault("*/model_index.json", flip_at=3)
    assert client.model().code == 0
    assert flip.fired == 1 and len(hub.asked("*/model_index.json")) == 2


def test_a_file_that_stays_wrong_is_refused_and_deleted(hub: Hub, client: Client) -> None:
    files = model_files(300_000)
    hub.add("model", "org/model", files)
    flip = hub.fault(cdn(files[TRANSFORMER]), flip_at=200_000, times=99)
    done = client.model()
    assert done.code == 75 and flip.fired == 2 and TRANSFORMER in done.data["message"]
    kept = [p for p in client.place.rglob("*") if p.is_file() and p.stat().st_size >= 300_000]
    assert kept == []


def test_a_blob_that_another_tool_left_damaged_is_brought_again(hub: Hub, client: Client) -> None:
    files = model_files(300_000)
    hub.add("model", "org/model", files)
    path = Path(client.model().data["path"]) / TRANSFORMER
    blob = path.resolve()
    blob.write_bytes(files[TRANSFORMER][:-1] + b"?")
    done = client.model()
    assert done.code == 0 and path.read_bytes() == files[TRANSFORMER] and "damaged" in done.log


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429, 408])
def test_passing_failures_are_retried(hub: Hub, client: Client, status: int) -> None:
    hub.add("model", "org/model", model_files())
    fault = hub.fault("/api/models/*", status=status, times=2)
    assert client.model().code == 0
    assert fault.fired == 2


def test_failures_of_files_are_retried(hub: Hub, client: Client) -> None:
    hub.add("model", "org/model", model_files())
    fault, other = hub.fault("/cdn/*", status=503, times=3), hub.fault("*/resolve/*", status=500, times=3)
    assert client.model().code == 0
    assert (fault.fired, other.fired) == (3, 3)


def test_retry_after_is_respected(hub: Hub, client: Client) -> None:
    hub.add("model", "org/model", model_files())
    fault = hub.fault("/api/models/*", status=429, headers={"Retry-After": "2"})
    began = time.monotonic()
    assert client.model().code == 0
    assert fault.fired == 1 and time.monotonic() - began >= 2


def test_a_longer_wait_than_the_patience_ends_at_once(hub: Hub, client: Client) -> None:
    hub.add("model", "org/model", model_files())
    fault = hub.fault("/api/models/*", status=429, headers={"Retry-After": "900"}, times=99)
    done = client.model()
    assert done.code == 75 and fault.fired == 1 and "900 s" in done.data["message"]


def test_an_outage_ends_with_75_after_growing_waits(hub: Hub, client: Client) -> None:
    hub.add("model", "org/model", model_files())
    hub.down = True
    done = client.model()
    assert done.code == 75 and hub.endpoint in done.data["message"]
    assert 5 <= len(hub.log) <= 60


def test_nobody_listening_ends_with_75(client: Client, new_process: Callable[..., Process]) -> None:
    done = Client(new_process("http://127.0.0.1:9"), client.place).model()
    assert done.code == 75 and "ConnectError" in done.data["message"]


def test_an_outage_with_everything_cached_does_not_matter(hub: Hub, client: Client) -> None:
    commit = hub.add("model", "org/model", model_files())
    first = client.model()
    hub.down = True
    done = client.model()
    assert done.code == 0 and done.data == first.data and done.data["commit"] == commit
    assert "using that" in done.log and any(a.status == 503 for a in hub.log)


def test_an_outage_with_half_a_cache_matters(hub: Hub, client: Client) -> None:
    hub.add("model", "org/model", model_files())
    path = Path(client.model().data["path"]) / TRANSFORMER
    path.resolve().unlink()
    hub.down = True
    assert client.model().code == 75


def test_a_whole_cache_may_be_read_only(hub: Hub, client: Client) -> None:
    hub.add("model", "org/model", model_files())
    first = client.model()
    lock = next(client.hub_cache.rglob("kiln/lock"))
    lock.unlink()
    lock.mkdir()  # even root cannot open that for writing
    assert client.model().data == first.data


def test_a_cache_that_was_copied_serves_in_an_outage(hub: Hub, client: Client) -> None:
    hub.add("model", "org/model", model_files())
    path = Path(client.model().data["path"])
    for file in path.rglob("*"):
        os.utime(file)
    hub.down = True
    assert client.model().data["path"] == str(path)


def test_two_processes_share_a_cache(hub: Hub, client: Client, new_process: Callable[..., Process]) -> None:
    files = model_files(2_000_000)
    hub.add("model", "org/model", files)
    both = [new_process(), new_process()]
    for process in both:
        process.send(client.model_job())
    assert [process.receive().code for process in both] == [0, 0]
    assert hub.sent(cdn(files[TRANSFORMER])) == len(files[TRANSFORMER])


# --- datasets


def test_a_parquet_dataset_becomes_a_folder_of_untouched_pictures(hub: Hub, client: Client) -> None:
    commit = hub.add(
        "dataset", "org/pictures", {"data/train-00000-of-00001.parquet": simple_table(3), "README.md": b"# x"}
    )
    done = client.dataset()
    assert done.code == 0 and done.data["commit"] == commit, done
    folder = Path(done.data["path"])
    assert [(folder / f"{i:06d}.png").read_bytes() for i in range(3)] == [image(i) for i in range(3)]
    assert captions(str(folder)) == {f"{i:06d}.png": f"caption {i}" for i in range(3)}


def test_a_dataset_is_unpacked_once(hub: Hub, client: Client) -> None:
    hub.add("dataset", "org/pictures", {"data/train-00000-of-00001.parquet": simple_table(2)})
    first = client.dataset()
    stamp = Path(first.data["path"]).stat().st_mtime_ns
    before = hub.sent("*/resolve/*")
    again = client.dataset()
    assert again.data == first.data and hub.sent("*/resolve/*") == before
    assert Path(again.data["path"]).stat().st_mtime_ns == stamp


def test_a_dataset_that_lost_a_file_is_unpacked_again(hub: Hub, client: Client) -> None:
    hub.add("dataset", "org/pictures", {"data/train-00000-of-00001.parquet": simple_table(2)})
    lost = Path(client.dataset().data["path"]) / "000001.png"
    lost.write_bytes(b"")
    assert client.dataset().code == 0 and lost.read_bytes() == image(1)


def test_the_split_chooses(hub: Hub, client: Client) -> None:
    files = {
        "data/train-00000-of-00001.parquet": simple_table(2),
        "data/test-00000-of-00001.parquet": simple_table(1, 7),
    }
    hub.add("dataset", "org/pictures", files)
    assert list(captions(client.dataset(split="test").data["path"]).values()) == ["caption 7"]
    done = client.dataset(split="validation")
    assert (
        done.code == 78 and "DATASET_SPLIT=validation" in done.data["message"] and "train, test" in done.data["message"]
    )


def test_the_revision_of_a_dataset_chooses(hub: Hub, client: Client) -> None:
    hub.add("dataset", "org/pictures", {"data/train-00000-of-00001.parquet": simple_table(1)})
    commit = hub.add("dataset", "org/pictures", {"data/train-00000-of-00001.parquet": simple_table(1, 5)}, ref="v2")
    done = client.dataset(revision="v2")
    assert done.data["commit"] == commit and list(captions(done.data["path"]).values()) == ["caption 5"]
    assert client.dataset(revision="v3").data["message"].startswith("DATASET_REVISION=v3")


def test_an_image_folder_with_metadata(hub: Hub, client: Client) -> None:
    files = {f"train/{i}.png": image(i) for i in range(3)}
    lines = [json.dumps({"file_name": f"{i}.png", "prompt": f"p{i}"}) for i in range(2)]
    hub.add("dataset", "org/pictures", {**files, "train/metadata.jsonl": "\n".join(lines).encode()})
    done = client.dataset()
    assert captions(done.data["path"]) == {"000000.png": "p0", "000001.png": "p1"}
    assert (Path(done.data["path"]) / "000001.png").read_bytes() == image(1)
    assert "images that its metadata does not list are not used: train/2.png." in done.log


def test_a_name_without_an_owner_is_asked_for_once(hub: Hub, client: Client) -> None:
    hub.add("dataset", "mnist", {"train.parquet": simple_table(1)})
    assert client.source("hub", "mnist").code == 0
    hub.down = True
    done = client.source("hub", "photos")
    assert done.code == 78 and "there is no folder photos in" in done.data["message"]
    assert "or a dataset as owner/name" in done.data["message"] and len(hub.asked("/api/datasets/photos")) == 1


def test_a_dataset_that_is_not_there_may_be_a_folder_that_is_not_there(hub: Hub, client: Client) -> None:
    message = client.source("hub", "photos/cats").data["message"]
    assert (
        "knows no dataset photos/cats" in message and "If a folder was meant: there is no folder photos in" in message
    )


def test_a_subset_is_chosen_and_what_takes_no_part_is_logged(hub: Hub, client: Client) -> None:
    card = "---\nconfigs:\n- {config_name: a, data_files: a.parquet}\n- {config_name: b, data_files: b.parquet}\n---\n"
    files = {"a.parquet": simple_table(1), "b.parquet": simple_table(1, 5), "notes.pdf": b"x"}
    hub.add("dataset", "org/pictures", {"README.md": card.encode(), **files})
    assert "several subsets and no default one: a, b" in client.dataset().data["message"]
    for _ in range(2):  # the second finds the folder of the first, and says the same
        done = client.dataset(subset="b")
        assert list(captions(done.data["path"]).values()) == ["caption 5"]
        assert "subset b; images from the column image; captions from text; files not used: notes.pdf" in done.log


def test_pictures_with_caption_files(hub: Hub, client: Client) -> None:
    files = {
        "a/x.png": image(1),
        "a/x.txt": b"an x",
        "y.png": image(2),
        "y.txt": b"a y",
        "notes.txt": b"no caption",
    }
    hub.add("dataset", "org/pictures", files)
    folder = Path(client.dataset().data["path"])
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("[!.]*") if p.is_file()}
    assert found == {k: v for k, v in files.items() if k != "notes.txt"}
    assert not any(p.is_symlink() for p in folder.rglob("*"))


def test_a_dataset_with_a_script_is_refused(hub: Hub, client: Client) -> None:
    hub.add("dataset", "org/pictures", {"pictures.py": b"import os", "train.parquet": simple_table(1)})
    done = client.dataset()
    assert done.code == 78 and "script" in done.data["message"] and "refs/convert/parquet" in done.data["message"]


def test_a_dataset_without_pictures_is_refused(hub: Hub, client: Client) -> None:
    hub.add("dataset", "org/pictures", {"train.csv": b"a,b\n1,2\n"})
    done = client.dataset()
    assert done.code == 65 and ".csv" in done.data["message"] and hub.asked("*/resolve/*") == []


def test_a_gated_dataset_names_its_page(hub: Hub, client: Client) -> None:
    hub.add("dataset", "org/pictures", {"train.parquet": simple_table(1)}, gated=True)
    done = client.dataset()
    assert done.code == 77 and f"{hub.endpoint}/datasets/org/pictures" in done.data["message"]
    hub.granted.add(TOKEN)
    assert client.dataset(token=TOKEN).code == 0


def test_a_dataset_that_does_not_exist(hub: Hub, client: Client) -> None:
    done = client.dataset()
    assert done.code == 78 and "DATASET_NAME=org/pictures" in done.data["message"]


def test_an_outage_with_an_unpacked_dataset_does_not_matter(hub: Hub, client: Client) -> None:
    hub.add("dataset", "org/pictures", {"train.parquet": simple_table(1)})
    first = client.dataset()
    hub.down = True
    assert client.dataset().data == first.data


# --- archives with an address


def zipped(count: int, size: int = 0) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as container:
        for i in range(count):
            container.writestr(f"pictures/{i}.png", image(i))
        container.writestr("pictures/filling.bin", np.random.default_rng(1).bytes(size))
    return buffer.getvalue()


def test_an_archive_with_an_address_is_downloaded_once(hub: Hub, client: Client) -> None:
    hub.plain["/files/p.zip"] = zipped(2)
    address = f"{hub.endpoint}/files/p.zip?secret=s3cret"
    done = client.source("archive", address)
    assert done.code == 0 and "s3cret" not in done.log
    assert sorted(p.name for p in Path(done.data["path"]).glob("*.png")) == ["0.png", "1.png"]
    before = hub.sent()
    assert client.source("archive", address).data == done.data and hub.sent() - before <= 1
    hub.plain["/files/p.zip"] = zipped(3)
    assert len(list(Path(client.source("archive", address).data["path"]).glob("*.png"))) == 3
    hub.down = True
    assert client.source("archive", address).code == 0


def test_an_archive_that_is_cut_goes_on(hub: Hub, client: Client) -> None:
    hub.plain["/files/p.zip"] = zipped(1, 2_000_000)
    cut = hub.fault("/files/p.zip", cut_at=1_500_000, times=2)  # the first is the question for its size
    assert client.source("archive", f"{hub.endpoint}/files/p.zip").code == 0
    assert cut.fired == 2 and hub.sent() <= 1.1 * len(hub.plain["/files/p.zip"])


@pytest.mark.parametrize(("status", "code"), [(401, 77), (403, 77), (404, 78), (410, 78)])  # 77: a key is missing
def test_an_address_that_refuses(hub: Hub, client: Client, status: int, code: int) -> None:
    hub.fault("/files/p.zip", status=status)
    done = client.source("archive", f"{hub.endpoint}/files/p.zip?secret=s3cret")
    assert done.code == code and str(status) in done.data["message"] and "s3cret" not in done.data["message"] + done.log


def test_the_token_is_not_sent_to_other_places(hub: Hub, client: Client) -> None:
    hub.plain["/files/p.zip"] = zipped(1)
    assert client.source("archive", f"http://localhost:{hub.port}/files/p.zip", token=TOKEN).code == 0
    assert hub.asked("/files/*") and not any(a.authorized for a in hub.asked("/files/*"))


# --- preflight


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def make(**model: Any) -> dict[str, Any]:
        from trainer.spec import plan as plans

        folder = tmp_path / "pictures"
        folder.mkdir(exist_ok=True)
        (folder / "1.png").write_bytes(image(1))
        source = plans.Source("hub", "org/pictures")
        subsets = (plans.Subset(source), plans.Subset(plans.Source("folder", str(folder))))
        made = plans.Plan(
            model=plans.ModelPlan(**{"base": "flux", "family": "flux", "source": "org/model", **model}),
            data=plans.DataPlan((plans.Dataset(subsets, (64, 64)),)),
            lora=plans.LoraPlan(),
            optim=plans.OptimPlan(),
            train=plans.TrainPlan(),
            engine=plans.EnginePlan(),
            output=plans.OutputPlan(str(tmp_path / "out"), "x", str(tmp_path / "cache")),
        )
        return json.loads(made.to_json())

    return make


def check(client: Client, plan: dict[str, Any], token: str | None = None) -> Done:
    return client.run(client.job("preflight", token, plan=plan))


def test_preflight_asks_for_access_and_downloads_nothing(hub: Hub, client: Client, plan: Callable[..., dict]) -> None:
    hub.add("model", "org/model", model_files(500_000))
    hub.add("dataset", "org/pictures", {"train.parquet": simple_table(1)})
    done = check(client, plan())
    assert done.code == 0, done
    assert hub.sent("*/resolve/*") == hub.sent("/cdn/*") == 0


def test_preflight_tells_all_that_is_wrong_at_once(hub: Hub, client: Client, plan: Callable[..., dict]) -> None:
    hub.add("model", "org/model", model_files(), gated=True)
    done = check(client, plan())
    assert done.code == 78  # the dataset does not exist: only the user can mend that
    assert "DATASET_NAME=org/pictures" in done.data["message"] and "guards org/model" in done.data["message"]


def test_preflight_needs_no_network_when_all_is_cached(hub: Hub, client: Client, plan: Callable[..., dict]) -> None:
    hub.add("model", "org/model", model_files())
    hub.add("dataset", "org/pictures", {"train.parquet": simple_table(1)})
    assert (client.model().code, client.dataset().code) == (0, 0)
    hub.log.clear()
    assert check(client, plan()).code == 0 and hub.log == []


def test_preflight_ends_with_75_in_an_outage(hub: Hub, client: Client, plan: Callable[..., dict]) -> None:
    hub.down = True
    assert check(client, plan()).code == 75
