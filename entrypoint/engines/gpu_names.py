"""What each engine calls a GPU. A GPU that an engine does not rent out is not in its table.

Sources: SkyPilot's catalog, gpuhunt's table (dstack), huggingface_hub's JobHardware, and the pages of Vast.ai, Modal
and RunPod, in November 2026.
"""

from __future__ import annotations

from collections.abc import Mapping

VENDOR = "nvidia"  # the images that these jobs start are built for CUDA
KUBERNETES_GPU = f"{VENDOR}.com/gpu"  # the resource of the vendor's device plugin
KUBERNETES_MEMORY = f"{VENDOR}.com/gpu.memory"  # a node's label in MiB, by the vendor's GPU feature discovery
# Names of `entrypoint.system.cards` → the engine's.
SKY: Mapping[str, str] = {
    "RTX A4000": "RTXA4000",
    "RTX A5000": "RTXA5000",
    "RTX A6000": "RTXA6000",
    "RTX 3090": "RTX3090",
    "RTX 4000 Ada": "RTX4000-Ada",
    "L4": "L4",
    "RTX 4090": "RTX4090",
    "RTX 6000 Ada": "RTX6000-Ada",
    "L40S": "L40S",
    "RTX 5090": "RTX5090",
    "L40": "L40",
    "RTX PRO 6000 Blackwell": "RTXPRO6000",
    "A40": "A40",
    "H200": "H200",
    "B200": "B200",
    "A100 40GB": "A100",
    "A100 80GB": "A100-80GB",
    "H100": "H100",
}
DSTACK: Mapping[str, str] = {
    "RTX A4000": "A4000",
    "RTX A4500": "A4500",
    "RTX A5000": "A5000",
    "RTX A6000": "A6000",
    "RTX 3090": "RTX3090",
    "RTX 2000 Ada": "RTX2000Ada",
    "RTX 4000 Ada": "RTX4000Ada",
    "L4": "L4",
    "RTX 4090": "RTX4090",
    "RTX 6000 Ada": "RTX6000Ada",
    "L40S": "L40S",
    "RTX 5090": "RTX5090",
    "L40": "L40",
    "RTX PRO 6000 Blackwell": "RTXPRO6000",
    "A40": "A40",
    "H200": "H200",
    "B200": "B200",
    "B300": "B300",
    "A100 40GB": "A100",
    "A100 80GB": "A100",
    "H100": "H100",
    "H100 NVL": "H100NVL",
}
# With the suffix for several GPUs: flavours exist for some numbers only.
HUGGING_FACE: Mapping[str, Mapping[int, str]] = {
    "T4": {1: "t4-medium"},
    "L4": {1: "l4x1", 4: "l4x4"},
    "A10G": {1: "a10g-large", 2: "a10g-largex2", 4: "a10g-largex4"},
    "L40S": {1: "l40sx1", 4: "l40sx4", 8: "l40sx8"},
    "A100 80GB": {1: "a100-large", 4: "a100x4", 8: "a100x8"},
    "RTX PRO 6000 Blackwell": {1: "rtx-pro-6000", 2: "rtx-pro-6000x2", 4: "rtx-pro-6000x4", 8: "rtx-pro-6000x8"},
    "H200": {1: "h200", 2: "h200x2", 4: "h200x4", 8: "h200x8"},
}
VAST: Mapping[str, str] = {
    "RTX A4000": "RTX_A4000",
    "RTX A5000": "RTX_A5000",
    "RTX A6000": "RTX_A6000",
    "RTX 3090": "RTX_3090",
    "L4": "L4",
    "RTX 4090": "RTX_4090",
    "RTX 6000 Ada": "RTX_6000Ada",
    "L40S": "L40S",
    "RTX 5090": "RTX_5090",
    "L40": "L40",
    "A40": "A40",
    "H200": "H200",
    "B200": "B200",
    "A100 80GB": "A100_SXM4",
    "H100": "H100_SXM",
    "H100 NVL": "H100_NVL",
}
MODAL: Mapping[str, str] = {
    "T4": "T4",
    "L4": "L4",
    "A10": "A10",
    "L40S": "L40S",
    "A100 40GB": "A100-40GB",
    "A100 80GB": "A100-80GB",
    "RTX PRO 6000 Blackwell": "RTX-PRO-6000",
    "H100": "H100!",  # without the mark, Modal may give another one
    "H200": "H200",
    "B200": "B200",
}
RUNPOD: Mapping[str, str] = {
    "RTX A4000": "RTX A4000",
    "RTX A4500": "RTX A4500",
    "RTX A5000": "RTX A5000",
    "RTX A6000": "RTX A6000",
    "RTX 3090": "RTX 3090",
    "RTX 2000 Ada": "RTX 2000 Ada",
    "RTX 4000 Ada": "RTX 4000 Ada",
    "L4": "L4",
    "RTX 4090": "RTX 4090",
    "RTX 6000 Ada": "RTX 6000 Ada",
    "L40S": "L40S",
    "RTX 5090": "RTX 5090",
    "L40": "L40",
    "A40": "A40",
    "H200": "H200 SXM",
    "B200": "B200",
    "A100 80GB": "A100 SXM",
    "H100": "H100 SXM",
    "H100 NVL": "H100 NVL",
}
