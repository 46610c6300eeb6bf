"""Jobs of several machines: each a network namespace on this one, with an address and a loopback device of its own."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from bench.network import Network, why_not
from tests.support.captioners import make_tagger
from tests.support.faults.moments import descendants
from tests.support.jobs import Job

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
LONG = {"PARAMS_MAX_STEPS": "3000", "PARAMS_SAVE_EVERY_N_STEPS": "10"}
SILENCE_S = 30 + 30  # how long a machine without a network may go unnoticed, and what ending takes on a busy machine


def environ(process):
    return Path(f"/proc/{process}/environ").read_bytes()


class Machines:
    """One job on several machines. `shared`: whether they have one CACHE_PATH and OUTPUT_PATH, as on a volume."""

    def __init__(self, job: Job, network: Network, *, shared: bool) -> None:
        self.first, self.network, self.shared = job, network, shared
        self.jobs = [job]
        for machine in range(1, network.count):
            own = dict(job.environment)
            if not shared:
                folder = job.folder / f"machine-{machine}"
                own |= {"OUTPUT_PATH": str(folder / "output"), "CACHE_PATH": str(folder / "cache")}
            self.jobs.append(Job(job.folder, own, job.programs))
        self.running = []

    def start(self, count=None, **changes):
        """The same job on all machines, told as SkyPilot does."""
        count = count or self.network.count
        ips = "\n".join(self.network.address(machine) for machine in range(count))
        self.running = []
        for machine in range(count):
            cluster = {"SKYPILOT_NUM_NODES": str(count), "SKYPILOT_NODE_IPS": ips, "SKYPILOT_NODE_RANK": str(machine)}
            own = {k: v[machine] if isinstance(v, list) else v for k, v in changes.items()}
            given = {"NODES": "auto", **cluster, **self.network.variables(machine), **own}
            self.running.append(self.jobs[machine].start(**given))
        return self

    def ended(self, timeout=120):
        """Exit codes, and what each printed; how long that took."""
        began = time.monotonic()
        printed = [
            process.communicate(timeout=max(1, began + timeout - time.monotonic()))[0] for process in self.running
        ]
        return [process.returncode for process in self.running], printed, time.monotonic() - began

    def run(self, **changes):
        codes, printed, _ = self.start(**changes).ended()
        assert codes == [0] * len(codes), "\n".join(printed)
        return printed

    def wait_for_step(self, step):
        self.first.wait_for_step(self.running[0], step)

    def weights(self):
        return load_file(self.first.out / "x.safetensors")

    def trainer(self, machine):
        """The process of the one on that machine, which may have children of its own."""
        return min(number for number in self.processes(machine) if b"KILN_RANK=" in environ(number))

    def processes(self, machine):
        return [self.running[machine].pid, *map(int, descendants(self.running[machine].pid))]

    def kill_machine(self, machine):
        """As if it were switched off: everything on it at once, before one learns that another is gone."""
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in self.processes(machine):
                os.kill(process, number)


@pytest.fixture
def machines(job):
    """`machines(count, shared=True)`"""
    job.environment |= {"BACKEND": "cpu", "PARAMS_OPTIMIZER_TYPE": "adamw", "PARAMS_LEARNING_RATE": "1e-3"}
    job.environment |= {"PARAMS_BATCH_SIZE": "1", "CACHE_PATH": str(job.folder / "cache")}
    opened = []

    def made(count, *, shared=True):
        network = Network(count)
        opened.append(network.__enter__())
        return Machines(job, network, shared=shared)

    yield made
    job.programs.end_all()
    for network in opened:
        network.__exit__()


def numbers(job):
    return {row["step"]: (row["loss"], row["grad_norm"], row["lr"]) for row in job.metrics() if "loss" in row}


def same(a, b):
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


def samples(job):
    return {path.name: path.read_bytes() for path in (job.out / "sample").glob("step-*.png")}


def states(folder):
    return sorted(int(path.name[-8:]) for path in (folder / "state").glob("step-*"))


@pytest.mark.parametrize("shared", [True, False])
def test_two_machines_train_what_two_gpus_of_one_do(machines, shared):
    """To the bit, whether they share a volume or not; only the first writes results, also what the other one draws."""
    two = machines(2, shared=shared)
    prompts = two.first.folder / "prompts.txt"
    prompts.write_text("a red spot --w 64 --h 64 --s 2\na blue one --w 96 --h 64 --s 2 --d 7")
    for job in two.jobs:
        job.environment |= {"SAMPLE_PROMPTS": str(prompts), "PARAMS_SAMPLE_EVERY_N_STEPS": "100"}
    printed = two.run()
    together, rows, drawn = two.weights(), numbers(two.first), samples(two.first)
    assert len(drawn) == 4 and "Drew 1 of 2 samples of step 0" in printed[0]
    assert "node 1 of 2, by SKYPILOT_NODE_RANK, SKYPILOT_NUM_NODES, SKYPILOT_NODE_IPS" in printed[1]
    assert "2 machines with NUM_GPUS=1 each train together: 2 micro-batches a step" in printed[0]
    if not shared:
        assert not two.jobs[1].out.exists() or not list(two.jobs[1].out.iterdir())
        latents = [sorted(p.name for p in Path(j.environment["CACHE_PATH"]).glob("latents/*/*")) for j in two.jobs]
        assert latents[0] == latents[1] != []
    code, said = two.first.run(NUM_GPUS="2", OUTPUT_PATH=str(two.first.folder / "one"))
    assert code == 0, said
    two.first.environment["OUTPUT_PATH"] = str(two.first.folder / "one")
    assert same(two.weights(), together) and numbers(two.first) == rows and samples(two.first) == drawn


@pytest.mark.parametrize("shared", [True, False])
def test_a_killed_trainer_ends_all_machines_and_the_same_job_goes_on_from_the_last_state(machines, shared):
    two = machines(2, shared=shared)
    two.first.environment["PARAMS_MAX_STEPS"] = two.jobs[1].environment["PARAMS_MAX_STEPS"] = "60"
    two.run()
    undisturbed, rows = two.weights(), numbers(two.first)
    for job in two.jobs:
        shutil.rmtree(job.out, ignore_errors=True)
    two.start()
    two.wait_for_step(6)
    os.kill(two.trainer(1), signal.SIGKILL)
    codes, printed, took = two.ended()
    assert codes == [75, 75] and took < 20, "\n".join(printed)
    assert "was killed (SIGKILL)" in printed[0] and "Node 1: " in two.first.status()["message"]
    printed = two.run()
    assert "Resumed at step " in printed[0] and " of 60." in printed[0], printed[0]
    assert same(two.weights(), undisturbed) and numbers(two.first) == rows


def test_a_stop_of_any_machine_is_a_stop_of_all_and_fewer_machines_go_on(machines):
    """In the same order of images: one machine with twice the accumulation."""
    two = machines(2)
    two.start(**LONG)
    two.wait_for_step(13)
    two.running[1].send_signal(signal.SIGTERM)
    codes, printed, took = two.ended()
    assert codes == [143, 143] and took < 20, "\n".join(printed)
    step = max(numbers(two.first))
    assert states(two.first.out)[-1] == step and two.first.status()["phase"] == "stopped"
    assert "Node 1 was asked to stop, so all nodes stop." in printed[0]
    ends = {"PARAMS_MAX_STEPS": str(step + 6)}
    alone = two.first.folder / "alone"
    shutil.copytree(two.first.out, alone)
    printed = two.run(**ends)
    assert f"Resumed at step {step} of {step + 6}." in printed[0]
    together, rows = two.weights(), numbers(two.first)
    two.first.environment["OUTPUT_PATH"] = str(alone)
    codes, printed, _ = two.start(1, PARAMS_GRADIENT_ACCUMULATION="2", **ends).ended()
    assert codes == [0] and f"Resumed at step {step} of {step + 6}." in printed[0], printed[0]
    assert "made with NODES 2, and this is 1" in printed[0]
    found = two.weights()
    assert max((found[name] - together[name]).abs().max().item() for name in together) < 1e-3  # of fp16
    for number, row in numbers(two.first).items():
        assert row == pytest.approx(rows[number], rel=1e-4)


@pytest.mark.parametrize("machine", [0, 1])
def test_a_machine_that_is_switched_off_ends_the_others(machines, machine):
    """The first one too, which holds the rendezvous."""
    two = machines(2)
    two.start(**LONG)
    two.wait_for_step(12)
    two.kill_machine(machine)
    codes, printed, took = two.ended()
    assert codes[1 - machine] == 75 and took < 15, printed[1 - machine]
    assert f"Node {machine} (" in printed[1 - machine] and "is lost" in printed[1 - machine], printed[1 - machine]
    printed = two.run(PARAMS_MAX_STEPS="24")
    assert "Resumed at step" in printed[0]


@pytest.mark.slow
@pytest.mark.parametrize("machine", [0, 1, 2])
def test_a_machine_that_is_cut_off_ends_itself_and_the_others(machines, machine):
    three = machines(3)
    three.start(**LONG)
    three.wait_for_step(12)
    three.network.cut(machine)
    codes, printed, took = three.ended()
    assert codes == [75] * 3 and took < SILENCE_S, printed
    three.network.mend(machine)
    assert "Resumed at step" in three.run(PARAMS_MAX_STEPS="24")[0]


@pytest.mark.slow
def test_a_machine_that_stands_still_for_a_while_is_waited_for(machines):
    two = machines(2)
    two.start(**LONG)
    two.wait_for_step(12)
    who = two.processes(1)
    for number in who:
        os.kill(number, signal.SIGSTOP)
    time.sleep(10)
    step = max(numbers(two.first))
    for number in who:
        os.kill(number, signal.SIGCONT)
    two.wait_for_step(step + 5)
    two.running[0].send_signal(signal.SIGINT)
    codes, printed, _ = two.ended()
    assert codes == [130, 130], "\n".join(printed)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"PARAMS_LEARNING_RATE": ["1e-3", "2e-3"]}, "PARAMS_LEARNING_RATE: 0.001 on node 0, 0.002 on node 1"),
        ({"NUM_GPUS": ["1", "2"]}, "NUM_GPUS: 1 on node 0, 2 on node 1"),
    ],
)
def test_nodes_that_differ_are_named_with_what_differs_before_anything_starts(machines, changes, said):
    two = machines(2)
    codes, printed, took = two.start(**changes).ended()
    assert codes == [78, 78] and took < 60
    assert all(said in text and "Loading torch" not in text for text in printed), printed


def test_other_images_on_one_machine_are_named(machines, images):
    two = machines(2, shared=False)
    other = two.first.folder / "other"
    shutil.copytree(images, other)
    name = sorted(path.name for path in other.iterdir() if path.suffix == ".png")[0]
    (other / name).unlink()
    two.jobs[1].environment["DATASET_NAME"] = str(other)
    codes, printed, _ = two.start().ended()
    assert codes == [78, 78] and "DATASET_NAME: " in printed[0] and "files of " in printed[1], printed


def test_captions_of_a_model_are_made_once_and_are_those_of_all(machines, photographs):
    """The other machine has its own cache."""
    two = machines(2, shared=False)
    dogs = two.first.folder / "dogs"
    shutil.copytree(photographs / "dog", dogs, ignore=shutil.ignore_patterns("*.txt"))
    asked = {"CAPTION_WITH": str(make_tagger(two.first.folder / "tagger")), "CAPTION_MAX_TOKENS": "12"}
    asked |= {"DATASET_NAME": str(dogs), "PARAMS_MAX_STEPS": "2"}
    printed = two.run(**asked)
    assert "Captioned 5 images" in printed[0] and "Captioned" not in printed[1], printed


def test_a_node_that_does_not_come_is_named(machines):
    two = machines(2)
    two.start(NODES_TIMEOUT="4")
    two.running[1].kill()
    codes, printed, _ = two.ended()
    assert codes[0] == 75 and "these nodes have not come to 10.77.0.1:29500: 1." in printed[0], printed[0]


def test_a_failure_before_training_is_that_of_all(machines):
    """The second machine cannot write its cache."""
    two = machines(2)
    codes, printed, took = two.start(CACHE_PATH=[two.first.environment["CACHE_PATH"], "/proc/cache"]).ended()
    assert codes == [74, 74] and took < 60, printed


def test_a_job_that_is_done_lets_all_machines_go(machines):
    two = machines(2)
    two.run()
    printed = two.run()
    assert "This job is done" in printed[0] and "This job is done" in printed[1]


def test_a_clusters_variables_change_nothing_unless_asked(machines):
    two = machines(2)
    codes, printed, _ = two.start(NODES="1", OUTPUT_PATH=[str(two.first.folder / name) for name in "ab"]).ended()
    assert codes == [0, 0], printed
    assert all("SKYPILOT_NUM_NODES=2 is a cluster's and is not read" in text for text in printed)
