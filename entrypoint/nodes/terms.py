"""What the nodes must agree on before anything starts: the plan, the program, and the files of the dataset and model.

Each node sends its terms to the first, which names every difference. The bytes of images are compared later, when the
trainers have read them; here it is the names and sizes of files, which need no reading.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from trainer import __version__
from trainer.spec.messages.secrets import in_addresses
from trainer.spec.plan import Plan, Source
from trainer.spec.rules.resume_rules import variable
from trainer.storage.read import read_regular

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "diffusers", "transformers", "peft")
LARGEST_MODULE = 1 << 24  # bytes
LOCAL_KINDS = ("folder", "archive")
Terms = dict[str, str]


def terms_of(plan: Plan, *, arrived: Collection[Path] = ()) -> Terms:
    """Name → value, as text. None of it is a secret.

    `arrived`: files of the model that come from an address, where some nodes may have the whole file, and others only
    its outline. Their names hold digests of the address and of the version, so the plan says which file it is.
    """
    terms = {"Kiln": f"{__version__}, code {_code()[:12]}"}
    for package in PACKAGES:
        terms[package] = importlib.metadata.version(package)
    for key, value in plan.essence().items():
        name, text = variable(key), _without_secret(str(value))
        terms[name] = f"{terms[name]}, {text}" if name in terms else text  # of several datasets
    sources: dict[Source, None] = {}
    for subset in plan.data.subsets:
        sources[subset.source] = None
    for source in sources:
        if source.kind in LOCAL_KINDS and "://" not in source.location:
            terms[f"files of {source.location}"] = _listing(Path(source.location))
    from_addresses = {path.resolve() for path in arrived}
    for place in (plan.model.source, *plan.model.parts.values()):
        if place and os.path.isabs(place):  # noqa: PTH117 (a repository's name is no path)
            if Path(place).resolve() in from_addresses:
                continue
            terms[f"files of {place}"] = _listing(Path(place))
    return terms


def differences(own: Terms, others: Mapping[int, Terms]) -> list[str]:
    """One line for each term in which a node differs from the first, whose terms are `own`."""
    lines = []
    for rank, terms in sorted(others.items()):
        for name in own.keys() | terms.keys():
            here, there = own.get(name, "nothing"), terms.get(name, "nothing")
            if here != there:
                lines.append(f"{name}: {here} on node 0, {there} on node {rank}")
    return sorted(lines)


def refusal(lines: list[str]) -> str:
    return (
        "The nodes do not agree on what to train:\n  "
        + "\n  ".join(lines)
        + "\nFix: start the same image with the same variables, dataset and kind of GPU on all nodes."
    )


def _without_secret(text: str) -> str:
    """An address may hold a key: then only whether it is the same can be said."""
    return f"digest {hashlib.sha256(text.encode()).hexdigest()[:12]}" if in_addresses(text) else text


def _code() -> str:
    """A digest of the program's own modules."""
    total = hashlib.sha256()
    for package in ("entrypoint", "trainer"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            total.update(str(path.relative_to(REPOSITORY)).encode() + read_regular(path, limit=LARGEST_MODULE))
    return total.hexdigest()


def _listing(place: Path) -> str:
    """How many files there are, and a digest of their names and sizes."""
    if place.is_file():
        return f"one file of {place.stat().st_size} bytes"
    found = []
    for folder, _, names in os.walk(place, followlinks=True):
        for name in names:
            path = Path(folder) / name
            if path.is_file():
                found.append(f"{path.relative_to(place)} {path.stat().st_size}")
    if not found:
        return "none"
    digest = hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()
    return f"{len(found)} files, names and sizes {digest[:12]}"
