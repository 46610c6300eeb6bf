"""Predicted and measured peaks of a training step, for all memory modes with weights on the device.

    python -m bench memory --family flux --batch 1 4 16

`off`: the measured peak minus the predicted one, in GiB. A mode that does not fit has "out of memory" as its peak.
"""

from __future__ import annotations

from bench import step
from bench.report import Report, options
from trainer.spec.strategies import MEMORY_MODES


def main(arguments: list[str]) -> None:
    parser = options(__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--precision", nargs="+", default=["fp8"])
    asked = parser.parse_args(arguments)
    report = Report(f"{asked.base or asked.family}: predicted and measured peaks", asked.markdown)
    for precision in asked.precision:
        step.free()
        bench = step.Bench(asked.family, precision, base=asked.base, small=asked.small)
        for mode in MEMORY_MODES:
            if not mode.weights_on_device:
                continue
            if mode.offload != "none" and asked.small:
                continue  # --small runs on the CPU, which has nowhere to offload to
            variant = f"{precision}+{mode.recompute}"
            if mode.offload != "none":
                variant += "+host"
            for batch in asked.batch:
                row = step.measure(bench, variant, batch)
                if isinstance(row.get("peak_gib"), float) and "predicted_gib" in row:
                    row["off"] = round(row["peak_gib"] - row["predicted_gib"], 2)
                report.row(row)
        del bench
