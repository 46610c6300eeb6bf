"""dataset-images.jsonl: how each image is trained, for the monitor page. dataset-report.csv is the table for people.

The first line says how many there are. Then each image has a line, in the order of the scan, and after them each that
is skipped. An image is found below the folder of its source (`place`, in the plan) by `file`: no path of this machine
is in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.data.caption_length import Reader
from trainer.data.epochs import EpochSampler
from trainer.data.records import ImageRecord, Scan
from trainer.spec.plan import DataPlan
from trainer.storage import atomic, json_files, own_files

MOST_IMAGES = 10_000  # that are listed: nobody looks at more
MOST_SKIPPED = 1_000


def write_dataset_view(
    path: Path, scanned: Scan, data: DataPlan, sampler: EpochSampler, *, reader: Reader | None
) -> None:
    """Write the file. `reader`: counts the tokens of captions, if there is one."""
    json_files.set_aside_unless(path, own_files.is_dataset_view)
    head: dict[str, Any] = {
        own_files.DATASET_VIEW_MARK: 1,
        "images": len(scanned.images),
        "skipped": len(scanned.skipped),
    }
    if reader is not None:
        head |= {"reader": reader.name, "limit": reader.limit}
    rows = [head, *_images(scanned, data, sampler, reader=reader)]
    for skipped in scanned.skipped[:MOST_SKIPPED]:
        rows.append({"name": skipped.name, "reason": skipped.reason})
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    atomic.write_text(path, text.encode("utf-8", "replace").decode("utf-8") + "\n")


def _images(scanned: Scan, data: DataPlan, sampler: EpochSampler, *, reader: Reader | None) -> Iterator[dict[str, Any]]:
    listed = scanned.images[:MOST_IMAGES]
    shown = sampler.shown(listed)
    held_out = {image.key for image in sampler.held_out}
    for image in listed:
        own, texts = shown.get(image.key, ((), ()))
        row: dict[str, Any] = {"name": image.name, "file": _file(image, data), "place": _place(image)}
        row |= {"size": [image.width, image.height], "views": len(own), "captions": list(texts)}
        if own:  # else a regularisation image that is not used
            row |= {"bucket": own[0].size, "scaled": own[0].scaled, "offset": own[0].offset}
        if reader is not None:
            row["tokens"] = [reader.count(text) for text in texts]
        if image.captioned_by:
            row["captioned_by"] = image.captioned_by
        if image.mask_sha256:
            row["mask"] = True
        if image.key in held_out:
            row["held_out"] = True
        if data.datasets[image.dataset].subsets[image.subset].is_reg:
            row["regularisation"] = True
        yield row


def _place(image: ImageRecord) -> list[int]:
    """Dataset and subset of the plan that the image comes from."""
    return [image.dataset, image.subset if image.part_of is None else image.part_of]


def _file(image: ImageRecord, data: DataPlan) -> str:
    """Where the image is below the folder of its source; "" where it is elsewhere, or in a shard."""
    if image.span is not None:
        return ""
    dataset, subset = _place(image)
    folder = Path(data.datasets[dataset].subsets[subset].source.path).absolute()
    file = image.file.absolute()
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else ""
