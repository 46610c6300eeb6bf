"""The first argument of the container, and its health check."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from entrypoint import __main__ as entrypoint
from entrypoint import bake, health, job
from entrypoint.runpod import __main__ as runpod
from tests.support.drawings import draw

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "check"),
    [
        *(([], False), (["train"], False), (["check"], True), (["--check"], True), (["train", "--check"], True)),
        (["--gpu", "RTX 4090"], True),  # nothing can be trained on a card that is not here
    ],
)
def test_the_first_argument_chooses(monkeypatch, arguments, check):
    asked = []
    monkeypatch.setattr(entrypoint, "job", lambda _environ, *, check, **_others: asked.append(check) or 0)
    assert entrypoint.main(arguments) == 0
    assert asked == [check]


@pytest.fixture
def photographs(monkeypatch, tmp_path):
    """The variables of a job for Flux.1 on two images."""
    for i in range(2):
        draw(64, 64, seed=i).save(tmp_path / f"{i}.png")
    (tmp_path / "model").mkdir()
    names = {"BASE_MODEL": "flux", "DATASET_NAME": str(tmp_path), "MODEL_PATH": str(tmp_path / "model")}
    names |= {"OUTPUT_PATH": str(tmp_path / "out"), "CACHE_PATH": str(tmp_path / "cache")}
    for name, value in names.items():
        monkeypatch.setenv(name, value)


def test_a_card_that_is_not_here_is_planned_for(photographs, caplog):
    with caplog.at_level("INFO"):
        assert entrypoint.main(["--check", "--gpu", "RTX 4090"]) == 78  # for the model's folder is empty
    assert "1 × nvidia 8.9, 24 GiB" in caplog.text and "Images: 2 found" in caplog.text
    assert "MODEL_PATH" in caplog.text and "No GPU answers" not in caplog.text


def printed_report(capsys, *arguments):
    code = entrypoint.main([*arguments, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["exit_code"] == code and report["ok"] == (code == 0)
    return report


def test_a_check_quotes_time_and_money(photographs, monkeypatch, capsys, caplog):
    caplog.set_level("INFO")
    monkeypatch.setenv("PRICE_PER_HOUR", "0.6")
    monkeypatch.setenv("MAX_COST", "0.1")
    report = printed_report(capsys, "--check", "--gpu", "RTX 4090")
    job, quote = report["job"], report["job"]["quote"]
    assert quote["card"] == "RTX 4090" and not quote["is_measured"]
    assert quote["seconds"] > job["steps"] * quote["step_seconds"] > 60
    assert quote["cost"] == pytest.approx(0.6 * quote["seconds"] / 3600, abs=0.006)
    assert any(f"Quote, predicted for RTX 4090: {job['steps']:,} steps at" in line for line in report["messages"])
    assert any(line.startswith("MAX_COST=0.1 at PRICE_PER_HOUR=0.6 ends this job") for line in report["warnings"])


def test_a_check_can_be_read_by_a_program(photographs, monkeypatch, capsys, caplog):
    caplog.set_level("INFO")
    report = printed_report(capsys, "check", "--gpu", "RTX 4090")
    assert report["exit_code"] == 78 and "MODEL_PATH" in report["errors"][0]
    assert report["job"]["images"] == {"found": 2, "used": 2, "to_caption": 0} and report["job"]["steps"] == 1000
    assert report["plan"]["model"]["base"] == "flux" and report["plan"]["engine"]["device"] == "cuda"
    assert any(line.startswith("PARAMS_PRECISION: ") for line in report["messages"])
    monkeypatch.setenv("BASE_MODEL", "mini-flux")
    monkeypatch.delenv("MODEL_PATH")
    report = printed_report(capsys, "--check", "--gpu", "RTX 4090")
    assert report["ok"] and not report["errors"] and report["job"]["shapes"][0]["examples"] == 2


def test_what_stops_a_check_is_in_its_report_and_no_secret(photographs, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_canary0123456789")
    monkeypatch.setenv("DATASET_NAME", "https://example.invalid/x.zip?token=canary-key")
    monkeypatch.setenv("PARAMS_NETWORK_DIM", "many")
    report = printed_report(capsys, "--check")
    assert report["plan"] is None and report["job"] is None and "PARAMS_NETWORK_DIM='many'" in report["errors"][0]
    monkeypatch.delenv("PARAMS_NETWORK_DIM")
    monkeypatch.setattr(job, "CHECK_RETRIES_S", 0.0)
    report = printed_report(capsys, "--check")
    assert report["errors"] and report["plan"]["model"]["base"] == "flux" and "canary" not in json.dumps(report)


def test_json_belongs_to_what_prints_something(photographs, capsys):
    assert entrypoint.main(["--json"]) == 64
    assert "--check or --help-env" in capsys.readouterr().err
    assert entrypoint.main(["--help-env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["BASE_MODEL"]["enum"]


@pytest.mark.parametrize(("card", "message"), [("RTX 4091", "did you mean"), ("GTX 1080 Ti", "no kernels")])
def test_a_card_that_cannot_train_is_refused(photographs, caplog, card, message):
    assert entrypoint.main(["--check", "--gpu", card]) == 78
    assert message in caplog.text


@pytest.mark.parametrize("arguments", [["trian"], ["check", "more"]])
def test_an_unknown_command_is_a_wrong_command_line(monkeypatch, capsys, arguments):
    monkeypatch.setattr(entrypoint, "job", lambda *_arguments, **_others: pytest.fail("it ran"))
    assert entrypoint.main(arguments) == 64
    assert "train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "program"),
    [
        (["shell", "-c", "id --user"], ("bash", "-c", "id --user")),
        (["sample", "--help"], (sys.executable, "-m", "trainer.sample", "--help")),
        (["export", "x", "--out", "y"], (sys.executable, "-m", "trainer.export", "x", "--out", "y")),
    ],
)
def test_some_replace_the_process(monkeypatch, arguments, program):
    class Replaced(BaseException):
        pass

    def exec_(file, arguments, _environment):
        raise Replaced(file, *arguments)

    monkeypatch.setattr(os, "execvpe", exec_)
    with pytest.raises(Replaced) as found:
        entrypoint.main(arguments)
    assert found.value.args == (program[0], *program)


@pytest.mark.parametrize(
    ("status", "ill"),
    [
        ({}, False),
        ({"phase": "training", "updated": 99_000.0}, False),  # 16 minutes ago
        ({"phase": "training", "updated": 98_000.0}, True),  # 33 minutes ago
        ({"phase": "encoding", "updated": 98_000.0}, False),
        ({"phase": "done", "updated": 98_000.0}, False),
        ({"phase": "training", "updated": 50_000.0}, False),  # left by the run before this container
        ({"phase": "training", "updated": "?"}, False),
    ],
)
def test_training_that_stands_still_is_unhealthy(status, ill):
    assert bool(health.stalled(status, now=100_000.0, began=90_000.0, patience_min=30)) is ill


def test_health_reads_the_status_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUTPUT_PATH", str(tmp_path))
    monkeypatch.setattr(health, "_began", lambda: 0.0)
    assert health.main() == 0
    (tmp_path / "status.json").write_text(json.dumps({"phase": "training", "updated": 1000.0}))
    assert health.main() == 1 and "No step for" in capsys.readouterr().out
    (tmp_path / "status.json").write_text("{")
    assert health.main() == 0


@pytest.mark.parametrize("patience", ["abc", "1,5", "nan", "inf", "-1", "0", "1e999", "9" * 5000])
def test_a_patience_that_is_no_time_is_refused(tmp_path, monkeypatch, capsys, patience):
    monkeypatch.setenv("OUTPUT_PATH", str(tmp_path))
    monkeypatch.setenv("HEALTH_PATIENCE_MINUTES", patience)
    assert health.main() == 78
    assert "is not a number of minutes above 0. Fix: HEALTH_PATIENCE_MINUTES=30." in capsys.readouterr().out


ODD_STATUS = [
    *("", "[", "[]", "null", "[" * 100_000, '{"phase": ["training"], "updated": true}', '{"phase": "training"}'),
    *(f'{{"phase": "training", "updated": {number}}}' for number in ("1" + "0" * 400, "-1e400", "1e400", "NaN", '"x"')),
]


@pytest.mark.parametrize("text", ODD_STATUS, ids=lambda text: text[:40])
def test_an_odd_status_is_no_stall(tmp_path, monkeypatch, text):
    monkeypatch.setenv("OUTPUT_PATH", str(tmp_path))
    monkeypatch.setattr(health, "_began", lambda: 0.0)
    (tmp_path / "status.json").write_text(text)
    assert health.main() == 0


@pytest.mark.parametrize("place", ["a" * 300, "/dev/full", "{tmp}/fifo", "~", "~nobody/x", "\udcff", " "])
def test_an_output_that_is_none_is_no_stall(tmp_path, monkeypatch, place):
    (tmp_path / "fifo").mkdir()
    os.mkfifo(tmp_path / "fifo" / "status.json")
    monkeypatch.setenv("OUTPUT_PATH", place.replace("{tmp}", str(tmp_path)))
    assert health.main() == 0


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["now"], 64), (["--nope"], 64), (["\0"], 64)])
def test_the_health_check_takes_no_arguments(arguments, code):
    assert health.main(arguments) == code


TO_NOWHERE = [  # commands that answer with text alone, and their exit codes with the three kinds of streams
    (["entrypoint.health"], [0, 0, 0]),
    (["entrypoint.health", "now"], [64, 64, 64]),
    (["entrypoint", "--help-env"], [74, 0, 0]),  # its text is its result, unless nobody wants it
    (["entrypoint", "--check", "--json"], [78, 78, 78]),  # a refusal stays one
    (["trainer.export", "--help"], [0, 0, 0]),
]


@pytest.mark.parametrize(("words", "codes"), TO_NOWHERE, ids=lambda value: str(value))
def test_an_answer_that_can_be_printed_nowhere_has_a_documented_exit_code(words, codes):
    """To a full disk; to a reader that has gone; with both streams closed, as a daemon has them."""
    script = """
import os, runpy, sys
reader, writer = os.pipe()
os.close(reader)
codes = []
for place in (os.open("/dev/full", os.O_WRONLY), writer, None):
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.close(stream) if place is None else os.dup2(place, stream)
        os.execv(sys.executable, [sys.executable, "-m", *sys.argv[1:]])
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(codes)
"""
    done = subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (f"{codes}\n", "")


def test_json_of_a_check_that_is_lost_is_no_success(tmp_path):
    """Whoever reads it would take the code for the answer."""
    draw(64, 64, seed=1).save(tmp_path / "a.png")
    environ = {"PATH": os.environ["PATH"], "BASE_MODEL": "mini-flux", "DATASET_NAME": str(tmp_path)}
    for name in ("OUTPUT_PATH", "CACHE_PATH", "HF_HOME"):
        environ[name] = str(tmp_path / name.lower())
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "entrypoint", "--check", "--json"]
        done = subprocess.run(command, cwd=ROOT, env=environ, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 74
    assert "Checked: this job can run" in done.stderr


def test_a_place_for_temporary_files_that_cannot_be_is_named(tmp_path):
    """No file may be larger than 8 KiB here, so that no place works, the cache included."""
    script = "; ".join(
        (
            "import resource, sys",
            "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))",
            "from entrypoint.__main__ import main",
            "sys.exit(main(['--check']))",
        )
    )
    environ = {"PATH": os.environ["PATH"], "BASE_MODEL": "mini-flux", "DATASET_NAME": str(tmp_path)}
    environ |= {"CACHE_PATH": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 74, done.stderr
    assert "Temporary files can be written nowhere: File too large" in done.stderr and "ulimit" in done.stderr
    assert "Traceback" not in done.stderr


BAKE = [
    ([], 64, "usage:"),
    (["--help"], 0, ""),
    (["flux"], 64, "usage:"),
    (["flux", "a", "b", "c"], 64, "usage:"),
    (["flux", "\0"], 64, "null byte"),
    (["", "{tmp}/new"], 78, "allowed are tokenizers"),
    (["\x1b[31m", "{tmp}/new"], 78, "allowed are tokenizers"),
    (["flux", "a" * 300], 74, "cannot be made: File name too long"),
    (["tokenizers", "a" * 300], 74, "cannot be made: File name too long"),
    (["flux", "/dev/null"], 74, "cannot be made"),
    (["tokenizers", "{tmp}/fifo"], 74, "cannot be made"),
    (["flux", "{tmp}/new", "{tmp}/fifo"], 74, "cannot be made"),
    (["flux", "/proc/x"], 74, "cannot be made"),
]


@pytest.mark.parametrize(("arguments", "code", "words"), BAKE, ids=lambda value: str(value)[:60])
def test_bake_ends_with_a_documented_exit_code_before_it_downloads(
    tmp_path, monkeypatch, caplog, capsys, arguments, code, words
):
    monkeypatch.setattr(bake, "fetch_model", lambda *_, **__: pytest.fail("it downloads"))
    os.mkfifo(tmp_path / "fifo")
    assert bake.main([argument.replace("{tmp}", str(tmp_path)) for argument in arguments]) == code
    said = caplog.text + capsys.readouterr().err
    assert words in said and "Traceback" not in said


@pytest.mark.parametrize("kind", ["folder", "fifo", "bytes", "device"])
def test_a_build_secret_that_is_no_token_is_named(tmp_path, monkeypatch, caplog, kind):
    place = tmp_path / "token"
    if kind == "folder":
        place.mkdir()
    elif kind == "fifo":
        os.mkfifo(place)
    elif kind == "bytes":
        place.write_bytes(b"\xff\xfe")
    else:
        place.symlink_to("/dev/zero")
    monkeypatch.setattr(bake, "TOKEN", place)
    assert bake.main(["flux", str(tmp_path / "new")]) == 78
    assert "HF_TOKEN_FILE" in caplog.text


RUNPOD_ODD = [
    *(["status", odd] for odd in ("", "../../x", "a b", "\udcff", "\0", "a" * 300, "?x=1")),
    *(["logs", "x", "--tail", odd] for odd in ("-5", "abc", "9" * 5000, "nan", "")),
    *(["gpus", "--count", odd] for odd in ("0", "-1", "1.5", "9" * 30)),
    *(["deploy", "--gpu", "x", "--image", "y", "--max-cost", odd] for odd in ("nan", "inf", "0", "-1", "1e999", "")),
    *([], ["nope"], ["deploy"], ["logs"], ["fetch"]),
]


@pytest.mark.parametrize("arguments", RUNPOD_ODD, ids=lambda value: " ".join(value)[:60])
def test_odd_arguments_of_runpod_are_a_wrong_command_line(capsys, arguments):
    """Nothing is asked of RunPod: this key and this address are none."""
    environ = {"RUNPOD_API_KEY": "rpa_x", "RUNPOD_API_BASE_URL": "http://127.0.0.1:9"}
    assert runpod.main(arguments, environ) == 64
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("key", ["", " ", "\n", "é", "\udcff", "a\nb"])
def test_a_key_of_runpod_that_is_none_is_refused(capsys, key):
    assert runpod.main(["status"], {"RUNPOD_API_KEY": key}) == 78
    assert "RUNPOD_API_KEY" in capsys.readouterr().err


@pytest.mark.parametrize(
    "card", ["", "9" * 5000 + " GB", "0 GB", "nan GB", "1e400 GB", "0 x RTX 4090", "\udcff", "x" * 9999]
)
def test_a_card_that_is_none_is_refused(photographs, card):
    assert entrypoint.main(["--check", "--gpu", card]) == 78


@pytest.mark.parametrize("card", ["a\0b"])
def test_a_null_byte_is_a_wrong_command_line(card):
    assert entrypoint.main(["--check", "--gpu", card]) == 64


def test_a_check_for_a_card_names_it(caplog):
    with caplog.at_level("INFO"):
        job._card_to_check_for("RTX 4090")
    assert "Checking for RTX 4090: 1 × nvidia 8.9, 24 GiB each" in caplog.text
