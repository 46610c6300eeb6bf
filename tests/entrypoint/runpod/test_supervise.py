"""A job inside a rented pod: it ends the pod when nothing is left to do, and never pays for trying in vain."""

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from entrypoint.fetch import http
from entrypoint.processes import places, supervise
from entrypoint.processes.supervise import Times
from entrypoint.settings.variables.finish import FinishSettings
from trainer.process import guard, vitals

ROOT = Path(__file__).resolve().parents[3]


def supervised(job, environ, *, times=None):
    """Without a process of its own for the job, so that it can tell us what it has done."""
    return supervise.supervised(job, environ, times=times, run=lambda job: guard.Ending(job(), 0.0))


QUICK = Times(0.02, 0.05, 0.3, 0.3, http.RetryPolicy(budget=0.3, first_wait=0.02, timeout=2.0))


@pytest.fixture(autouse=True)
def _no_signal_is_early():
    """One that comes before the wait for it has begun comes again."""

    def again(number, _frame):
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()

    before = signal.signal(signal.SIGTERM, again)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def pod(server, account, tmp_path):
    """The environment of a pod that runs; its stop sends the signal, as RunPod does."""
    server.add_pod("pod1")
    server.on_action = lambda pod, action: threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
    return {**account, "RUNPOD_POD_ID": "pod1", "OUTPUT_PATH": str(tmp_path / "output")}


def diary(pod):
    return json.loads((Path(pod["OUTPUT_PATH"]) / "pod.json").read_text())


def state(server):
    return server.pods["pod1"]["status"] if "pod1" in server.pods else "gone"


@pytest.mark.parametrize("code", [0, 64, 65, 77, 78])
def test_the_pod_is_stopped_when_another_start_is_of_no_use(server, pod, code):
    assert supervised(lambda: code, pod, times=QUICK) == code
    assert state(server) == "EXITED"


def test_the_pod_is_terminated_if_that_is_asked_for(server, pod):
    assert supervised(lambda: 0, {**pod, "ON_FINISH": "terminate"}, times=QUICK) == 0
    assert state(server) == "gone"


@pytest.mark.parametrize("environment", [{"ON_FINISH": "exit"}, {"CONFIG_JSON": '{"ON_FINISH": "exit"}'}])
def test_the_container_exits_if_that_is_asked_for(server, pod, environment):
    assert supervised(lambda: 0, pod | environment, times=QUICK) == 0
    assert state(server) == "RUNNING"


def test_a_signal_is_not_an_end_of_the_job(server, pod):
    assert supervised(lambda: 143, pod, times=QUICK) == 143
    assert state(server) == "RUNNING"


def test_what_may_pass_is_tried_again_and_then_no_more(server, pod):
    codes, ran = [], []
    for _ in range(supervise.MAX_ATTEMPTS + 1):
        codes.append(supervised(lambda: ran.append(1) or 75, pod, times=QUICK))
        assert state(server) == ("EXITED" if len(codes) > supervise.MAX_ATTEMPTS else "RUNNING")
    assert codes == [75] * (supervise.MAX_ATTEMPTS + 1) and len(ran) == supervise.MAX_ATTEMPTS


def test_a_pod_that_gives_up_keeps_its_volume(server, pod):
    """What is not done, or not uploaded, may be wanted still."""
    for _ in range(supervise.MAX_ATTEMPTS + 1):
        assert supervised(lambda: 75, {**pod, "ON_FINISH": "terminate"}, times=QUICK) == 75
    assert state(server) == "EXITED"


def test_progress_begins_the_count_anew(server, pod):
    out = Path(pod["OUTPUT_PATH"])
    for step in range(2 * supervise.MAX_ATTEMPTS):
        out.mkdir(exist_ok=True)
        (out / "status.json").write_text(json.dumps({"step": 10 * step}))
        assert supervised(lambda: 70, pod, times=QUICK) == 70
    assert state(server) == "RUNNING"


def test_pauses_grow(pod, monkeypatch):
    pauses = []
    monkeypatch.setattr(supervise, "_wait", lambda seconds: pauses.append(seconds) or 0)
    for _ in range(supervise.MAX_ATTEMPTS):
        supervised(lambda: 75, pod, times=Times())
    assert pauses == [30, 60, 120, 240]


@pytest.mark.parametrize("code", [0, 75])
def test_a_done_pod_that_is_started_again_stays_for_its_results(server, pod, monkeypatch, code):
    assert supervised(lambda: 0, pod, times=QUICK) == 0 and diary(pod)["done"]
    server.add_pod("pod1")
    began = time.monotonic()
    assert supervised(lambda: code, pod, times=QUICK) == code  # 75: it came back without GPUs
    assert time.monotonic() - began >= QUICK.linger and state(server) == "EXITED"


def test_a_done_pod_whose_variables_were_edited_ends_when_its_new_run_is_done(server, pod):
    out = Path(pod["OUTPUT_PATH"])

    def trains(run, step):
        out.mkdir(exist_ok=True)
        (out / "status.json").write_text(json.dumps({"run": run, "step": step}))
        return 0

    assert supervised(lambda: trains("x", 1000), pod, times=QUICK) == 0
    server.add_pod("pod1")
    began = time.monotonic()
    assert supervised(lambda: trains("x-2", 500), pod, times=dataclasses.replace(QUICK, linger=60.0)) == 0
    assert time.monotonic() - began < 30 and state(server) == "EXITED"


def test_steps_of_a_new_run_are_progress(server, pod):
    out = Path(pod["OUTPUT_PATH"])
    out.mkdir()
    for number in range(2 * supervise.MAX_ATTEMPTS):
        (out / "status.json").write_text(json.dumps({"run": f"x-{number}", "step": 1000 - number}))
        assert supervised(lambda: 70, pod, times=QUICK) == 70
    assert state(server) == "RUNNING"


def test_graphql_where_the_rest_interface_fails(server, pod):
    server.fault("POST /v2/pods/pod1/action", status=500, times=99)
    assert supervised(lambda: 0, pod, times=QUICK) == 0
    (asked,) = server.graphql
    assert "podStop(input: {podId: $id})" in asked["query"] and asked["variables"] == {"id": "pod1"}


@pytest.mark.alone
def test_the_pods_own_program_where_both_fail(server, pod, tmp_path, monkeypatch):
    program = tmp_path / "runpodctl"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/told\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert supervised(lambda: 0, {**pod, "RUNPOD_API_KEY": "wrong"}, times=QUICK) == 0
    assert (tmp_path / "told").read_text() == "stop pod pod1\n"


@pytest.mark.alone
def test_a_pod_that_cannot_be_stopped_stays_and_says_so(server, pod, monkeypatch):
    told = []
    monkeypatch.setattr(supervise.log, "error", lambda text, *values: told.append(text % values))
    server.fault("POST /v2/pods/pod1/action", status=500, times=99)
    server.fault("POST /graphql", status=500, times=99)
    threading.Timer(2.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    assert supervised(lambda: 0, pod, times=QUICK) == 0
    assert time.monotonic() - began > 2 and "THIS POD IS NOT STOPPED AND COSTS MONEY" in "".join(told)


def test_elsewhere_a_container_exits_or_idles(caplog):
    assert supervised(lambda: 3, {"ON_FINISH": "stop"}) == 3
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert supervised(lambda: 0, {"ON_FINISH": "idle"}) == 0


def test_wait_keeps_the_pod_for_a_while_and_then_stops_it(server, pod):
    began = time.monotonic()
    assert supervised(lambda: 0, {**pod, "ON_FINISH": "wait"}, times=QUICK) == 0
    assert time.monotonic() - began >= QUICK.linger and state(server) == "EXITED"


def test_wait_elsewhere_ends_after_a_while_or_with_a_signal(caplog):
    began = time.monotonic()
    with caplog.at_level("INFO"):
        assert supervised(lambda: 4, {"ON_FINISH": "wait", "OUTPUT_PATH": "/there"}, times=QUICK) == 4
    assert "results are in /there" in caplog.text and "docker cp" in caplog.text
    assert time.monotonic() - began >= QUICK.linger


@pytest.mark.parametrize(
    ("place", "action", "words"),
    [
        ({"VAST_CONTAINERLABEL": "C.123"}, "stop", "vastai stop instance 123, or its console does that."),
        ({"CONTAINER_ID": "77", "CONTAINER_API_KEY": "k"}, "terminate", "vastai destroy instance 77, or its console"),
        ({"VAST_CONTAINERLABEL": "x; rm"}, "exit", "vastai stop instance ID, or its console does that; so does ON_FIN"),
        ({"JOB_ID": "6", "ACCELERATOR": "a10g"}, "stop", "ends the job, and its bill"),
        ({"JOB_ID": "6", "ACCELERATOR": "a10g"}, "wait", "bills until the container exits"),
        ({}, "terminate", "ON_FINISH=terminate works on RunPod and Vast.ai only"),
        ({"JOB_ID": "6"}, "exit", None),
        ({}, "wait", None),
    ],
)
def test_each_place_says_what_the_end_means_there(place, action, words):
    said = places.what_follows(action, place)
    assert said is None if words is None else words in said


LIMITED = guard.Ending(143, 0.0, signal.SIGTERM, limit_reached=True)  # also by the monitor page


@pytest.mark.parametrize("action", ["stop", "terminate", "wait"])
def test_a_limit_ends_the_job_and_the_pod_but_not_its_volume(server, pod, action, caplog):
    """The page and the log promise that the same command resumes."""
    own = {**pod, "ON_FINISH": action}
    assert supervise.supervised(lambda: 0, own, times=QUICK, run=lambda job: LIMITED) == 143
    assert state(server) == "EXITED"
    assert ("in place of ON_FINISH=terminate" in caplog.text) == (action == "terminate")


def test_a_done_pod_that_waits_waits_once_when_it_is_started_again(server, pod, caplog):
    waits = {**pod, "ON_FINISH": "wait"}
    assert supervised(lambda: 0, waits, times=QUICK) == 0
    server.add_pod("pod1")
    caplog.clear()
    with caplog.at_level("INFO"):
        assert supervised(lambda: 0, waits, times=QUICK) == 0
    assert "This job is already done" in caplog.text and "ON_FINISH=wait keeps" not in caplog.text
    assert state(server) == "EXITED"


def limited(tmp_path, **more):
    """The settings of a job with MAX_COST, which is reached after 0.1 s."""
    job = {"BASE_MODEL": "mini-flux", "DATASET_NAME": str(tmp_path), "OUTPUT_PATH": str(tmp_path / "output")}
    return job | {"ON_FINISH": "wait", "MAX_COST": "1", "PRICE_PER_HOUR": "36000"} | more


def test_no_pod_waits_beyond_its_limit_of_money(server, pod, tmp_path):
    began = time.monotonic()
    times = dataclasses.replace(QUICK, linger=60.0)
    assert supervise.supervised(lambda: 0, pod | limited(tmp_path), times=times, run=lambda job: LIMITED) == 143
    assert time.monotonic() - began < 20 and state(server) == "EXITED"


def test_no_container_waits_beyond_its_limit_of_money(tmp_path):
    began = time.monotonic()
    assert supervised(lambda: 0, limited(tmp_path), times=dataclasses.replace(QUICK, linger=60.0)) == 0
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("action", ["wait", "idle"])
@pytest.mark.parametrize("code", [143, 130])
def test_elsewhere_a_stopped_job_ends_its_container(action, code, caplog):
    """Its parent would kill it in the middle of the wait."""
    began = time.monotonic()
    with caplog.at_level("INFO"):
        assert supervised(lambda: code, {"ON_FINISH": action}) == code
    assert time.monotonic() - began < 5
    assert "the container exits now" in caplog.text and "keeps the container" not in caplog.text


@pytest.mark.parametrize("action", ["wait", "idle", "terminate"])
@pytest.mark.parametrize("arguments", [["check"], ["--check"], ["--gpu", "RTX 4090"], ["quote"], ["--help-env"]])
def test_nothing_of_on_finish_happens_for_other_commands(server, pod, programs, tmp_path, arguments, action):
    """No wait, no stop of the pod, no record of an attempt."""
    place = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG")}
    job = {"BASE_MODEL": "none-such", "DATASET_NAME": str(tmp_path), "PYTHONPATH": str(ROOT), "ON_FINISH": action}
    process = programs.start("-m", "entrypoint", *arguments, environment={**place, **pod, **job})
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == (0 if arguments == ["--help-env"] else 78), printed
    assert state(server) == "RUNNING" and not (Path(pod["OUTPUT_PATH"]) / "pod.json").exists()


def finish(**asked):
    """The settings of the end of a job; what is not asked for is not set."""
    fields = {field.name: None for field in dataclasses.fields(FinishSettings)}
    return FinishSettings(**{**fields, **asked})


def test_the_parent_ends_a_job_at_its_limit_whatever_it_does(tmp_path):
    """Here it reads from a pipe that nobody fills."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def work():
        supervise.set_limit(finish(max_runtime=0.2 / 3600), os.environ, began=time.time())
        pipe.read_text()
        return 0

    began = time.monotonic()
    ended = guard.guarded(work)
    assert (ended.exit_code, ended.limit_reached) == (143, True) and time.monotonic() - began < 3


def test_a_limit_counts_from_the_start_of_the_job():
    """What its receipt and its report count from: half an hour has gone by."""

    def work():
        supervise.set_limit(finish(max_runtime=1.0), os.environ, began=time.time() - 1800)
        left = vitals.Vitals.of(os.environ).read(vitals.LIMIT) - time.monotonic()
        return int(1790 < left < 1801)  # it is kept in milliseconds

    assert guard.guarded(work).exit_code == 1


def test_a_cost_needs_a_price():
    with pytest.raises(supervise.SettingsError, match="PRICE_PER_HOUR"):
        supervise.set_limit(finish(max_cost=3.0), {}, began=time.time())


# --- the whole program, as a pod starts it again and again

SCRIPT = """
import sys
from entrypoint.fetch import http
from entrypoint.processes import supervise
from entrypoint.__main__ import main
supervise.USUAL = supervise.Times(0.02, 0.05, 0.3, 5.0, http.RetryPolicy(budget=1.0, first_wait=0.05))
sys.exit(main([]))
"""


@pytest.fixture
def container(server, pod, tmp_path, programs):
    """`container(**environment)`: run it as `--restart=always` does, until the pod stops; exit codes and the log."""
    place = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG")}
    job = {
        "BASE_MODEL": "mini-flux", "DATASET_NAME": str(ROOT / "trainer/families/miniatures/concept"),
        "CACHE_PATH": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf"), "OUTPUT_NAME": "x",
        "PARAMS_MAX_STEPS": "3", "PARAMS_SAMPLE_EVERY_N_STEPS": "0", "PARAMS_NETWORK_DIM": "4",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    running = []
    server.on_action = lambda pod, action: threading.Timer(0.1, running[-1].terminate).start()

    def run(*arguments, **environment):
        codes, printed = [], ""
        while state(server) == "RUNNING":
            assert len(codes) < 9
            process = programs.start(*(arguments or ("-c", SCRIPT)), environment={**place, **pod, **job, **environment})
            running.append(process)
            printed += process.communicate(timeout=200)[0]
            codes.append(process.returncode)
        return codes, printed

    return run


def test_a_limit_of_time_ends_the_pod_and_not_only_its_container(server, container):
    """Told to the parent of the job, which is not the one of the supervisor."""
    codes, printed = container("-m", "entrypoint", MAX_RUNTIME=str(1 / 3600), PARAMS_MAX_STEPS="4000")
    assert codes == [143] and "MAX_RUNTIME or MAX_COST is reached" in printed, printed


@pytest.mark.slow
def test_a_job_runs_once_and_ends_its_pod(server, container, pod):
    codes, printed = container()
    assert codes == [0], printed
    assert (Path(pod["OUTPUT_PATH"]) / "x.safetensors").is_file() and diary(pod)["done"]

    server.add_pod("pod1")  # its owner starts it once more
    codes, printed = container()
    assert codes == [0] and "This job is done" in printed and "stays" in printed


def test_wrong_settings_end_the_pod_at_once(server, container):
    codes, printed = container(PARAMS_NETWORK_DIM="many")
    assert codes == [78] and "PARAMS_NETWORK_DIM='many'" in printed


def test_a_pod_without_its_gpu_is_given_up(server, container):
    codes, printed = container(BASE_MODEL="flux")
    assert codes == [75] * 6 and "No GPU answers here" in printed and "giving up" in printed


@pytest.mark.slow
def test_the_cost_ends_the_job_with_its_state_saved(server, container, pod):
    codes, printed = container(PARAMS_MAX_STEPS="4000", MAX_COST="0.04", PRICE_PER_HOUR="2.4")  # a minute
    assert codes == [143] and "MAX_COST is reached" in printed, printed
    assert (Path(pod["OUTPUT_PATH"]) / "state").is_dir()


@pytest.mark.parametrize(
    ("nodes", "counts"),
    [
        ({"NODES": "auto", "NODE_RANK": "1"}, False),
        ({"CONFIG_JSON": '{"NODES": "2"}', "NODE_RANK": "1"}, False),
        ({"NODES": "auto", "NODE_RANK": "0"}, True),
        ({"NODE_RANK": "1"}, True),  # as a cluster says it, unasked
    ],
)
def test_of_pods_that_train_together_the_first_alone_counts_attempts(server, pod, nodes, counts):
    pod["CACHE_PATH"] = str(Path(pod["OUTPUT_PATH"]).parent / "cache")
    assert supervised(lambda: 75, {**pod, **nodes}, times=QUICK) == 75
    assert (Path(pod["OUTPUT_PATH"]) / "pod.json").exists() is counts


@pytest.fixture
def another(pod, tmp_path):
    """The environment of a pod that trains together with others, and is not the first."""
    return {**pod, "NODES": "auto", "NODE_RANK": "1", "CACHE_PATH": str(tmp_path / "cache")}


def test_a_pod_that_never_finds_the_first_again_ends(server, another):
    """That one may have been stopped for good."""
    codes = []
    while state(server) == "RUNNING" and len(codes) < 9:
        codes.append(supervised(lambda: 75, another, times=QUICK))
    assert codes == [75] * (supervise.MAX_ATTEMPTS + 1) and state(server) == "EXITED"
    assert not Path(another["OUTPUT_PATH"]).exists()


def test_a_pod_that_finds_the_first_leaves_it_to_that_one_to_give_up(server, another):
    def job():
        supervise.has_met(another)
        return 75

    for _ in range(2 * supervise.MAX_ATTEMPTS):
        assert supervised(job, another, times=QUICK) == 75
    assert state(server) == "RUNNING"


def test_what_ends_the_first_pod_for_good_ends_another(server, another):
    """As its entrypoint learns from the first one: the same exit code as of a stop that means nothing."""

    def job():
        vitals.write_last(os.environ)
        return 143

    ended = guard.guarded(job)
    assert (ended.exit_code, ended.limit_reached) == (143, True)
    assert supervise.supervised(lambda: 0, another, times=QUICK, run=lambda job: ended) == 143
    assert state(server) == "EXITED"


@pytest.mark.parametrize("action", ["stop", "terminate"])
def test_a_limit_ends_the_pod_that_only_fetches(server, pod, action):
    def job():
        supervise.set_limit(finish(max_runtime=0.2 / 3600), os.environ, began=time.time())
        time.sleep(60)
        return 0

    began = time.monotonic()
    assert supervise.without_attempts(job, {**pod, "ON_FINISH": action}, times=QUICK) == 143
    assert time.monotonic() - began < 20 and state(server) == "EXITED"
