"""Florence-2, Qwen3-VL and LLaVA (JoyCaption) through transformers' own classes: images and a question → answers.

Greedy decoding (Florence-2: its three beams), so that the same image has the same caption. Answers end at the model's
own end token, or after `max_tokens`.

Letters: B images, L tokens, D features.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from trainer.base_model.loading import FIX, load_whole
from trainer.captioning import kinds
from trainer.captioning.fitting import Way, choose_way
from trainer.captioning.model_inputs import load_image_processor
from trainer.captioning.store import Made
from trainer.captioning.text_tokens import load_text_tokens
from trainer.captioning.tidy import tidy
from trainer.spec.errors import OutOfMemoryError, SettingsError
from trainer.spec.plan import EnginePlan
from trainer.spec.rules.captioners import CLASSES, FLORENCE2, QWEN3_VL

log = logging.getLogger(__name__)
NOT_IN_4_BITS = ["lm_head", "vision_tower", "visual", "multi_modal_projector"]
FLORENCE2_BEAMS, FLORENCE2_NGRAM = 3, 3  # as in its own generation config


class VisionLanguage:
    """A loaded model. `variable`: how the user named it. Raises SettingsError for files that cannot be used."""

    def __init__(self, folder: Path, engine: EnginePlan, *, variable: str) -> None:
        self.variable = variable
        self.kind, config = kinds.read_config(folder, variable=variable)
        self.tokens = load_text_tokens(folder, self.kind)
        self.processor = load_image_processor(folder, self.kind)
        weights = kinds.weight_count(folder)
        self.way = choose_way(weights, engine, variable=variable)
        self.model: Any = _load(folder, self.kind, config, weights, self.way, engine.device, variable=variable)
        self.image_token = int(self.model.config.image_token_id)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        if not max(self.image_token, *self.tokens.tokenizer.get_vocab().values()) < vocabulary:
            raise SettingsError(
                f"{variable}: {folder} has tokens without an embedding ({vocabulary} embeddings). Fix: take another "
                "model."
            )

    def captions(
        self,
        images: Sequence[Image.Image],
        model: str,
        *,
        prompt: str,
        max_tokens: int,
        check_in: Callable[[], None],
    ) -> list[Made]:
        """An answer to `prompt` for each image. `check_in` is called at each token and may raise.

        Raises OutOfMemoryError where one image alone is too much for the device.
        """
        try:
            return self._answers(images, model, prompt=prompt, max_tokens=max_tokens, check_in=check_in)
        except torch.OutOfMemoryError as problem:
            if len(images) == 1:
                raise OutOfMemoryError(
                    f"{self.variable}: captioning one image takes more memory than is free. Fix: a smaller model, such "
                    "as CAPTION_WITH=florence-2."
                ) from problem
        torch.cuda.empty_cache()
        half = len(images) // 2
        log.info("Captioning %d images at once needs too much memory: from here on %d.", len(images), half)
        answers = []
        for part in (images[:half], images[half:]):
            answers += self.captions(part, model, prompt=prompt, max_tokens=max_tokens, check_in=check_in)
        return answers

    def _answers(
        self,
        images: Sequence[Image.Image],
        model: str,
        *,
        prompt: str,
        max_tokens: int,
        check_in: Callable[[], None],
    ) -> list[Made]:
        inputs, length = self.inputs(images, prompt)
        with torch.no_grad():
            found_BL = self.model.generate(
                **inputs,
                generation_config=self._generation(max_tokens),
                stopping_criteria=_stopping(check_in),
            )
        answers = []
        for row in found_BL[:, length:].tolist():
            ends = [place for place, number in enumerate(row) if number in self.tokens.stops and place > 0]
            own = row[: ends[0]] if ends else row
            answers.append(tidy(self.tokens.text(own), model, was_cut=not ends))
        return answers

    def inputs(self, images: Sequence[Image.Image], prompt: str) -> tuple[dict[str, Any], int]:
        """What `generate` takes, and how many of its first tokens are the question."""
        pixels = self.processor(images=list(images), return_tensors="pt")
        rows = []
        for number in range(len(images)):
            count = self._image_tokens(pixels, number)
            rows.append(self.tokens.question(prompt, image_token=self.image_token, count=count))
        length = max(len(row) for row in rows)
        ids_BL = torch.full((len(rows), length), self.tokens.padding)
        looked_at_BL = torch.zeros((len(rows), length), dtype=torch.long)
        for place, row in enumerate(rows):  # padded on the left: an answer follows its question
            ids_BL[place, length - len(row) :] = torch.tensor(row)
            looked_at_BL[place, length - len(row) :] = 1
        device = self.model.device
        inputs = {"input_ids": ids_BL, "attention_mask": looked_at_BL, **pixels}
        if self.kind == QWEN3_VL:
            inputs["mm_token_type_ids"] = (ids_BL == self.image_token).long()
        moved = {name: value.to(device) for name, value in inputs.items()}
        moved["pixel_values"] = moved["pixel_values"].to(self.way.dtype)
        # An encoder-decoder answers from its own first token on.
        return moved, 1 if self.kind == FLORENCE2 else length

    def _image_tokens(self, pixels: Any, number: int) -> int:
        """How many tokens of the question an image takes."""
        if self.kind == QWEN3_VL:
            return int(pixels["image_grid_thw"][number].prod()) // self.processor.merge_size**2
        height, width = pixels["pixel_values"].shape[-2:]
        vision = self.model.config.vision_config
        if self.kind == FLORENCE2:  # one for each place of the last feature map, and their mean
            stride = math.prod(vision.patch_stride)
            return math.ceil(height / stride) * math.ceil(width / stride) + 1
        patches = (height // vision.patch_size) * (width // vision.patch_size)
        has_class_token = vision.model_type.startswith("clip")
        keeps_all = self.model.config.vision_feature_select_strategy == "full"
        if has_class_token and keeps_all:
            return patches + 1
        return patches if has_class_token or keeps_all else patches - 1

    def _generation(self, max_tokens: int) -> Any:
        from transformers import GenerationConfig

        common: dict[str, Any] = {
            "max_new_tokens": max_tokens,
            "do_sample": False,
            "pad_token_id": self.tokens.padding,
            "eos_token_id": self.tokens.stops,
        }
        if self.kind == FLORENCE2:
            text = self.model.config.text_config
            common |= {
                "num_beams": FLORENCE2_BEAMS,
                "no_repeat_ngram_size": FLORENCE2_NGRAM,
                "early_stopping": True,
                "decoder_start_token_id": text.decoder_start_token_id,
                "forced_bos_token_id": text.bos_token_id,
                "bos_token_id": text.bos_token_id,
            }
        return GenerationConfig(**common)


def _stopping(check_in: Callable[[], None]) -> Any:
    """Calls `check_in` at each token, and never stops."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class _CheckIn(StoppingCriteria):
        def __call__(self, ids_BL: torch.Tensor, _scores: Any) -> torch.Tensor:
            check_in()
            return torch.zeros(ids_BL.shape[0], dtype=torch.bool, device=ids_BL.device)

    return StoppingCriteriaList([_CheckIn()])


def _load(
    folder: Path, kind: str, config: dict[str, Any], weights: int, way: Way, device: str, *, variable: str
) -> Any:
    """The frozen model. Raises SettingsError where its weights are not those that its config describes."""
    quantization = None
    if way.four_bits:
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=way.dtype,
            llm_int8_skip_modules=NOT_IN_4_BITS,
        )
    try:
        return load_whole(
            CLASSES[kind],
            folder,
            config,
            weights=weights,
            device=device,
            dtype=way.dtype,
            quantization=quantization,
        )
    except ValueError as problem:
        raise SettingsError(f"{variable}: {folder} cannot be used: {problem}. {FIX}.") from problem
