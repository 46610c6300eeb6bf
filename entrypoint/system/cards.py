"""The accelerators that `--check --gpu NAME` can plan for on a machine that does not have them.

Memory is what the driver reports (nvidia-smi, amd-smi), which is a little less than the name says.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from entrypoint.system.hardware import Hardware
from trainer.spec.errors import SettingsError
from trainer.spec.values import nearest, show


class Card(NamedTuple):
    """One model of accelerator. `architecture`: compute capability or gfx name. `memory_mib`: of one device."""

    name: str
    vendor: str  # as in `Hardware`
    architecture: str
    memory_mib: int


CARDS = (
    Card("GTX 1080 Ti", "nvidia", "6.1", 11_264),
    Card("V100 16GB", "nvidia", "7.0", 16_384),
    Card("V100 32GB", "nvidia", "7.0", 32_768),
    Card("T4", "nvidia", "7.5", 15_360),
    Card("RTX 2060 12GB", "nvidia", "7.5", 12_288),
    Card("RTX 2070", "nvidia", "7.5", 8_192),
    Card("RTX 2080", "nvidia", "7.5", 8_192),
    Card("RTX 2080 Ti", "nvidia", "7.5", 11_264),
    Card("A100 40GB", "nvidia", "8.0", 40_960),
    Card("A100 80GB", "nvidia", "8.0", 81_920),
    Card("A30", "nvidia", "8.0", 24_576),
    Card("RTX 3050 8GB", "nvidia", "8.6", 8_192),
    Card("RTX 3060", "nvidia", "8.6", 12_288),
    Card("RTX 3060 Ti", "nvidia", "8.6", 8_192),
    Card("RTX 3070", "nvidia", "8.6", 8_192),
    Card("RTX 3070 Ti", "nvidia", "8.6", 8_192),
    Card("RTX 3080", "nvidia", "8.6", 10_240),
    Card("RTX 3080 12GB", "nvidia", "8.6", 12_288),
    Card("RTX 3080 Ti", "nvidia", "8.6", 12_288),
    Card("RTX 3090", "nvidia", "8.6", 24_576),
    Card("RTX 3090 Ti", "nvidia", "8.6", 24_564),
    Card("RTX A2000 12GB", "nvidia", "8.6", 12_282),
    Card("RTX A4000", "nvidia", "8.6", 16_376),
    Card("RTX A4500", "nvidia", "8.6", 20_470),
    Card("RTX A5000", "nvidia", "8.6", 24_564),
    Card("RTX A6000", "nvidia", "8.6", 49_140),
    Card("A10", "nvidia", "8.6", 23_028),
    Card("A10G", "nvidia", "8.6", 23_028),
    Card("A16", "nvidia", "8.6", 15_356),
    Card("A40", "nvidia", "8.6", 46_068),
    Card("L4", "nvidia", "8.9", 23_034),
    Card("L40", "nvidia", "8.9", 46_068),
    Card("L40S", "nvidia", "8.9", 46_068),
    Card("RTX 2000 Ada", "nvidia", "8.9", 16_380),
    Card("RTX 4000 Ada", "nvidia", "8.9", 20_475),
    Card("RTX 4500 Ada", "nvidia", "8.9", 24_570),
    Card("RTX 5000 Ada", "nvidia", "8.9", 32_760),
    Card("RTX 6000 Ada", "nvidia", "8.9", 49_140),
    Card("RTX 4060", "nvidia", "8.9", 8_188),
    Card("RTX 4060 Ti", "nvidia", "8.9", 8_188),
    Card("RTX 4060 Ti 16GB", "nvidia", "8.9", 16_380),
    Card("RTX 4070", "nvidia", "8.9", 12_282),
    Card("RTX 4070 Super", "nvidia", "8.9", 12_282),
    Card("RTX 4070 Ti", "nvidia", "8.9", 12_282),
    Card("RTX 4070 Ti Super", "nvidia", "8.9", 16_376),
    Card("RTX 4080", "nvidia", "8.9", 16_376),
    Card("RTX 4080 Super", "nvidia", "8.9", 16_376),
    Card("RTX 4090", "nvidia", "8.9", 24_564),
    Card("RTX 4090 D", "nvidia", "8.9", 24_564),
    Card("H100", "nvidia", "9.0", 81_559),
    Card("H100 NVL", "nvidia", "9.0", 95_830),
    Card("GH200", "nvidia", "9.0", 97_871),
    Card("H200", "nvidia", "9.0", 143_771),
    Card("H200 NVL", "nvidia", "9.0", 143_771),
    Card("B200", "nvidia", "10.0", 183_359),
    Card("B300", "nvidia", "10.3", 275_040),
    Card("RTX 5060", "nvidia", "12.0", 8_151),
    Card("RTX 5060 Ti", "nvidia", "12.0", 8_151),
    Card("RTX 5060 Ti 16GB", "nvidia", "12.0", 16_311),
    Card("RTX 5070", "nvidia", "12.0", 12_227),
    Card("RTX 5070 Ti", "nvidia", "12.0", 16_303),
    Card("RTX 5080", "nvidia", "12.0", 16_303),
    Card("RTX 5090", "nvidia", "12.0", 32_607),
    Card("RTX PRO 4000 Blackwell", "nvidia", "12.0", 24_467),
    Card("RTX PRO 4500 Blackwell", "nvidia", "12.0", 32_623),
    Card("RTX PRO 5000 Blackwell", "nvidia", "12.0", 48_935),
    Card("RTX PRO 6000 Blackwell", "nvidia", "12.0", 97_887),
    Card("MI210", "amd", "gfx90a", 65_520),
    Card("MI250", "amd", "gfx90a", 65_520),
    Card("MI300X", "amd", "gfx942", 196_592),
    Card("MI325X", "amd", "gfx942", 262_128),
    Card("MI350X", "amd", "gfx950", 294_896),
    Card("MI355X", "amd", "gfx950", 294_896),
    Card("RX 7900 XTX", "amd", "gfx1100", 24_560),
    Card("RX 9070 XT", "amd", "gfx1201", 16_304),
)
# Words of the names that shops and RunPod's catalog use, which say nothing that the table does not have.
NOISE = r"nvidia|geforce|amd|instinct|radeon|tesla|generation|graphics|gpu|pcie|sxm\d?|hbm\d?e?|oam|edition"
NOISE += r"|workstation|wk|server|max-q|blackwell|card|with|of|memory|vram"
ANY_CARD = (
    "nvidia",
    "8.6",
)  # what a size alone stands for: the oldest architecture that people still buy for this work
# Cards whose driver lets no other one read their memory, as far as they have no bridge.
GAMING = re.compile(r"(GTX|RTX) \d{4}( Ti)?( Super)?( D)?( \d+GB)?")
MIN_MIB, MAX_MIB = 2 * 1024, 1024 * 1024
MIN_HOST_GIB = 32.0  # the least that RunPod's pods with a 24 GB card have
ASSUMED_CPUS = 8
LONGEST_NAME = 100  # characters of a card's name; the patterns below take quadratic time
SAME_MEMORY = 0.02  # by how much two cards of one model may differ in memory: ECC takes some


def hardware_of(text: str) -> Hardware:
    """What a machine with the card that `text` names would have: "RTX 4090", "2 x A100 80GB", "12 GB".

    Its host memory is taken to be twice the card's, at least `MIN_HOST_GIB`. Raises SettingsError for an unknown name.
    """
    match = None
    if len(text) <= LONGEST_NAME:
        match = re.fullmatch(r"\s*(?:(\d{1,2})\s*[x×*]\s*)?(.+?)\s*", text.casefold())
    if match is None:
        raise SettingsError(f"--gpu {show(text)} is not a card. Fix: give its name, such as 'RTX 4090', or '12 GB'.")
    count = int(match[1] or 1)
    card = _find(match[2])
    if card is None or count == 0:
        guess = nearest(match[2], [card.name for card in CARDS])
        hint = f"did you mean {guess}?" if guess else "names are written as in 'RTX 4090', 'A100 80GB' or 'MI300X'."
        raise SettingsError(f"--gpu {show(text)} is not a known card; {hint} A size works too: '12 GB'.")
    memory_gib = card.memory_mib / 1024
    host_gib = max(MIN_HOST_GIB, 2 * memory_gib) * count
    cpus = ASSUMED_CPUS * count
    name = card.name if card in CARDS else ""  # a size alone is no name
    if re.search(r"\bpcie\b", match[2]):  # its variants differ in speed (entrypoint.system.speeds)
        name += " PCIe"
    reading = 1 if GAMING.fullmatch(card.name) else None
    return Hardware(card.vendor, card.architecture, memory_gib, count, "", host_gib, cpus, name, reading)


def card_of(hardware: Hardware) -> str | None:
    """The name of the card that was found, as `CARDS` has it: by its driver's name, else the only one of its kind."""
    card = _find(hardware.name.casefold()) if hardware.name else None
    if card is not None and card.architecture == hardware.architecture:
        return card.name
    alike: list[str] = []
    for known in CARDS:
        is_kind = (known.vendor, known.architecture) == (hardware.vendor, hardware.architecture)
        if is_kind and abs(known.memory_mib / 1024 / hardware.memory_gib - 1) < SAME_MEMORY:
            alike.append(known.name)
    return alike[0] if len(alike) == 1 and not hardware.name else None


def _find(text: str) -> Card | None:
    """The card with this name. A size beside the name tells apart cards that share it ("A100 80GB")."""
    words = _words(text)
    named = [card for card in CARDS if _words(card.name) == words]
    if named:
        return named[0]
    size = re.search(r"(?<![0-9])([0-9]{1,6})\s*(?:gb|gib|g)\b", text)
    mib = int(size[1]) * 1024 if size else 0
    words -= _words(size[0]) if size else frozenset()
    if size and not words:
        return Card(f"a card of {size[1]} GB", *ANY_CARD, mib) if MIN_MIB <= mib <= MAX_MIB else None
    alike: list[Card] = []
    for card in CARDS:
        without_size = frozenset(word for word in _words(card.name) if not re.fullmatch(r"\d+gb", word))
        if words in (without_size, without_size - {"rtx", "gtx", "rx"}):
            alike.append(card)
    if not alike:
        return None
    if size:
        nearest = min(alike, key=lambda card: abs(card.memory_mib - mib))
        return nearest if abs(nearest.memory_mib - mib) < mib / 8 else None
    return min(alike, key=lambda card: card.memory_mib)  # whatever fits the smaller one fits the other


def _words(text: str) -> frozenset[str]:
    """The words of a name that tell it from others: "NVIDIA GeForce RTX4090Ti" → {rtx, 4090, ti}."""
    text = re.sub(rf"\b(?:{NOISE})\b", " ", text.casefold().replace("-", " "))
    text = re.sub(r"(\d+)\s*(?:gib|gb|g)\b", r" \1gb ", text)
    text = re.sub(r"\b(rtx|gtx|rx)(?=\w)", r"\1 ", text)
    text = re.sub(r"(?<=\d)(ti|super)\b", r" \1 ", text)
    return frozenset(re.findall(r"\w+", text))
