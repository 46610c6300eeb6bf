"""What a miniature has learnt in each format: the concept's number after the demo's job, for several seeds.

    python -m bench concept --family flux --precision bf16 fp8

The job is that of `make demo`, with its own samples at the end (docs/miniatures.md). `spread`: the standard deviation
over the seeds. `apart`: the difference to the first format, in standard errors of such a difference.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.report import Report, options
from trainer.families.miniatures.score import by_step

ROOT = Path(__file__).resolve().parents[1]
CONCEPT = ROOT / "trainer" / "families" / "miniatures" / "concept"


def demo(name: str) -> dict[str, str]:
    """The variables of `make demo MODEL=name` that say how is trained."""
    command = ["make", "--dry-run", "--always-make", "demo", f"MODEL={name}"]
    words = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    job = next(line for line in words.replace("\\\n", " ").splitlines() if "BASE_MODEL=" in line)
    given = dict(word.split("=", 1) for word in job.split() if word.startswith(("PARAMS_", "BASE_MODEL=")))
    return {**given, "DATASET_NAME": str(CONCEPT)}


def learnt(name: str, precision: str, seed: int, folder: Path) -> float:
    """The concept's number at the end of one job."""
    given, out = demo(name), folder / f"{precision}-{seed}"
    settings = {
        **given,
        "SAMPLE_PROMPTS": str(CONCEPT / "prompts.txt"),
        "TRIGGER_WORD": "",
        "OUTPUT_PATH": str(out),
        "CACHE_PATH": str(folder / "cache"),
        "PARAMS_SAMPLE_EVERY_N_STEPS": given["PARAMS_MAX_STEPS"],
        "PARAMS_SAVE_EVERY_N_STEPS": "0",
        "PARAMS_PRECISION": precision,
        "PARAMS_SEED": str(seed),
    }
    job = subprocess.run([sys.executable, "-m", "entrypoint"], cwd=ROOT, env={**os.environ, **settings}, check=False)
    if job.returncode:
        raise SystemExit(f"The job in {precision} with seed {seed} ended with {job.returncode}.")
    found = by_step(out / "sample")
    return statistics.mean(found[max(found)])


def main(arguments: list[str]) -> None:
    parser = options(__doc__)
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp8"])
    parser.add_argument("--seeds", type=int, default=5)
    asked = parser.parse_args(arguments)
    report = Report(f"{asked.family}: what is learnt in each format", asked.markdown)
    first: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for precision in asked.precision:
            values = [learnt(asked.family, precision, seed, Path(folder)) for seed in range(asked.seeds)]
            first = first or values
            error = sum(statistics.variance(some) / len(some) for some in (values, first)) ** 0.5
            report.row(
                {
                    "format": precision,
                    "concept": round(statistics.mean(values), 3),
                    "spread": round(statistics.stdev(values), 3),
                    "apart": round((statistics.mean(values) - statistics.mean(first)) / error, 1) if error else 0.0,
                    "each": [round(value, 2) for value in values],
                }
            )
