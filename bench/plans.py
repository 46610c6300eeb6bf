"""The plan for hardware that need not be there: the strategy for each batch size, and its predicted memory.

    python -m bench plans --family flux --vendor amd --architecture gfx942 --memory 192 --batch 4 8 16 32 48 60
    python -m bench plans --cards

Rank 16, AdamW, at the sizes of `python -m bench step`. `--cards`: what `auto` chooses for each family on cards that
people have, with the predicted seconds of a step, as the tables of docs/performance.md (`bench.cards`).
"""

from __future__ import annotations

from bench import cards
from bench.report import Report, options
from bench.step import RANK, SIZES
from entrypoint.system.hardware import Hardware
from trainer.spec import memory_model, strategies
from trainer.spec.family import get_family


def main(arguments: list[str]) -> None:
    if arguments == ["--cards"]:
        print(cards.tables())
        return
    parser = options(__doc__)
    parser.add_argument("--vendor", default="nvidia")
    parser.add_argument("--architecture", default="9.0")
    parser.add_argument("--memory", type=float, default=139.0, help="of the device, in GiB")
    parser.add_argument("--host", type=float, default=500.0, help="host memory that may be pinned, in GiB")
    parser.add_argument("--precision", help="default: what PARAMS_PRECISION=auto may choose")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 60])
    asked = parser.parse_args(arguments)
    hardware = Hardware(asked.vendor, asked.architecture, asked.memory, 1, "", 2 * asked.host, 32)
    footprint = next(m.footprint for m in get_family(asked.family).FACTS.models.values() if m.footprint)
    width, height = SIZES[asked.family]
    precisions = (asked.precision,) if asked.precision else hardware.auto_precisions
    report = Report(f"{asked.family} on {hardware}", asked.markdown)
    for batch in asked.batch:
        workload = memory_model.Workload(width * height, batch, RANK, "adamw")
        candidates = memory_model.candidates(footprint, workload, precisions)
        strategy = memory_model.choose(footprint, workload, candidates, have_gib=asked.memory, host_gib=asked.host)
        report.row(
            {
                "batch": batch,
                "weights": strategy.precision,
                "way": strategies.described(strategy.recompute, strategy.kept_blocks, strategy.offload),
                "predicted GiB": round(strategy.gib, 1),
                "on the host": round(memory_model.pinned_host_gib(footprint, workload, strategy), 1),
                "fits": strategy.gib <= asked.memory * memory_model.MAX_USABLE_SHARE,
            }
        )
