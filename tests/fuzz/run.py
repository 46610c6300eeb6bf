"""Many mutated inputs for each reader of foreign data: `python tests/fuzz/run.py --inputs 1000000 --seconds 3600`.

Within a second and a bound of memory, every input must give a result or a named error. An input that does not is
written to the corpus, so that `tests/fuzz/test_fuzz.py` fails until the reader is fixed. With the package atheris
installed, `--atheris TARGET` lets coverage guide the mutations of one target, until --inputs or --seconds are over.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import hashlib
import logging
import multiprocessing
import os
import random
import resource
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the Hub's client is imported
from tests.fuzz import targets
from tests.fuzz.targets import CORPUS, TARGETS, Target

SLOW_S = 1.0  # for one input
MEMORY_BYTES = 3 * 2**30  # of address space, in addition to the program's at its start
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
    parser.add_argument("--only", choices=TARGETS, action="append")
    parser.add_argument("--atheris", choices=TARGETS)
    flags = parser.parse_args()
    if flags.atheris:
        return guided(flags.atheris, flags.inputs, flags.seconds)
    import trainer.checkpoints.state_files
    import trainer.job.run
    import trainer.lora_files.convert  # noqa: F401

    chosen = flags.only or [*TARGETS]
    inputs = flags.inputs // len(chosen) // flags.processes
    failed = total = 0
    peak_kib = 0
    for name in chosen:
        began = time.monotonic()
        seeds = [f"{name} {flags.seed} {i}" for i in range(flags.processes)]
        share = functools.partial(fuzz, name, inputs, flags.seconds / len(chosen))
        context = multiprocessing.get_context("fork")
        with concurrent.futures.ProcessPoolExecutor(flags.processes, context, _limited) as pool:
            found = [*pool.map(share, seeds)]
        count = sum(part.count for part in found)
        kinds = {kind: failure for part in found for kind, failure in part.kinds.items()}
        for problem, data in kinds.values():
            place = CORPUS / name / f"found-{hashlib.sha256(data).hexdigest()[:12]}"
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(TARGETS[name].as_kept(data))
            print(f"{name}: {place.name}: {problem}")
        took = time.monotonic() - began
        print(f"{name}: {count} inputs in {took:.0f} s, {len(kinds)} kinds of failure", flush=True)
        total, failed = total + count, failed + len(kinds)
        peak_kib = max(peak_kib, *(part.peak_kib for part in found))
    print(f"{total} inputs, {failed} failures; peak memory {peak_kib / 1024:.0f} MiB")
    return 1 if failed else 0


class Found(NamedTuple):
    """What one process has found. `kinds`: the last line of a failure → all of it, and its input."""

    count: int
    kinds: dict[str, tuple[str, bytes]]
    peak_kib: int


def _limited() -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, resource.RLIM_INFINITY))


def fuzz(name: str, inputs: int, seconds: float, seed: str) -> Found:
    """Mutate the corpus of one target."""
    target = TARGETS[name]
    known = targets.seeds()[name]
    rng = random.Random(seed)
    began = time.monotonic()
    kinds: dict[str, tuple[str, bytes]] = {}
    count = 0
    while count < inputs and time.monotonic() - began < seconds:
        data = rng.randbytes(8) if target.is_run else mutated(rng, rng.choice(known), target.words, known)
        problem = attempt(target, data)
        count += 1
        if problem:
            kinds.setdefault(problem.strip().splitlines()[-1][:60], (problem, data))
    targets.remove_scratch()
    return Found(count, kinds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


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
