"""`python -m entrypoint job ENGINE`: what is printed for each engine, and what is refused."""

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from entrypoint.engines import again, gpu_names
from entrypoint.nodes.cluster import find_place
from entrypoint.processes.supervise import PERMANENT_FAILURES
from entrypoint.system.cards import card_of, hardware_of
from tests.support.engine_jobs import ENGINES, HOOK, KEYED, TOKEN, TRIGGER, printed


@pytest.fixture
def job(capsys, caplog):
    """`job(engine, *arguments, **variables)`: what is printed for it."""

    def of(engine, *arguments, **variables):
        code, out, err = printed(capsys, caplog, engine, *arguments, **variables)
        assert code == 0, err
        return out

    return of


def program(folder, name, text):
    """A program `name` in `folder`, first on the path."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def ran(text, environment, timeout=30, shell="sh"):
    return subprocess.run([shell, "-c", text], env=environment, capture_output=True, text=True, timeout=timeout)


# ---- what all have in common


@pytest.mark.parametrize("engine", ENGINES)
def test_no_secret_is_in_any_text_and_each_is_named(capsys, caplog, engine):
    code, out, err = printed(
        capsys, caplog, engine, DATASET_NAME=KEYED, CONFIG_JSON='{"HF_WRITE_TOKEN": "hf_%s"}' % ("Zz1" * 10)
    )
    assert code == 0, err
    for secret in (TOKEN, HOOK, "pA55word99", "Zz1Zz1", "Zx9Zx9"):
        assert secret not in out + err
    for name in ("HF_TOKEN", "WEBHOOK_URL", "DATASET_NAME", "CONFIG_JSON"):
        assert name in out


@pytest.mark.parametrize("engine", ENGINES)
def test_the_image_has_its_backend_and_the_storage_is_the_workspace(job, engine):
    text = job(engine)
    assert "ghcr.io" in text and "kiln:0.1.0-cuda" in text
    if engine != "runpod":  # deploy mounts it there
        assert "/workspace" in text


@pytest.mark.parametrize("engine", ENGINES)
def test_a_path_of_this_machine_is_refused(capsys, caplog, tmp_path, engine):
    code, out, err = printed(capsys, caplog, engine, DATASET_NAME=str(tmp_path))
    assert code == 78 and not out and "DATASET_NAME" in err and "is on this machine" in err


@pytest.mark.parametrize("engine", [name for name in ENGINES if name not in ("k8s", "slurm")])
def test_a_gpu_that_the_engine_does_not_have_is_refused(capsys, caplog, engine):
    code, _, err = printed(capsys, caplog, engine, "--gpu", "GTX 1080 Ti")
    assert code == 78 and "--gpu GTX 1080 Ti" in err


def test_a_gpu_that_cannot_hold_the_job_is_refused_by_the_planner(capsys, caplog):
    code, _, err = printed(capsys, caplog, "modal", "--gpu", "T4", PARAMS_BATCH_SIZE="64")
    assert code == 78 and "PARAMS_BATCH_SIZE" in err


def test_the_cards_are_those_on_which_the_planner_finds_room(job):
    def names(**variables):
        resources = yaml.safe_load(job("sky", **variables))["resources"]
        return [entry["accelerators"] for entry in resources.get("ordered", [resources])]

    small, large = names(PARAMS_RESOLUTION="512"), names(PARAMS_BATCH_SIZE="24")
    assert "RTXA5000:1" in small
    assert large and not {"RTXA4000:1", "RTXA5000:1", "RTX4090:1", "L4:1"} & {*large}
    assert names(NUM_GPUS="2")[0].endswith(":2")


def test_an_unknown_variable_and_an_unknown_engine_end_at_once(capsys, caplog):
    code, _, err = printed(capsys, caplog, "sky", "--env", "PARAMS_RANK=8")
    assert code == 78 and "PARAMS_RANK" in err
    from entrypoint import __main__ as entrypoint

    assert entrypoint.main(["job", "cloud9"], {}) == 64


@pytest.mark.parametrize("table", ["SKY", "DSTACK", "HUGGING_FACE", "VAST", "MODAL", "RUNPOD"])
def test_the_names_of_gpus_are_those_of_the_planner(table):
    for name in getattr(gpu_names, table):
        assert card_of(hardware_of(name)) == name


def test_run_needs_the_tool_and_then_becomes_it(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    code, _, err = printed(capsys, caplog, "sky", "--run", PATH=str(tmp_path))
    assert (code == 78 and "pip install skypilot" in err) or shutil.which("sky")
    environment = program(tmp_path / "bin", "sky", 'printf "%s\\n" "$@" > told; printf "%s" "$HF_TOKEN" > token')
    words = [sys.executable, "-m", "entrypoint", "job", "sky", "--image", "me/kiln:1", "--storage", "v", "--run"]
    environment |= {"BASE_MODEL": "sdxl", "DATASET_NAME": "org/images", "HF_TOKEN": TOKEN}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "told").read_text().split() == ["jobs", "launch", "--yes", "--secret", "HF_TOKEN", "kiln.yaml"]
    assert (tmp_path / "token").read_text() == TOKEN, "by the tool's environment"
    text = (tmp_path / "kiln.yaml").read_text()
    assert TOKEN not in text

    subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert not list(tmp_path.glob("*.set-aside")), "the same again"
    (tmp_path / "kiln.yaml").write_text("mine\n")
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "kiln.yaml.set-aside" in done.stderr
    assert (tmp_path / "kiln.yaml.set-aside").read_text() == "mine\n" and (tmp_path / "kiln.yaml").read_text() == text


# ---- several machines


def test_several_machines_are_the_engines_own_and_find_each_other(job):
    sky = yaml.safe_load(job("sky", NODES="2"))
    assert sky["num_nodes"] == 2 and sky["envs"]["NODES"] == "auto"
    dstack = yaml.safe_load(job("dstack", NODES="2"))
    assert dstack["nodes"] == 2 and "NODES=auto" in dstack["env"]
    slurm = job("slurm", NODES="2").splitlines()
    assert {"#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", "export NODES=auto"} <= {*slurm}
    trainer = yaml.safe_load(job("k8s", "--kind", "trainjob", NODES="2"))["spec"]["trainer"]
    assert trainer["numNodes"] == 2 and {"name": "NODES", "value": "auto"} in trainer["env"]


def test_kubernetes_starts_an_indexed_job_whose_pods_have_names(job):
    service, tree = yaml.safe_load_all(job("k8s", NODES="3", CONFIG_JSON='{"PARAMS_SEED": 1}'))
    spec, pod = tree["spec"], tree["spec"]["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 3, 3)
    assert service["spec"]["clusterIP"] == "None" and service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": tree["metadata"]["name"]}
    values = {entry["name"]: entry.get("value", "") for entry in pod["containers"][0]["env"]}
    # The place that each pod finds, from what Kubernetes tells it.
    place = find_place(int(values["NODES"]), {**values, "JOB_COMPLETION_INDEX": "2"})
    assert (place.rank, place.count, place.address) == (2, 3, "kiln-0.kiln")
    assert spec["backoffLimit"] == 3 * yaml.safe_load(job("k8s"))["spec"]["backoffLimit"]


@pytest.mark.parametrize("engine", ["hf", "vast", "modal", "runpod"])
def test_an_engine_of_single_machines_refuses_several(capsys, caplog, engine):
    code, out, err = printed(capsys, caplog, engine, NODES="2")
    assert code == 78 and not out and f"NODES=2: {engine} starts a job on one machine" in err
    code, out, err = printed(capsys, caplog, engine, CONFIG_JSON='{"NODES": 2}')
    assert code == 78 and not out and "NODES=2" in err


def test_an_engine_must_be_told_how_many_machines(capsys, caplog):
    code, _, err = printed(capsys, caplog, "slurm", NODES="auto")
    assert code == 78 and "NODES=auto" in err and "NODES=2" in err


# ---- exit codes: each engine's own way


def test_sky_recovers_after_143_alone_and_75_is_tried_again_inside(job):
    """SkyPilot counts no restart after a code of `recover_on_exit_codes`, so 75 there would cost money for ever."""
    task = yaml.safe_load(job("sky"))
    recovery = task["resources"]["job_recovery"]
    assert recovery == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [143]}
    assert not {*PERMANENT_FAILURES} & {*recovery["recover_on_exit_codes"]}
    assert again.loop(again.with_image_variables()) in task["run"]


def test_a_job_that_has_reached_its_limit_of_money_is_not_begun_again(job):
    limits = {"MAX_COST": "5", "PRICE_PER_HOUR": "1"}
    assert yaml.safe_load(job("sky", **limits))["resources"]["job_recovery"] == {"max_restarts_on_errors": 0}
    assert "  75)" in job("slurm", **limits) and "  143)" not in job("slurm", **limits)
    rules = yaml.safe_load(job("k8s", **limits))["spec"]["podFailurePolicy"]["rules"]
    assert 143 in rules[1]["onExitCodes"]["values"] and rules[1]["action"] == "FailJob"


def outcome(rules, code, *, evicted=False):
    """What Kubernetes does after a failed pod: the first rule that matches decides (the Job API, podFailurePolicy)."""
    for rule in rules:
        if any(c["type"] == "DisruptionTarget" for c in rule.get("onPodConditions", ())) and evicted:
            return rule["action"]
        if code in rule.get("onExitCodes", {}).get("values", ()):
            return rule["action"]
    return "Count"


def test_kubernetes_fails_at_once_counts_or_ignores_by_the_exit_code(job):
    spec = yaml.safe_load(job("k8s"))["spec"]
    rules = spec["podFailurePolicy"]["rules"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never" and spec["backoffLimit"] > 0
    assert [outcome(rules, code) for code in (64, 65, 77, 78)] == ["FailJob"] * 4
    assert [outcome(rules, code) for code in (75, 143)] == ["Count"] * 2
    assert outcome(rules, 143, evicted=True) == "Ignore"


CODES = 'read -r code rest < codes; echo "$rest" > codes; exit "$code"'


@pytest.mark.parametrize(
    ("codes", "end", "left"),
    [("75 75 0", 0, ""), ("75 65 0", 65, "0"), ("70 0", 70, "0"), ("75 75 75 75", 75, "75"), ("0 1", 0, "1")],
)
def test_inside_a_container_75_alone_is_tried_again(tmp_path, codes, end, left):
    (tmp_path / "codes").write_text(f"{codes}\n")
    environment = program(tmp_path, "once", f"cd {tmp_path}; {CODES}")
    done = ran(again.loop("once", tries=3, pause_s=0), environment)
    assert done.returncode == end, done.stderr
    assert (tmp_path / "codes").read_text().strip() == left


def test_inside_a_container_a_signal_reaches_the_job_which_ends_by_itself(tmp_path):
    job = f"trap 'echo saved > {tmp_path}/saved; exit 143' TERM; echo > {tmp_path}/runs; sleep 30 & wait; wait"
    environment = program(tmp_path, "once", job)
    process = subprocess.Popen(["sh", "-c", again.loop("once", tries=3, pause_s=0)], env=environment)
    while not (tmp_path / "runs").exists():
        time.sleep(0.01)
    process.terminate()
    assert process.wait(20) == 143 and (tmp_path / "saved").exists()


def test_inside_a_container_a_signal_in_the_pause_ends_it(tmp_path):
    environment = program(tmp_path, "once", f"echo >> {tmp_path}/runs; exit 75")
    process = subprocess.Popen(["sh", "-c", again.loop("once", tries=3, pause_s=30)], env=environment)
    while not (tmp_path / "runs").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    process.terminate()
    assert process.wait(20) == 143 and (tmp_path / "runs").read_text() == "\n"


@pytest.mark.parametrize("code", [0, 65, 75, 78, 143])
@pytest.mark.parametrize("container", ["pyxis", "apptainer"])
def test_slurm_requeues_where_another_try_may_do(job, tmp_path, code, container):
    text = job("slurm", "--container", container)
    program(tmp_path, "srun", f'env > {tmp_path}/env; printf "%s\\n" "$@" > {tmp_path}/step; exit {code}')
    environment = program(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/requeued')
    program(tmp_path, "sleep", f'echo "$@" > {tmp_path}/paused')
    environment |= {"SLURM_JOB_ID": "17", "HF_TOKEN": TOKEN, "SLURM_RESTART_COUNT": "19"}
    (tmp_path / "job").write_text(text)
    done = subprocess.run(["bash", tmp_path / "job"], env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == code, done.stderr
    asked = (tmp_path / "requeued").read_text() if (tmp_path / "requeued").exists() else ""
    assert asked == ("requeue 17\n" if code in (75, 143) else "")
    assert (tmp_path / "paused").exists() == (code == 75), "the limit of time is near after 143"
    assert f"TRIGGER_WORD={TRIGGER}\n" in (tmp_path / "env").read_text()
    assert "/shared/kiln:/workspace" in (tmp_path / "step").read_text()


@pytest.mark.parametrize(("code", "requeues"), [(75, False), (143, True)])
def test_slurm_gives_up_after_75_when_the_job_was_started_again_often(job, tmp_path, code, requeues):
    program(tmp_path, "srun", f"exit {code}")
    environment = program(tmp_path, "scontrol", f"echo > {tmp_path}/requeued")
    (tmp_path / "job").write_text(job("slurm"))
    own = environment | {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "20"}
    assert subprocess.run(["bash", tmp_path / "job"], env=own, timeout=30).returncode == code
    assert (tmp_path / "requeued").exists() == requeues


def test_slurm_does_not_requeue_what_was_cancelled_in_the_pause(job, tmp_path):
    program(tmp_path, "srun", "exit 75")
    program(tmp_path, "sleep", f"echo > {tmp_path}/pauses; exec {shutil.which('sleep')} 20")
    environment = program(tmp_path, "scontrol", f"echo > {tmp_path}/requeued") | {"SLURM_JOB_ID": "17"}
    (tmp_path / "job").write_text(job("slurm"))
    process = subprocess.Popen(["bash", tmp_path / "job"], env=environment)
    while not (tmp_path / "pauses").exists():
        time.sleep(0.01)
    process.terminate()
    assert process.wait(15) == 75 and not (tmp_path / "requeued").exists()


def test_slurm_does_not_requeue_what_was_cancelled(job, tmp_path):
    program(tmp_path, "srun", f"echo > {tmp_path}/runs; sleep 1; exit 143")
    environment = program(tmp_path, "scontrol", f"echo > {tmp_path}/requeued") | {"SLURM_JOB_ID": "17"}
    (tmp_path / "job").write_text(job("slurm"))
    process = subprocess.Popen(["bash", tmp_path / "job"], env=environment)
    while not (tmp_path / "runs").exists():
        time.sleep(0.01)
    process.terminate()  # scancel signals the step and the script
    assert process.wait(20) == 143 and not (tmp_path / "requeued").exists()


# Written down from https://slurm.schedmd.com/sbatch.html: no package has sbatch's parser.
SBATCH = {
    "job-name": r"[\w-]+",
    "nodes": r"\d+",
    "ntasks-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "gres": r"[a-z]\w*(:\w+)?:\d+",
    "time": r"\d+",  # minutes
    "signal": r"(B:)?[A-Z]+@\d+",
    "requeue": "",
    "open-mode": "append|truncate",
    "output": r"\S+",
    "export": r"NONE|NIL|ALL|\w+(,\w+)*",
}


def test_slurm_options_are_those_of_the_manual(job):
    import re

    for arguments in ((), ("--gres", "gpu:h100", "--count", "2")):
        lines = job("slurm", *arguments).splitlines()
        options = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
        for option in options:
            name, _, value = option.partition("=")
            assert re.fullmatch(SBATCH[name], value), option
        first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
        assert not any(line.startswith("#SBATCH") for line in lines[first_command:]), "sbatch would not read it"


# ---- engines whose tool is a command


def test_hugging_face_takes_the_command(job, tmp_path):
    """The Hub's own client, as far as it needs no network."""
    text = job("hf").replace("exec hf jobs run", f"{sys.executable} -m huggingface_hub.cli.hf jobs run --dry-run")
    environment = {**os.environ, "HF_TOKEN": TOKEN, "WEBHOOK_URL": HOOK, "HF_HUB_OFFLINE": "1"}
    done = ran(text, environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"TRIGGER_WORD={TRIGGER}" in done.stdout and "hf://buckets/org/kiln:/workspace" in done.stdout
    assert TOKEN not in done.stdout and "HF_TOKEN" in done.stdout and "-m entrypoint.unprivileged train" in done.stdout


def test_hugging_face_has_each_flavour(capsys, caplog):
    from huggingface_hub import JobHardware

    known = {flavor.value for flavor in JobHardware}
    for flavors in gpu_names.HUGGING_FACE.values():
        assert {*flavors.values()} <= known
    code, _, err = printed(capsys, caplog, "hf", "--gpu", "L40S", "--count", "3")
    assert code == 78 and "1, 4, 8 GPUs, not 3" in err


def test_vast_creates_an_instance_from_the_first_offer(job, tmp_path):
    kept = f'for word in "$@"; do printf "%s\\0" "$word"; done > {tmp_path}/$1'
    environment = program(tmp_path, "vastai", f'{kept}; [ "$1" = search ] && echo \'[{{"id": 77}}]\' || true')
    done = ran(job("vast"), environment)
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "create").read_text().split("\0")
    assert words[:3] == ["create", "instance", "77"] and words[words.index("--link-volume") + 1] == "12345"
    script = words[words.index("--args") + 2]
    shown = ran(script.partition("stopped=")[0] + 'printf "%s" "$TRIGGER_WORD"', environment)
    assert shown.stdout == TRIGGER
    nothing = program(tmp_path, "vastai", "echo '[]'")
    assert ran(job("vast"), nothing).returncode == 75


def test_modal_gets_a_program_with_all_variables(job):
    prompts = '["a \U0001f600"]'
    text = job("modal", SAMPLE_PROMPTS=prompts)
    compile(text, "kiln_modal.py", "exec")
    values = {}
    exec(text[text.index("VARIABLES =") : text.index("app =")], values)
    assert values["VARIABLES"]["SAMPLE_PROMPTS"] == prompts
    assert values["VARIABLES"]["TRIGGER_WORD"] == TRIGGER and values["SECRETS"] == ["HF_TOKEN", "WEBHOOK_URL"]


def test_runpod_gets_the_command_of_deploy(job):
    import shlex

    from entrypoint.runpod.__main__ import _parser

    words = shlex.split(job("runpod").splitlines()[-1])
    options = _parser().parse_args(words[words.index("entrypoint.runpod") + 1 :])
    assert options.image == "ghcr.io/me/kiln:0.1.0-cuda" and options.network_volume == "abc123"
    assert f"TRIGGER_WORD={TRIGGER}" in options.env and "HF_TOKEN=HF_TOKEN" in options.secret


def test_kubernetes_values_are_not_taken_for_references(job):
    (container,) = yaml.safe_load(job("k8s"))["spec"]["template"]["spec"]["containers"]
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert values["TRIGGER_WORD"] == TRIGGER.replace("$(", "$$(")
    assert container["livenessProbe"]["exec"]["command"][-1] == "entrypoint.health"
    assert json.loads(json.dumps(container["resources"]["limits"])) == {"nvidia.com/gpu": "1"}


def test_a_queue_travels_as_text_to_a_card_that_all_its_jobs_fit_on(job, tmp_path):
    (tmp_path / "jobs.jsonl").write_text('{"PARAMS_BATCH_SIZE": 1}\n{"PARAMS_BATCH_SIZE": 24}\n')
    task = yaml.safe_load(job("sky", JOBS=str(tmp_path / "jobs.jsonl"), BASE_MODEL="flux,sdxl"))
    assert task["envs"]["JOBS"] == (tmp_path / "jobs.jsonl").read_text() and task["envs"]["BASE_MODEL"] == "flux,sdxl"
    wanted = {entry["accelerators"] for entry in task["resources"]["ordered"]}
    assert wanted and not {"RTXA4000:1", "RTXA5000:1", "RTX4090:1", "L4:1"} & wanted


def test_a_queue_has_as_many_gpus_as_its_largest_job(job):
    lines = '{"PARAMS_SEED": 1}\n{"NUM_GPUS": 2}\n'
    task = yaml.safe_load(job("sky", JOBS=lines))
    wanted = task["resources"].get("ordered", [task["resources"]])
    assert all(entry["accelerators"].endswith(":2") for entry in wanted)
    assert "NUM_GPUS" not in task["envs"], "the first job asks for one"


def test_the_limits_of_a_queue_are_the_common_ones_also_in_config_json(job):
    def minutes_and_recovery(**variables):
        text = job("slurm", **variables)
        (minutes,) = [line.partition("=")[2] for line in text.splitlines() if line.startswith("#SBATCH --time")]
        return int(minutes), "  143)" in text

    lines = '{"MAX_RUNTIME": 1}\n{"PARAMS_SEED": 1}\n'
    assert minutes_and_recovery(JOBS=lines, MAX_RUNTIME="7") == (450, False)
    assert minutes_and_recovery(JOBS=lines, CONFIG_JSON='{"MAX_RUNTIME": 7}') == (450, False)
    minutes, recovers = minutes_and_recovery(JOBS=lines)
    assert minutes != 90 and recovers, "the first line's limit is that of the first job"
