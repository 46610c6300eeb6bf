"""What a single file of weights says that its model predicts.

Two conventions: empty tensors as marks, which ComfyUI reads (`model_type` of SDXL in comfy/supported_models.py), and
`modelspec.prediction_type` in the header, which sd-scripts (library/sai_model_spec.py) and OneTrainer write. A mark is
put in on purpose and survives merges, in which headers are copied; so marks win.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.spec.family import PREFIXES

V_MARK = "v_pred"
ZERO_SNR_MARK = "ztsnr"
EDM_MARKS = ("edm_vpred.sigma_max", "edm_vpred.sigma_min", "edm_mean", "edm_std")
MARKS = (V_MARK, ZERO_SNR_MARK, *EDM_MARKS)
HEADER_KEY = "modelspec.prediction_type"
# Values of it → diffusers' names.
HEADER_VALUES = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
    "vpred": "v_prediction",
    "v_pred": "v_prediction",
}


@dataclass(frozen=True)
class PredictionMarks:
    """What a file says. `said_by`: how, for messages; empty if it says nothing about the prediction."""

    prediction: str | None = None  # epsilon or v_prediction; None: it does not say
    zero_terminal_snr: bool = False
    said_by: str = ""
    edm: bool = False  # noise levels of EDM
    unknown: str | None = None  # a value of HEADER_KEY that is not read


def prediction_marks(names: Collection[str], metadata: Mapping[str, Any]) -> PredictionMarks:
    """The marks among the names of a file's tensors, and in its header."""
    present: set[str] = set()
    for prefix in ("", *PREFIXES["denoiser"]):
        present.update(mark for mark in MARKS if f"{prefix}{mark}" in names)
    zero_snr = ZERO_SNR_MARK in present
    edm = any(mark in present for mark in EDM_MARKS)
    if V_MARK in present:
        marks = " and ".join(mark for mark in (V_MARK, ZERO_SNR_MARK) if mark in present)
        return PredictionMarks(
            "v_prediction", zero_snr, f"its tensors {marks}" if zero_snr else f"its tensor {marks}", edm
        )
    said = metadata.get(HEADER_KEY)
    if not isinstance(said, str) or not said.strip():
        return PredictionMarks(None, zero_snr, "", edm)
    prediction = HEADER_VALUES.get(said.strip().lower())
    if prediction is None:
        return PredictionMarks(None, zero_snr, "", edm, unknown=said)
    return PredictionMarks(prediction, zero_snr, f"{HEADER_KEY}={said} in its header", edm)
