"""The batches of one epoch as numbers: 14 bytes for each example, which is made when its batch is asked for."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from trainer.data.order.variants import Batch, Example, Variants

DROPPED = 255  # in the place of a caption's number: this occurrence has none


class Drawn:
    """What was drawn for the occurrences of an epoch, in the order in which they were drawn."""

    def __init__(self) -> None:
        self._images = array("I")  # places in the sampler's pools
        self._views = bytearray()  # numbers in the pool
        self._captions = bytearray()

    def __len__(self) -> int:
        return len(self._images)

    def append(self, image: int, view: int, caption: int) -> int:
        """The number of the new occurrence. `caption`: or DROPPED."""
        self._images.append(image)
        self._views.append(view)
        self._captions.append(caption)
        return len(self._images) - 1

    def image(self, number: int) -> int:
        return self._images[number]

    def example(self, number: int, variants: Variants) -> Example:
        """The occurrence with this number. `variants`: of its image."""
        caption = self._captions[number]
        text = "" if caption == DROPPED else variants.captions[caption]
        return Example(variants.image, variants.views[self._views[number]], text, variants.weight)


@dataclass(frozen=True)
class Span:
    """The part of an epoch that is one window: its steps and its batches, counted from the epoch's beginning."""

    window: int
    steps: range
    batches: range
    batches_per_step: int

    def of_step(self, step: int) -> range:
        """The places of a step's batches in the epoch."""
        begin = (step - self.steps.start) * self.batches_per_step
        return self.batches[begin : begin + self.batches_per_step]


class Epoch(Sequence[Batch]):
    """The batches of an epoch, in order.

    `variants`: the pool of the image at a place. `kind`: of the image at a place, all that decides what a step with it
    needs, besides how many images it has.
    """

    def __init__(self, drawn: Drawn, variants: Callable[[int], Variants], kind: Callable[[int], object]) -> None:
        self._drawn = drawn
        self._variants = variants
        self._kind = kind
        self._occurrences = array("I")  # of all batches, one after the other
        self._begins = array("I", [0])  # of each batch that was added in `_occurrences`, and the end of the last
        self.order = array("I")  # numbers of batches: that in which they are trained
        self._windows: list[tuple[int, int]] = []  # number of each window, and the place in `order` where it ends

    def add_bucket(self, occurrences: array[int], batch_size: int) -> None:
        """Cut the occurrences of one bucket into batches."""
        first = len(self._occurrences)
        self._occurrences += occurrences
        for begin in range(0, len(occurrences), batch_size):
            self.order.append(len(self._begins) - 1)
            self._begins.append(first + min(begin + batch_size, len(occurrences)))

    def end_window(self, number: int, rng: random.Random) -> None:
        """The batches that were added since the last call are those of a window; their order is drawn."""
        begin = self._windows[-1][1] if self._windows else 0
        own = self.order[begin:]
        rng.shuffle(own)
        self.order[begin:] = own
        self._windows.append((number, len(self.order)))

    def span(self, step: int, batches_per_step: int) -> Span:
        """The part of the epoch that has `step`, counted from 0. The last step of a window may have fewer batches."""
        first_step = first_batch = 0
        for number, end in self._windows:
            steps = math.ceil((end - first_batch) / batches_per_step)
            if step < first_step + steps:
                return Span(number, range(first_step, first_step + steps), range(first_batch, end), batches_per_step)
            first_step += steps
            first_batch = end
        raise IndexError(step)

    def outline(self, places: Sequence[int] | None = None) -> list[Batch]:
        """In order, the first and the last batch of each kind and number of images, of all or of those at `places`.

        For whoever looks for sizes: the whole epoch, or these places, have no others.
        """
        first: dict[object, int] = {}
        last: dict[object, int] = {}
        for place in range(len(self)) if places is None else places:
            occurrences = self._of(self.order[place])
            kinds = frozenset(self._kind(self._drawn.image(occurrence)) for occurrence in occurrences)
            size = (len(occurrences), kinds)
            first.setdefault(size, place)
            last[size] = place
        return [self[place] for place in sorted({*first.values(), *last.values()})]

    def _of(self, number: int) -> array[int]:
        return self._occurrences[self._begins[number] : self._begins[number + 1]]

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, place: int) -> Batch: ...
    @overload
    def __getitem__(self, place: slice) -> list[Batch]: ...
    def __getitem__(self, place: int | slice) -> Batch | list[Batch]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        examples = []
        for occurrence in self._of(self.order[place]):
            examples.append(self._drawn.example(occurrence, self._variants(self._drawn.image(occurrence))))
        return tuple(examples)

    def __iter__(self) -> Iterator[Batch]:
        for place in range(len(self)):
            yield self[place]

    def __eq__(self, other: object) -> bool:
        """Equal to any sequence of equal batches."""
        return isinstance(other, Sequence) and len(other) == len(self) and all(map(_equal, self, other))

    __hash__ = None  # type: ignore[assignment]


def _equal(one: Batch, other: object) -> bool:
    return one == other
