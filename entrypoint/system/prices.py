"""What a GPU costs an hour at RunPod, in US dollars: approximate, for comparing GPUs before one is rented.

They come from public transcriptions of RunPod's page, of different months: prices that are a year apart compare badly.

`python -m entrypoint quote --prices FILE` takes other ones: a JSON object of names and prices, as
`python -m entrypoint.runpod gpus --json` prints today's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from entrypoint.system.cards import hardware_of
from trainer.spec.errors import SettingsError
from trainer.spec.values import show
from trainer.storage.read import read_text

SOURCE = "https://www.runpod.io/pricing, Secure Cloud"
LARGEST_FILE = 1 << 20  # bytes


class Offer(NamedTuple):
    """A GPU to rent. `seen`: the month of the price, or its year; "" where the user has given it."""

    card: str  # a name that `entrypoint.system.cards.hardware_of` knows
    per_hour: float
    seen: str = ""


OFFERS = (
    Offer("RTX A4000", 0.29, "2025"),
    Offer("RTX A4500", 0.34, "2025"),
    Offer("RTX A5000", 0.26, "2025"),
    Offer("RTX A6000", 0.49, "2025"),
    Offer("RTX 3090", 0.43, "2025"),
    Offer("RTX 2000 Ada", 0.24, "2026-01"),
    Offer("RTX 4000 Ada", 0.26, "2026-01"),
    Offer("L4", 0.39, "2026-01"),
    Offer("RTX 4090", 0.59, "2026-01"),
    Offer("RTX 6000 Ada", 0.77, "2026-01"),
    Offer("L40S", 0.86, "2026-01"),
    Offer("RTX 5090", 0.89, "2026-01"),
    Offer("L40", 0.99, "2026-01"),
    Offer("RTX PRO 6000", 1.84, "2026-01"),
    Offer("H200 NVL", 3.39, "2026-01"),
    Offer("A40", 0.44, "2026-08"),
    Offer("H200 SXM", 4.59, "2026-10"),
    Offer("B200", 6.79, "2026-10"),
    Offer("B300", 7.89, "2026-10"),
    Offer("A100 80GB", 1.79, "2026-11"),
    Offer("H100 PCIe", 2.89, "2026-11"),
    Offer("H100 NVL", 3.19, "2026-11"),
    Offer("H100 SXM", 3.99, "2026-11"),
)


def read_offers(path: Path) -> tuple[tuple[Offer, ...], list[str]]:
    """The offers of a file, and the names in it that no card has. Raises SettingsError for anything else."""
    try:
        found = json.loads(read_text(path, limit=LARGEST_FILE))
    except OSError as problem:
        raise SettingsError(f"--prices {path}: {problem.strerror}.") from problem
    except (ValueError, RecursionError) as problem:
        raise SettingsError(f'--prices {path} is not JSON. Fix: write it as {{"RTX 4090": 0.59}}.') from problem
    if not isinstance(found, dict) or not found:
        raise SettingsError(f'--prices {path} is not an object of prices. Fix: write it as {{"RTX 4090": 0.59}}.')
    offers: list[Offer] = []
    unknown: list[str] = []
    for name, price in found.items():
        if isinstance(price, bool) or not isinstance(price, int | float) or not 0 < price < 1e5:
            raise SettingsError(f"--prices {path}: {show(name)} is no price an hour. Allowed: above 0, below 100000.")
        try:
            hardware_of(name)
            offers.append(Offer(name, float(price)))
        except SettingsError:
            unknown.append(name)
    return tuple(offers), unknown
