"""Bad input ends in seconds, with the right exit code and a message that names variable, value and fix."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from entrypoint.__main__ import main

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "misspelt variable": ({"PARAMS_LEARNING_RAT": "1"}, 78, "PARAMS_LEARNING_RATE"),
    "text where a number belongs": ({"PARAMS_NETWORK_DIM": "many"}, 78, "PARAMS_NETWORK_DIM='many'"),
    "not a finite number": ({"PARAMS_LEARNING_RATE": "nan"}, 78, "PARAMS_LEARNING_RATE='nan'"),
    "out of range": ({"PARAMS_NETWORK_DIM": "0"}, 78, "PARAMS_NETWORK_DIM='0'"),
    "unknown model": ({"BASE_MODEL": "fluks"}, 78, "flux"),
    "unknown optimiser": ({"PARAMS_OPTIMIZER_TYPE": "prodgy"}, 78, "prodigy"),
    "unknown scheduler": ({"PARAMS_LEARNING_SCHEDULER": "cosin"}, 78, "cosine"),
    "unknown optimiser argument": ({"PARAMS_OPTIMIZER_ARGS": "bettas=(0.9,0.99)"}, 78, "betas"),
    "unknown timestep sampling": ({"PARAMS_TIMESTEP_SAMPLING": "cubic"}, 78, "sigmoid"),
    "missing dataset": ({"DATASET_NAME": "/nowhere/at/all"}, 78, "DATASET_NAME"),
    "no dataset": ({"DATASET_NAME": ""}, 78, "DATASET_NAME"),
    "unknown key in dataset.json": (
        {"DATASET_CONFIG": '{"datasets": [{"resolution": 128, "batch_sise": 1, "subsets": [{}]}]}'},
        78,
        "batch_size",
    ),
    "a LoRA that is not there": ({"PARAMS_RESUME_FROM": "/nowhere/x.safetensors"}, 78, "PARAMS_RESUME_FROM"),
    "bad JSON": ({"CONFIG_JSON": "{not json"}, 78, "CONFIG_JSON"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(job, name):
    changes, expected, hint = SETTINGS[name]
    started = time.monotonic()
    code, printed = job.run(**changes)
    assert code == expected and hint in printed, printed
    assert f"[exit {expected}]" in printed.splitlines()[-1]
    assert "Traceback" not in printed
    assert not (job.out / "plan.json").exists()
    assert time.monotonic() - started < 20


def test_every_problem_is_in_one_message(job):
    code, printed = job.run(PARAMS_NETWORK_DIM="x", PARAMS_SEED="-1", BASE_MODEL="no", PARAMS_NOPE="1")
    assert code == 78
    assert all(name in printed for name in ("PARAMS_NETWORK_DIM", "PARAMS_SEED", "BASE_MODEL", "PARAMS_NOPE"))


def test_a_bad_flag_in_prompts_names_its_line(job):
    path = job.folder / "prompts.txt"
    path.write_text("# comment\na cat --w 128\na dog --q 3\n")
    code, printed = job.run(SAMPLE_PROMPTS=str(path))
    assert code == 78 and "line 3" in printed and "--q" in printed


def test_an_empty_dataset(job):
    (job.folder / "empty").mkdir()
    code, printed = job.run(DATASET_NAME=str(job.folder / "empty"))
    assert code in (65, 78) and "empty" in printed


def test_a_dataset_of_broken_pictures_names_each(job):
    folder = job.folder / "broken"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"")
    (folder / "b.jpg").write_text("not a picture")
    code, printed = job.run(DATASET_NAME=str(folder))
    assert code == 65 and "a.png" in printed and "b.jpg" in printed
    assert job.status()["phase"] == "failed" and job.status()["exit_code"] == 65


def test_a_dataset_without_captions_trains_with_a_warning(job, images):
    folder = job.folder / "silent"
    folder.mkdir()
    for path in images.glob("*.png"):
        (folder / path.name).write_bytes(path.read_bytes())
    code, printed = job.run(DATASET_NAME=str(folder), PARAMS_MAX_STEPS="1")
    assert code == 0 and "caption" in printed.lower(), printed


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.exists("/proc/self/ns"), reason="needs a place root cannot write")
def test_an_output_that_cannot_be_written(job):
    code, printed = job.run(OUTPUT_PATH="/proc/kiln")
    assert code == 74 and "OUTPUT_PATH" in printed, printed


def test_a_disk_too_small_for_the_plan(job):
    """A volume of 1 MiB: the need and the room are both in the message."""
    small = job.folder / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("cannot mount a small volume here")
    try:
        code, printed = job.run(OUTPUT_PATH=str(small / "output"), PARAMS_NETWORK_DIM="64")
    finally:
        subprocess.run(["umount", "-l", small], check=True)
    assert code == 74 and "OUTPUT_PATH" in printed and "GiB" in printed, printed


def test_not_a_lora(job):
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros((2, 2), np.float32)}, job.folder / "x.safetensors")
    code, printed = job.run(PARAMS_RESUME_FROM=str(job.folder / "x.safetensors"))
    assert code == 78 and "PARAMS_RESUME_FROM" in printed, printed
    (job.folder / "y.safetensors").write_text("garbage")
    code, printed = job.run(PARAMS_RESUME_FROM=str(job.folder / "y.safetensors"))
    assert code == 78 and "PARAMS_RESUME_FROM" in printed, printed


def children_of(number: int | str) -> list[str]:
    return subprocess.run(["pgrep", "-P", str(number)], capture_output=True, text=True).stdout.split()


def test_secrets_appear_nowhere(job):
    secret = "hf_" + "canary" * 6
    process = job.start(HF_TOKEN=secret, PARAMS_MAX_STEPS="60", own_interpreter=True)
    job.wait_for_step(process, 2)
    # The program is two processes, which were started with the secret: the one that works is the child of the other.
    (program,) = children_of(process.pid)
    children = children_of(program)
    assert children
    for child in children:
        with open(f"/proc/{child}/environ", "rb") as environ, open(f"/proc/{child}/cmdline", "rb") as line:
            assert secret.encode() not in environ.read() + line.read()
    process.terminate()
    printed, _ = process.communicate(timeout=60)
    assert secret not in printed
    assert not [p for p in job.out.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]


def test_a_wrong_command_line_and_the_informative_options(capsys):
    assert main(["--nope"]) == 64
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("kiln ")
    assert main(["--help-env"]) == 0 and "`PARAMS_NETWORK_DIM`" in capsys.readouterr().out


def test_the_table_of_variables_may_be_cut_short_by_its_reader():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "entrypoint", "--help-env"]
    run = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.alone
def test_check_trains_nothing_and_is_fast(job):
    started = time.monotonic()
    code, printed = job.run("--check", own_interpreter=True)
    assert code == 0 and "can run" in printed, printed
    assert not (job.out / "plan.json").exists()
    times = []
    while len(times) < 8 and min(times, default=9.9) >= 1.0:  # others may want the cores in some of them
        started = time.monotonic()
        assert job.run("--check", own_interpreter=True)[0] == 0
        times.append(time.monotonic() - started)
    assert min(times) < 1.0, times


def test_config_json_holds_any_variable(job):
    code, printed = job.run("--check", CONFIG_JSON=json.dumps({"PARAMS_NETWORK_DIM": 8, "PARAMS_SEED": "3"}))
    assert code == 0, printed
