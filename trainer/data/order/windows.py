"""Windows: parts of a dataset that the cache holds one after another, where it cannot hold all of it.

Which images share a window is drawn once from the seed, and is the same in every epoch; so an epoch always has as many
steps. The order of the windows and the order within each are another one in each epoch. Images that come with the same
shard (`unit`) stay together, so that each shard is needed in one window alone.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Callable, Hashable, Sequence

from trainer.data.records import ImageRecord

Unit = Callable[[ImageRecord], Hashable]


def assign(
    images: Sequence[ImageRecord], *, size: Callable[[ImageRecord], int], budget: int, seed: int, unit: Unit | None
) -> array[int]:
    """The number of the window of each image, by its place. `size`: bytes in the cache; `budget`: those of a window.

    Windows are about equally large; where `budget` has no room for two units, a window may have two all the same.
    `unit`: None where each image is one.
    """
    numbers = array("I")  # of the unit of each image
    sizes = array("Q")
    known: dict[Hashable, int] = {}
    for place, image in enumerate(images):
        number = place if unit is None else known.setdefault(unit(image), len(known))
        if number == len(sizes):
            sizes.append(0)
        sizes[number] += size(image)
        numbers.append(number)
    total = sum(sizes)
    largest = max(sizes, default=0)
    # A window ends with the unit that fills it: so it may be larger than its even share by one unit.
    count = math.ceil(total / max(budget - largest, largest, 1))
    window_of_unit = array("I", bytes(array("I").itemsize * len(sizes)))
    order = array("I", range(len(sizes)))
    random.Random(f"{seed}/windows").shuffle(order)
    window = filled = 0
    for number in order:
        window_of_unit[number] = window
        filled += sizes[number]
        if filled * count >= (window + 1) * total:
            window += 1
    return array("I", (window_of_unit[number] for number in numbers))
