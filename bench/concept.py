"""How well a miniature learns in each weight format: the concept score after the demo's job, for several seeds.

    python -m bench concept --family flux --precision bf16 fp8

The job is that of `make demo`; the score is of the samples that it draws at the end (docs/miniatures.md). `spread`: the
standard deviation over the seeds. `apart`: the difference from the first format, in standard errors of a difference.
`control`: the score of the red circle, as a share of what it was before training. `--set` changes variables of the job,
and `--keep` has the contact sheets copied into a folder.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.report import Report, options
from trainer.families.miniatures.score import CONTROL, by_step

ROOT = Path(__file__).resolve().parents[1]
CONCEPT = ROOT / "trainer" / "families" / "miniatures" / "concept"


def demo(name: str) -> dict[str, str]:
    """The variables with which `make demo MODEL=name` trains."""
    command = ["make", "--dry-run", "--always-make", "demo", f"MODEL={name.replace('_', '-')}"]
    commands = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    job = next(line for line in commands.replace("\\\n", " ").splitlines() if "BASE_MODEL=" in line)
    variables = {"DATASET_NAME": ""}  # whatever the environment says
    for word in job.split():
        variable, given, value = word.partition("=")
        if given and variable.startswith(("PARAMS_", "BASE_MODEL", "DATASET_")):
            variables[variable] = value
    variables["DATASET_CONFIG"] = str(ROOT / variables["DATASET_CONFIG"])
    return variables


def score(name: str, precision: str, seed: int, folder: Path, changes: dict[str, str]) -> tuple[float, float]:
    """The concept score at the end of one job, and the control's as a share of what it was."""
    out = folder / f"{precision}-{seed}"
    variables = demo(name) | changes
    settings = {
        **variables,
        "SAMPLE_PROMPTS": str(CONCEPT / "prompts.txt"),
        "TRIGGER_WORD": "",
        "OUTPUT_PATH": str(out),
        "CACHE_PATH": str(folder / "cache"),
        "PARAMS_SAMPLE_EVERY_N_STEPS": variables["PARAMS_MAX_STEPS"],
        "PARAMS_SAVE_EVERY_N_STEPS": "0",
        "PARAMS_PRECISION": precision,
        "PARAMS_SEED": str(seed),
    }
    job = subprocess.run([sys.executable, "-m", "entrypoint"], cwd=ROOT, env={**os.environ, **settings}, check=False)
    if job.returncode:
        raise SystemExit(f"The job in {precision} with seed {seed} ended with exit code {job.returncode}.")
    scores = by_step(out / "sample")
    controls = by_step(out / "sample", CONTROL)
    before = statistics.mean(controls[min(controls)])
    after = statistics.mean(controls[max(controls)])
    return statistics.mean(scores[max(scores)]), after / max(before, 1e-6)


def main(arguments: list[str]) -> None:
    parser = options(__doc__)
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp8"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="variables of the job")
    parser.add_argument("--keep", type=Path, help="a folder for the contact sheets")
    flags = parser.parse_args(arguments)
    report = Report(f"{flags.family}: concept score in each format", flags.markdown)
    changes = dict(word.split("=", 1) for word in flags.set)
    first: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for precision in flags.precision:
            scores = []
            controls = []
            for seed in range(flags.seeds):
                concept, control = score(flags.family, precision, seed, Path(folder), changes)
                scores.append(concept)
                controls.append(control)
                if flags.keep:
                    flags.keep.mkdir(parents=True, exist_ok=True)
                    sheet = Path(folder) / f"{precision}-{seed}" / "sample" / "contact-sheet.png"
                    label = "-".join([flags.family, precision, str(seed), *changes.values()])
                    shutil.copy(sheet, flags.keep / f"{label}.png")
            first = first or scores
            difference = statistics.mean(scores) - statistics.mean(first)
            error = 0.0
            if flags.seeds > 1:
                variances = [statistics.variance(values) / len(values) for values in (scores, first)]
                error = sum(variances) ** 0.5
            report.row(
                {
                    "format": precision,
                    "concept": round(statistics.mean(scores), 3),
                    "spread": round(statistics.stdev(scores), 3) if flags.seeds > 1 else 0.0,
                    "apart": round(difference / error, 1) if error else 0.0,
                    "control": round(statistics.mean(controls), 3),
                    "changed": " ".join(flags.set),
                    "each": [round(value, 2) for value in scores],
                }
            )
