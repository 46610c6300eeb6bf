"""Which files of a model's repository are brought: all that are needed, none twice."""

from __future__ import annotations

import pytest

from trainer.base_model import model_folder
from trainer.spec.family import get_family

# As in the repositories of the Hub (2025), with what other frameworks and other precisions add.
FLUX_NEEDED = """
model_index.json scheduler/scheduler_config.json
text_encoder/config.json text_encoder/model.safetensors
text_encoder_2/config.json text_encoder_2/model-00001-of-00002.safetensors
text_encoder_2/model-00002-of-00002.safetensors text_encoder_2/model.safetensors.index.json
tokenizer/merges.txt tokenizer/special_tokens_map.json tokenizer/tokenizer_config.json tokenizer/vocab.json
tokenizer_2/special_tokens_map.json tokenizer_2/tokenizer.json
tokenizer_2/tokenizer_config.json transformer/config.json transformer/diffusion_pytorch_model-00001-of-00003.safetensors
transformer/diffusion_pytorch_model-00002-of-00003.safetensors
transformer/diffusion_pytorch_model-00003-of-00003.safetensors
transformer/diffusion_pytorch_model.safetensors.index.json vae/config.json vae/diffusion_pytorch_model.safetensors
"""
FLUX_MORE = "README.md LICENSE.md dev_grid.jpg flux1-dev.safetensors ae.safetensors"
# Bytes of the large ones, in this order: text_encoder, text_encoder_2, transformer, vae.
FLUX_SIZES = (246144352, 4994582224, 4530066360, 9983040304, 9949328904, 3870584832, 167666902)
SDXL_NEEDED = """
model_index.json scheduler/scheduler_config.json
text_encoder/config.json text_encoder/model.safetensors text_encoder_2/config.json text_encoder_2/model.safetensors
tokenizer/merges.txt tokenizer/special_tokens_map.json tokenizer/tokenizer_config.json tokenizer/vocab.json
tokenizer_2/merges.txt tokenizer_2/special_tokens_map.json tokenizer_2/tokenizer_config.json tokenizer_2/vocab.json
unet/config.json unet/diffusion_pytorch_model.safetensors vae/config.json vae/diffusion_pytorch_model.safetensors
"""
SDXL_MORE = """
README.md sd_xl_base_1.0.safetensors sd_xl_offset_example-lora_1.0.safetensors vae_1_0/config.json
vae_1_0/diffusion_pytorch_model.safetensors vae_1_0/diffusion_pytorch_model.fp16.safetensors vae_decoder/model.onnx
text_encoder/flax_model.msgpack text_encoder/model.fp16.safetensors text_encoder/model.onnx
text_encoder/openvino_model.bin text_encoder/openvino_model.xml text_encoder_2/model.fp16.safetensors
unet/diffusion_flax_model.msgpack unet/diffusion_pytorch_model.fp16.safetensors unet/model.onnx unet/model.onnx_data
unet/openvino_model.xml vae/diffusion_pytorch_model.fp16.safetensors
"""
SD3_NEEDED = """
model_index.json scheduler/scheduler_config.json
text_encoder/config.json text_encoder/model.safetensors text_encoder_2/config.json text_encoder_2/model.safetensors
text_encoder_3/config.json text_encoder_3/model-00001-of-00002.safetensors
text_encoder_3/model-00002-of-00002.safetensors text_encoder_3/model.safetensors.index.json
tokenizer/vocab.json tokenizer_2/vocab.json tokenizer_3/tokenizer.json
transformer/config.json transformer/diffusion_pytorch_model-00001-of-00002.safetensors
transformer/diffusion_pytorch_model-00002-of-00002.safetensors
transformer/diffusion_pytorch_model.safetensors.index.json vae/config.json vae/diffusion_pytorch_model.safetensors
"""
SD3_MORE = """
tokenizer_3/spiece.model
sd3.5_large.safetensors SD3.5L_example_workflow.json text_encoders/t5xxl_fp16.safetensors
text_encoder/model.fp16.safetensors text_encoder_3/model.fp16-00001-of-00002.safetensors
text_encoder_3/model-00001-of-00002.fp16.safetensors text_encoder_3/model.safetensors.index.fp16.json
"""


@pytest.mark.parametrize(
    ("name", "needed", "more"),
    [("flux", FLUX_NEEDED, FLUX_MORE), ("sdxl", SDXL_NEEDED, SDXL_MORE), ("sd3", SD3_NEEDED, SD3_MORE)],
    ids=["flux", "sdxl", "sd3"],
)
def test_what_is_needed_is_brought_once(name, needed, more):
    patterns, needed, more = get_family(name).FACTS.files, needed.split(), more.split()
    assert [f for f in (*needed, *more) if model_folder.is_wanted(f, patterns)] == needed
    assert model_folder.problems([*needed, *more], patterns) == []


def test_flux_takes_less_than_34_gigabytes():
    """Half of what its repository holds: the rest is the same weights in another format."""
    facts = get_family("flux").FACTS
    large = [f for f in FLUX_NEEDED.split() if f.endswith(".safetensors") and model_folder.is_wanted(f, facts.files)]
    assert len(large) == len(FLUX_SIZES)
    assert 33e9 < sum(FLUX_SIZES) < 34e9 and sum(FLUX_SIZES) / 2**30 == pytest.approx(
        facts.models["flux"].files_gib, abs=0.1
    )


def test_a_model_may_lack_its_optional_encoder_and_nothing_else():
    patterns = get_family("sd3").FACTS.files
    without = [f for f in SD3_NEEDED.split() if "_3/" not in f]
    assert model_folder.problems(without, patterns) == []
    assert model_folder.problems([f for f in without if "_2/" not in f], patterns) == [
        "the folder text_encoder_2/ is missing",
        "the folder tokenizer_2/ is missing",
    ]
    half = [f for f in SD3_NEEDED.split() if not (f.startswith("text_encoder_3/") and f.endswith(".safetensors"))]
    assert model_folder.problems(half, patterns) == ["text_encoder_3/ has no .safetensors file"]
