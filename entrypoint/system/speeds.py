"""How fast accelerators are by their makers' data sheets, from which `entrypoint.planning.step_time` predicts."""

from __future__ import annotations

import re
from typing import NamedTuple

from entrypoint.system.cards import card_of
from entrypoint.system.hardware import Hardware


class Speed(NamedTuple):
    """A card's peak, as its maker's data sheet has it, without sparsity and with sums in fp32.

    `tflops_8`: of FP8, or of int8 (TOP/s) where there are no tensor cores for FP8.
    """

    tflops_16: float
    tflops_8: float
    gb_s: float  # bandwidth of its memory
    source: str


GA102 = "NVIDIA Ampere GA102 GPU Architecture, whitepaper, appendix A"
BY_RATE = "by the GA102 whitepaper's rate for its tensor cores and clock"
ADA = "NVIDIA Ada GPU Architecture, whitepaper, appendix A"
ADA_RATE = "by the Ada whitepaper's rate for its tensor cores and clock"
BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture, whitepaper, appendix A"
# By the names of `entrypoint.system.cards`. A variant with other figures follows its card, with "PCIe" after the name.
SPEEDS = {
    "RTX 3060": Speed(25.5, 102, 360, "by the GA102 whitepaper's rate for 112 tensor cores at 1.78 GHz"),
    "RTX 3070": Speed(40.6, 162.6, 448, GA102),
    "RTX 3080": Speed(59.5, 238, 760, GA102),
    "RTX 3080 Ti": Speed(68.2, 272.8, 912, BY_RATE),
    "RTX 3090": Speed(71, 284, 936, GA102),
    "RTX 3090 Ti": Speed(80, 320, 1008, BY_RATE),
    "RTX 4070 Ti": Speed(80.2, 160.4, 504, ADA_RATE),
    "RTX 4080": Speed(97.5, 194.9, 716.8, ADA),
    "RTX 4080 Super": Speed(104.4, 208.9, 736, ADA_RATE),
    "RTX 4090": Speed(165.2, 330.3, 1008, ADA),
    "RTX 5080": Speed(112.6, 225.1, 960, BLACKWELL),
    "RTX 5090": Speed(209.5, 419, 1792, BLACKWELL),
    "A30": Speed(165, 330, 933, "NVIDIA A30 Tensor Core GPU, data sheet"),
    "A100 40GB": Speed(312, 624, 1555, "NVIDIA A100 Tensor Core GPU, data sheet"),
    "A100 80GB": Speed(312, 624, 1935, "NVIDIA A100 Tensor Core GPU, data sheet (PCIe)"),
    "A40": Speed(149.7, 299.3, 696, "NVIDIA A40, data sheet"),
    "L4": Speed(121, 242.5, 300, "NVIDIA L4, data sheet"),
    "L40": Speed(181, 362, 864, "NVIDIA L40, data sheet"),
    "L40S": Speed(362, 733, 864, "NVIDIA L40S, data sheet"),
    "RTX A4000": Speed(76.7, 153.4, 448, "NVIDIA RTX A4000, data sheet; " + GA102),
    "RTX A4500": Speed(94.6, 189.2, 640, "NVIDIA RTX A4500, data sheet; " + GA102),
    "RTX A5000": Speed(111.1, 222.2, 768, "NVIDIA RTX A5000, data sheet; " + GA102),
    "RTX A6000": Speed(154.8, 309.7, 768, "NVIDIA RTX A6000, data sheet; " + GA102),
    "RTX 2000 Ada": Speed(48, 95.9, 224, "NVIDIA RTX 2000 Ada, data sheet"),
    "RTX 4000 Ada": Speed(106.9, 213.8, 360, "NVIDIA RTX 4000 Ada, data sheet"),
    "RTX 5000 Ada": Speed(261.1, 522.2, 576, "NVIDIA RTX 5000 Ada, data sheet"),
    "RTX 6000 Ada": Speed(364.2, 728.5, 960, "NVIDIA RTX 6000 Ada, data sheet"),
    "RTX PRO 6000 Blackwell": Speed(500, 1000, 1792, "NVIDIA RTX PRO 6000 Blackwell, data sheet"),
    "H100": Speed(989, 1979, 3350, "NVIDIA H100, data sheet (SXM)"),
    "H100 PCIe": Speed(756, 1513, 2000, "NVIDIA H100, data sheet (PCIe)"),
    "H100 NVL": Speed(835, 1671, 3900, "NVIDIA H100 NVL, data sheet"),
    "H200": Speed(989, 1979, 4800, "NVIDIA H200, data sheet (SXM)"),
    "H200 NVL": Speed(835, 1671, 4800, "NVIDIA H200 NVL, data sheet"),
    "B200": Speed(2250, 4500, 8000, "NVIDIA DGX B200, data sheet, an eighth of it"),
    "B300": Speed(2250, 4500, 8000, "NVIDIA HGX B300, data sheet, an eighth of it"),
    "MI300X": Speed(1307.4, 2614.9, 5300, "AMD Instinct MI300X, data sheet"),
    "MI325X": Speed(1307.4, 2614.9, 6000, "AMD Instinct MI325X, data sheet"),
}
MEASURED_ON = SPEEDS["H200"]  # the card of `Footprint.measured_steps`


def speed_of(hardware: Hardware) -> Speed | None:
    """The figures of this hardware's card; None for one without."""
    card = card_of(hardware)
    if card is None:
        return None
    if re.search(r"\bpcie\b", hardware.name.casefold()) and f"{card} PCIe" in SPEEDS:
        return SPEEDS[f"{card} PCIe"]
    return SPEEDS.get(card)
