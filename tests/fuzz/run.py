"""Many mutated inputs for each reader of foreign data: `python tests/fuzz/run.py --inputs 1000000 --seconds 3600`.

Within a second and a bound of memory, every input must give a result or a named error. An input that does not is
written to the corpus, so that `tests/fuzz/test_fuzz.py` fails until the reader is fixed. With the package atheris
installed, `--atheris TARGET` lets coverage guide the mutations of one target, until --inputs or --seconds are over.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import gc
import hashlib
import logging
import multiprocessing
import os
import random
import resource
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the Hub's client is imported
from tests.fuzz import targets
from tests.fuzz.targets import CORPUS, TARGETS, Target

SLOW_S = 1.0  # for one input
TAKEN = 10  # inputs that a process takes at once
MAX_INPUT_BYTES = 100_000


def mutated(rng: random.Random, data: bytes, words: tuple[bytes, ...], others: list[bytes]) -> bytes:
    """`data` with one to six changes: bits, bytes, cuts, repeats, words, pieces of other inputs."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randint(0, len(out))
        kind = rng.randrange(8)
        if kind == 0 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif kind == 1 and out:
            out[at % len(out)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            del out[at : at + rng.choice((1, 2, 4, 16, 64))]
        elif kind == 3:
            out[at:at] = out[at : at + rng.choice((1, 4, 16))] * rng.choice((1, 2, 20))
        elif kind == 4 and words:
            out[at:at] = rng.choice(words)
        elif kind == 5 and len(out) >= 4:
            size = rng.choice((1, 2, 4))
            at = min(at, len(out) - size)
            number = rng.choice((0, 1, 2**31 - 1, 2**32 - 1, rng.getrandbits(32)))
            out[at : at + size] = number.to_bytes(4, "little")[:size]
        elif kind == 6:
            other = rng.choice(others)
            start = rng.randint(0, len(other))
            out[at : at + 8] = other[start : start + rng.choice((4, 16, 64))]
        else:
            del out[max(at, 4) :]
    return bytes(out[:MAX_INPUT_BYTES])


def attempt(target: Target, data: bytes) -> str | None:
    """The fault of `target` at reading `data`; None if it has none."""
    began = time.monotonic()
    try:
        target.read(data)
    except target.allowed:
        pass
    except BaseException:
        if isinstance(sys.exc_info()[1], KeyboardInterrupt):
            raise
        return traceback.format_exc(limit=-4)
    took = time.monotonic() - began
    if target.is_run:  # its CPU time is bounded there
        return None
    return f"took {took:.1f} s" if took > SLOW_S and not _still_quick(target, data) else None


def _still_quick(target: Target, data: bytes) -> bool:
    """Reads it once more and counts CPU time: a busy machine is no failure."""
    began = time.process_time()
    with contextlib.suppress(*target.allowed):
        target.read(data)
    return time.process_time() - began <= SLOW_S


def main() -> int:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)  # a million refused inputs are no news
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=int, default=1_000_000, help="in all")
    parser.add_argument("--seconds", type=float, default=3600, help="in all, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    memory = "of address space for each process, beside what it has at its start; some allocators keep what was freed"
    parser.add_argument("--memory-gib", type=float, default=3.0, help=memory)
    parser.add_argument("--found", type=Path, default=CORPUS, help="the folder for inputs that fail")
    parser.add_argument("--only", choices=TARGETS, action="append")
    parser.add_argument("--atheris", choices=TARGETS)
    flags = parser.parse_args()
    if flags.atheris:
        return guided(flags.atheris, flags.inputs, flags.seconds)
    import trainer.checkpoints.state_files
    import trainer.job.run
    import trainer.lora_files.convert  # noqa: F401

    began = time.monotonic()
    found = campaign(tuple(flags.only or TARGETS), flags)
    for name, of_target in found.items():
        rate = of_target.count / max(of_target.cpu_s, 1.0)
        kinds = f"{len(of_target.kinds)} kinds of failure"
        print(f"{name}: {of_target.count} inputs, {rate:.0f} a second of CPU time, {kinds}")
    total = sum(of_target.count for of_target in found.values())
    failed = sum(len(of_target.kinds) for of_target in found.values())
    peak_mib = max(of_target.peak_kib for of_target in found.values()) / 1024
    took = time.monotonic() - began
    print(f"{total} inputs in {took:.0f} s, {failed} failures; peak memory {peak_mib:.0f} MiB")
    return 1 if failed else 0


# ---- many processes


class Found(NamedTuple):
    """What was found of a target. `kinds`: the last line of a failure → all of it, and its input."""

    count: int
    kinds: dict[str, tuple[str, bytes]]
    peak_kib: int
    cpu_s: float  # of all processes together


class Share:
    """The inputs that are left, which all processes take from, and the time at which they end."""

    def __init__(self, chosen: Sequence[str], flags: argparse.Namespace) -> None:
        self.chosen = chosen
        self.left = {name: multiprocessing.Value("q", flags.inputs // len(chosen)) for name in chosen}
        self.ends = time.monotonic() + flags.seconds

    def take(self, name: str) -> int:
        """How many inputs of a target a process may try next."""
        left = self.left[name]
        with left:
            taken: int = min(TAKEN, left.value)
            left.value -= taken
        return taken


class Worker:
    """A process that goes through all targets. What it is about to try is seen from here, also once it has crashed."""

    def __init__(self, share: Share, *, seed: str, memory_gib: float) -> None:
        self.current = multiprocessing.RawArray("B", 8 + MAX_INPUT_BYTES)  # the length of the input, and the input
        self.told, tells = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=self._work, args=(share, seed, memory_gib, tells))
        self.process.start()
        tells.close()

    def _work(self, share: Share, seed: str, memory_gib: float, tells: Connection) -> None:
        _limit(memory_gib)
        for number, name in enumerate(share.chosen):
            began = time.monotonic()
            tells.send(name)
            until = began + (share.ends - began) / (len(share.chosen) - number)
            tells.send(fuzz(name, share, until=until, seed=f"{name} {seed}", trying=self._trying))
        targets.remove_scratch()

    def _trying(self, data: bytes) -> None:
        record = len(data).to_bytes(8, "little") + data
        memoryview(self.current).cast("B")[: len(record)] = record

    def found(self) -> Iterator[tuple[str, Found]]:
        """What it finds of each target, until its end."""
        name = ""
        try:
            while True:
                name = self.told.recv()
                yield name, self.told.recv()
                name = ""
        except EOFError:
            self.process.join()
        if name:
            record = bytes(self.current)
            data = record[8 : 8 + int.from_bytes(record[:8], "little")]
            problem = f"the process ended with {self.process.exitcode}"
            yield name, Found(1, {problem: (problem, data)}, 0, 0.0)


def campaign(chosen: Sequence[str], flags: argparse.Namespace) -> dict[str, Found]:
    """All that is found of each target. An input that fails is written and printed as soon as its process is done."""
    share = Share(chosen, flags)
    found = dict.fromkeys(chosen, Found(0, {}, 0, 0.0))
    workers = []
    for number in range(flags.processes):
        workers.append(Worker(share, seed=f"{flags.seed} {number}", memory_gib=flags.memory_gib))
    one_at_a_time = threading.Lock()

    def listen(worker: Worker) -> None:
        for name, part in worker.found():
            with one_at_a_time:
                so_far = found[name]
                for kind, (problem, data) in part.kinds.items():
                    if kind not in so_far.kinds:
                        print(
                            f"{name}: {_written(flags.found / name, TARGETS[name].as_kept(data))}: {problem}",
                            flush=True,
                        )
                kinds = {**part.kinds, **so_far.kinds}
                peak_kib = max(so_far.peak_kib, part.peak_kib)
                found[name] = Found(so_far.count + part.count, kinds, peak_kib, so_far.cpu_s + part.cpu_s)

    with concurrent.futures.ThreadPoolExecutor(flags.processes) as pool:
        list(pool.map(listen, workers))
    return found


def _written(folder: Path, data: bytes) -> str:
    place = folder / f"found-{hashlib.sha256(data).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)
    return place.name


def _limit(memory_gib: float) -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + int(memory_gib * 2**30), resource.RLIM_INFINITY))


def fuzz(name: str, share: Share, *, until: float, seed: str, trying: Callable[[bytes], None]) -> Found:
    """Mutate the corpus of one target. `trying`: is told each input before it is tried."""
    target = TARGETS[name]
    known = targets.seeds()[name]
    rng = random.Random(seed)
    began = time.process_time()
    kinds: dict[str, tuple[str, bytes]] = {}
    count = 0
    while time.monotonic() < until and (taken := share.take(name)):
        for _ in range(taken):
            data = rng.randbytes(8) if target.is_run else mutated(rng, rng.choice(known), target.words, known)
            trying(data)
            problem = attempt(target, data)
            count += 1
            if problem:
                kinds.setdefault(problem.strip().splitlines()[-1][:60], (problem, data))
        if count == taken:  # all is imported by now, and need not be looked through by each collection of garbage
            gc.collect()
            gc.freeze()
    return Found(count, kinds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time() - began)


def guided(name: str, inputs: int, seconds: float) -> int:
    """Let atheris mutate, guided by the coverage of our code."""
    import atheris

    with atheris.instrument_imports(include=["entrypoint", "trainer"]):
        for module in [m for m in sys.modules if m.split(".")[0] in ("entrypoint", "trainer")]:
            del sys.modules[module]
        import importlib

        importlib.reload(targets)
        for module in (
            "trainer.checkpoints.state_files",
            "trainer.lora_files.convert",
        ):  # not within the time of the first input
            importlib.import_module(module)
    target = targets.TARGETS[name]

    def one(data: bytes) -> None:
        with contextlib.suppress(*target.allowed):
            target.read(data)

    new = targets.folder() / "new"  # for inputs that reach new code; failing ones go to the working directory
    new.mkdir()
    bounds = [f"-runs={inputs}", f"-max_total_time={seconds:.0f}", "-max_len=4096", "-timeout=5"]
    atheris.Setup([sys.argv[0], *bounds, "-print_final_stats=1", str(new), str(CORPUS / name)], one)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
