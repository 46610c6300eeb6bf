"""`python -m bench captions` times real models, and writes those that it times in the form that CAPTION_WITH takes."""

import json

import pytest
import torch

from bench import captions
from tests.support.captioners import make_llava
from trainer.captioning import kinds
from trainer.spec.rules import captioners


def test_a_folder_is_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(captions, "REPEATS", 1)
    monkeypatch.setattr(captions, "LARGEST_PIXELS", 1 << 14)
    folder = make_llava(tmp_path / "llava")
    captions.main(["--model", str(folder), "--batch", "2"])
    row = json.loads(capsys.readouterr().out)
    assert row["weights"] == kinds.weight_count(folder) and row["batch"] == 2 and row["way"] == "float32"
    assert row["load_s"] >= 0 and {"token_s", "image_s"} <= row.keys()


@pytest.mark.parametrize("name", captions.SIZES)
def test_the_sizes_are_those_by_which_captions_are_predicted(name):
    """Counted without memory for the weights. Florence-2 and Qwen3-VL 4B share their embeddings with the last layer."""
    import transformers

    kind, text, vision = captions.SIZES[name]
    size = captioners.SIZES[captioners.SHORT_NAMES[name]]
    configuration = getattr(transformers, captioners.CLASSES[kind].replace("ForConditionalGeneration", "Config"))
    with torch.device("meta"):
        model = getattr(transformers, captioners.CLASSES[kind])(configuration(text_config=text, vision_config=vision))
    weights = sum(parameter.numel() for parameter in model.parameters())
    if name == "qwen3-vl":
        weights -= text["vocab_size"] * text["hidden_size"]
    assert weights == pytest.approx(size.weights, rel=0.025)
    assert size.layers == text.get("num_hidden_layers", text.get("decoder_layers")) and size.kind == kind
