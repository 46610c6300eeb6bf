"""A LoRA file to begin with: what the plan takes from its header, and which files are refused. No torch."""

from __future__ import annotations

import json
import struct
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from entrypoint.dataset_config.manifest import read_manifest
from entrypoint.planning.plan import make_plan
from entrypoint.settings.read import read_settings
from entrypoint.system.hardware import Hardware
from trainer.spec.errors import SettingsError
from trainer.spec.family import get_family
from trainer.spec.plan import Plan

CPU = Hardware("cpu", "x86_64", 32.0, 0, "", 32.0, 8)
NOW = datetime(2026, 1, 2, tzinfo=UTC)
WIDTH = 128  # of mini-flux
DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"  # of flux
WIDTHS = {"flux": WIDTH, "sdxl": 64, "sd3": 112}  # of the miniatures
Matrices = dict[str, tuple[tuple[int, ...], list[float]]]


def write(path: Path, tensors: Matrices, **metadata: str) -> str:
    """A safetensors file of float32."""
    header: dict[str, Any] = {"__metadata__": metadata}
    data = b""
    for name, (shape, values) in tensors.items():
        raw = struct.pack(f"<{len(values)}f", *values)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return str(path)


def peft(module: str, *, rank: int, seed: float = 1.0, width: int = WIDTH) -> Matrices:
    return {
        f"transformer.{module}.lora_A.weight": ((rank, width), [seed + i for i in range(rank * width)]),
        f"transformer.{module}.lora_B.weight": ((width, rank), [1.0] * rank * width),
    }


def kohya(
    module: str, *, rank: int, rows: int, alpha: float, up: list[float] | None = None, columns: int = WIDTH
) -> Matrices:
    return {
        f"lora_unet_{module}.lora_down.weight": ((rank, columns), [1.0 + i for i in range(rank * columns)]),
        f"lora_unet_{module}.lora_up.weight": ((rows, rank), up or [1.0] * rank * rows),
        f"lora_unet_{module}.alpha": ((), [alpha]),
    }


def plan(file: str, *, base: str = "mini-flux", **variables: str) -> Plan:
    asked = {"BASE_MODEL": base, "DATASET_NAME": "org/pictures", "PARAMS_RESUME_FROM": file, **variables}
    return make_plan(read_settings(asked), read_manifest(None, None), CPU, now=NOW)


def refusal(file: str, **variables: str) -> str:
    with pytest.raises(SettingsError) as caught:
        plan(file, **variables)
    return str(caught.value)


@pytest.fixture
def attention(tmp_path: Path) -> str:
    """q, k and v of a block that share a down matrix, as Kiln itself leaves them."""
    blocks = [peft(f"transformer_blocks.{i}.attn.to_{x}", rank=6) for i in (0, 1) for x in "qkv"]
    return write(tmp_path / "x.safetensors", {k: v for b in blocks for k, v in b.items()})


def test_a_folder_that_is_no_state_is_refused_and_a_state_near_by_is_named(tmp_path):
    assert "is a folder without a state.json. Allowed: a LoRA file" in refusal(str(tmp_path))
    for step in ("step-00000004", "step-00000008"):
        (tmp_path / "state" / step).mkdir(parents=True)
        (tmp_path / "state" / step / "state.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "state"):
        assert f"Fix: name the state to resume from: {tmp_path}/state/step-00000008." in refusal(str(folder))
    newest = str(tmp_path / "state" / "step-00000008")
    assert plan(newest).lora.resume_from == newest


def test_without_a_file_the_rank_is_32():
    made = plan("")
    assert (made.lora.rank, made.lora.split_qkv) == (32, False)


def test_the_plan_takes_rank_and_targets_of_the_file_and_says_so(attention):
    made = plan(attention)
    assert (made.lora.rank, made.lora.split_qkv) == (6, False)
    assert set(made.lora.targets) == {f"{DOUBLE}.{i}.attn.to_{x}" for i in (0, 1) for x in "qkv"}
    words = "\n".join(made.reasons)
    assert "diffusers keys, rank 6, no alpha, 6 modules" in words
    assert "PARAMS_NETWORK_DIM: 6 (the rank of the LoRA file)" in words


def chosen(found: Plan) -> str:
    return next(reason for reason in found.reasons if reason.startswith("PARAMS_TARGET_MODULES"))


def test_a_file_for_some_blocks_trains_exactly_its_layers(tmp_path):
    """By the layers of the base model, which is here."""
    layers = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_out.0"]
    tensors = {key: value for layer in layers for key, value in peft(layer, rank=4).items()}
    found = plan(write(tmp_path / "x.safetensors", tensors))
    assert set(found.lora.targets) == set(layers)
    said = chosen(found)
    assert "without single_transformer_blocks.0.attn.to_q;" in said
    assert "attn.to_q,attn.to_out.0 would train all blocks" in said
    everywhere = plan(write(tmp_path / "x.safetensors", tensors), PARAMS_TARGET_MODULES="attn.to_q,attn.to_out.0")
    assert everywhere.lora.targets == ("attn.to_q", "attn.to_out.0")


def test_a_file_for_all_blocks_has_the_short_names(tmp_path):
    layers = [f"{DOUBLE}.{i}.attn.to_q" for i in range(2)] + [f"{SINGLE}.{i}.attn.to_q" for i in range(4)]
    tensors = {key: value for layer in layers for key, value in peft(layer, rank=4).items()}
    assert plan(write(tmp_path / "x.safetensors", tensors)).lora.targets == ("attn.to_q",)


@pytest.mark.parametrize(
    ("blocks", "missing"),
    [
        ({DOUBLE: range(19)}, "single_transformer_blocks.0.attn.to_q"),
        ({DOUBLE: range(18), SINGLE: range(38)}, "transformer_blocks.18.attn.to_q"),
        (
            {DOUBLE: range(1, 19), SINGLE: range(38)},
            "transformer_blocks.0.attn.to_q",
        ),
        ({DOUBLE: range(19), SINGLE: range(38)}, None),
    ],
)
def test_the_blocks_of_a_published_model_are_known_before_the_download(tmp_path, blocks, missing):
    layers = [f"{kind}.{i}.attn.to_q" for kind, numbers in blocks.items() for i in numbers]
    tensors = {key: value for layer in layers for key, value in peft(layer, rank=1, width=3072).items()}
    found = plan(write(tmp_path / "x.safetensors", tensors), base="flux-dev", BACKEND="cpu")
    if missing is None:
        assert found.lora.targets == ("attn.to_q",)
    else:
        assert set(found.lora.targets) == set(layers) and f"without {missing};" in chosen(found)


ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")  # PEFT's usual targets


def attention_file(place: Path, count: int, **metadata: str) -> str:
    """A LoRA of attention in so many blocks, without anything else that names its model."""
    tensors: Matrices = {}
    for number in range(count):
        for layer in ATTENTION:
            tensors |= peft(f"{DOUBLE}.{number}.{layer}", rank=1, width=3072)
    return write(place / "x.safetensors", tensors, **metadata)


@pytest.mark.parametrize(
    ("base", "count", "last", "owner"),
    [("flux", 60, 18, "qwen-image"), ("flux2-klein-4b", 19, 4, "flux"), ("flux2-klein-4b", 60, 4, "qwen-image")],
)
def test_a_file_with_more_blocks_than_the_base_is_refused_before_the_download(tmp_path, base, count, last, owner):
    message = refusal(attention_file(tmp_path, count), BASE_MODEL=base, BACKEND="cpu")
    assert f"it has {DOUBLE}.{count - 1}, and the last of {base} is {DOUBLE}.{last}." in message
    assert f"Its last block is that of {owner}." in message


@pytest.mark.parametrize(
    ("base", "count", "owner"),
    [
        ("qwen-image", 19, "flux"),
        ("flux", 5, "flux2-klein-4b"),
        ("qwen-image", 5, "flux2-klein-4b"),
        ("flux", 19, None),
        ("flux", 10, None),
        ("qwen-image", 60, None),
        ("flux2-klein-4b", 5, None),
    ],
)
def test_a_file_with_the_blocks_of_another_model_is_warned_of(tmp_path, base, count, owner):
    found = plan(attention_file(tmp_path, count), base=base, BACKEND="cpu")
    said = [warning for warning in found.warnings if "PARAMS_RESUME_FROM" in warning]
    assert len(said) == bool(owner)
    if owner:
        assert f"Its last block is that of {owner}." in said[0] and f"set BASE_MODEL={owner}." in said[0]


@pytest.mark.parametrize(
    ("base", "width", "wanted"),
    [("flux2-klein-4b", 6144, 3072), ("flux2-klein-9b", 6144, 4096), ("flux2-dev", 3072, 6144), ("flux", 6144, 3072)],
)
def test_a_lora_of_another_size_of_the_same_names_is_refused(tmp_path, base, width, wanted):
    tensors: Matrices = {}
    for layer in ATTENTION:
        tensors |= peft(f"{DOUBLE}.0.{layer}", rank=1, width=width)
    message = refusal(write(tmp_path / "x.safetensors", tensors), BASE_MODEL=base, BACKEND="cpu")
    assert f"is [{width}, {width}] in the file, and layers of {base} are {wanted} wide" in message


def test_a_header_that_names_the_family_needs_no_warning(tmp_path):
    names = {"modelspec.architecture": f"{get_family('qwen_image').FACTS.architecture}/lora"}
    found = plan(attention_file(tmp_path, 19, **names), base="qwen-image", BACKEND="cpu")
    assert not [warning for warning in found.warnings if "PARAMS_RESUME_FROM" in warning]


@pytest.mark.parametrize(
    ("base", "blocks", "count", "layers", "width"),
    [
        ("qwen-image", DOUBLE, 60, ("attn.to_q", "img_mlp.net.2"), 3072),
        ("z-image", "layers", 30, ("attention.to_out.0", "feed_forward.w1"), 3840),
        ("flux2-klein-4b", DOUBLE, 5, ("attn.add_q_proj", "ff.linear_out"), 3072),
        ("krea2", DOUBLE, 28, ("attn.to_q",), 6144),
        ("sd3.5-large", DOUBLE, 38, ("attn.to_q", "ff.net.2"), 2432),
        ("sdxl", "down_blocks.1.attentions.0.transformer_blocks", 2, ("attn1.to_q",), 640),
    ],
)
def test_a_file_for_the_first_blocks_trains_exactly_its_layers_in_every_family(
    tmp_path, base, blocks, count, layers, width
):
    """Of whatever layers: the last block of a list is that of every layer in it."""
    for number_of_blocks in (count - 1, count):
        names = [f"{blocks}.{n}.{layer}" for n in range(number_of_blocks) for layer in layers]
        tensors: Matrices = {}
        for name in names:
            tensors |= peft(name, rank=1, width=width)
        if base == "sdxl":
            tensors = {key.replace("transformer.", "unet.", 1): value for key, value in tensors.items()}
        found = plan(write(tmp_path / "x.safetensors", tensors), base=base, BACKEND="cpu")
        if number_of_blocks < count:
            assert set(found.lora.targets) == set(names)
            assert f"without {blocks}.{count - 1}.{layers[0]};" in chosen(found)
        elif base not in ("sdxl", "krea2"):  # whose other lists of blocks the file does not have
            assert len(found.lora.targets) == len(layers)


def test_layers_that_the_last_block_of_sd3_lacks_are_not_left_out(tmp_path):
    tensors: Matrices = {}
    for number in range(24):
        last = () if number == 23 else ("attn.to_add_out", "ff_context.net.2")
        for layer in ("attn.to_q", *last):
            tensors |= peft(f"{DOUBLE}.{number}.{layer}", rank=1, width=1536)
    found = plan(write(tmp_path / "x.safetensors", tensors), base="sd3", BACKEND="cpu")
    assert set(found.lora.targets) == {"attn.to_q", "attn.to_add_out", "ff_context.net.2"}


def test_another_rank_is_refused_with_both(attention):
    assert f"PARAMS_NETWORK_DIM=8: {attention} has rank 6" in refusal(attention, PARAMS_NETWORK_DIM="8")
    assert plan(attention, PARAMS_NETWORK_DIM="6").lora.rank == 6


def test_q_k_and_v_that_were_trained_apart_stay_apart(tmp_path):
    parts = [peft(f"transformer_blocks.0.attn.to_{x}", rank=2, seed=i) for i, x in enumerate("qkv")]
    file = write(tmp_path / "x.safetensors", {k: v for b in parts for k, v in b.items()})
    assert (plan(file).lora.rank, plan(file).lora.split_qkv) == (2, True)
    together = plan(file, PARAMS_SPLIT_QKV="false").lora
    assert (together.rank, together.split_qkv) == (6, False)


def test_parts_stacked_block_by_block_have_the_rank_of_a_part(tmp_path):
    """Rank 4 in the file: two terms for q, k and v, two for the MLP."""
    up = [x for row in range(7 * WIDTH) for x in ((1.0, 1.0, 0.0, 0.0) if row < 3 * WIDTH else (0.0, -0.0, 1.0, 1.0))]
    file = write(tmp_path / "x.safetensors", kohya("single_blocks_0_linear1", rank=4, rows=7 * WIDTH, alpha=3, up=up))
    made = plan(file)
    assert (made.lora.rank, made.lora.split_qkv) == (2, False)
    assert "kohya keys, rank 2, alpha 3, 4 modules" in "\n".join(made.reasons)


def test_layers_beyond_the_default_targets_are_trained_on(tmp_path):
    file = write(tmp_path / "x.safetensors", kohya("double_blocks_0_img_mod_lin", rank=2, rows=6 * WIDTH, alpha=1))
    assert plan(file).lora.targets == (f"{DOUBLE}.0.norm1.linear",)
    assert "PARAMS_TARGET_MODULES=norm1.linear" in refusal(file, PARAMS_TARGET_MODULES="attn.to_q")


def test_layers_outside_the_blocks_are_refused_by_name(tmp_path):
    file = write(tmp_path / "x.safetensors", kohya("final_layer_linear", rank=2, rows=WIDTH, alpha=1))
    assert "transformer.proj_out" in refusal(file)


@pytest.mark.parametrize(
    ("module", "is_of"),
    [
        ("input_blocks_4_1_transformer_blocks_0_attn1_to_q", "sdxl"),
        ("joint_blocks_0_x_block_attn_proj", "sd3"),
        ("double_blocks_0_img_attn_proj", "flux"),
    ],
)
@pytest.mark.parametrize("base", ["mini-flux", "mini-sdxl", "mini-sd3"])
def test_a_file_of_another_family_is_refused_with_both_names(tmp_path, module, is_of, base):
    width = WIDTHS[is_of]
    file = write(tmp_path / "x.safetensors", kohya(module, rank=2, rows=width, alpha=1, columns=width))
    if base == f"mini-{is_of}":
        assert plan(file, base=base).lora.rank == 2
    else:
        message = refusal(file, base=base)
        assert f"it looks like a LoRA for {is_of}" in message and f"{base[5:]} is needed" in message


def test_names_that_two_families_share_are_told_apart_by_the_header(tmp_path):
    names = {"modelspec.architecture": f"{get_family('sd3').FACTS.architecture}/lora"}
    width = WIDTHS["sd3"]
    tensors = peft("transformer_blocks.0.attn.to_out.0", rank=2, width=width)
    file = write(tmp_path / "x.safetensors", tensors, **names)
    assert "it looks like a LoRA for sd3" in refusal(file)
    assert plan(file, base="mini-sd3").lora.rank == 2


def test_what_no_lora_has_is_named(tmp_path, attention):
    tensors = kohya("double_blocks_0_img_attn_proj", rank=2, rows=WIDTH, alpha=1)
    tensors |= {"lora_unet_double_blocks_0_img_attn_proj.dora_scale": ((1, WIDTH), [1.0] * WIDTH)}
    assert "dora_scale" in refusal(write(tmp_path / "dora.safetensors", tensors))


def test_text_encoders_of_a_file_are_not_dropped_in_silence(tmp_path):
    tensors = kohya("double_blocks_0_img_attn_proj", rank=2, rows=WIDTH, alpha=1)
    encoder = kohya("x", rank=2, rows=WIDTH, alpha=1)
    layer = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    tensors |= {k.replace("lora_unet_x", layer): v for k, v in encoder.items()}
    assert "text_encoder.text_model.encoder.layers.0.mlp.fc1" in refusal(write(tmp_path / "x.safetensors", tensors))


@pytest.mark.parametrize("content", [b"", b"PK\3\4 a zip file, long enough", b"\xff" * 100, b"\2\0\0\0\0\0\0\0[]"])
def test_a_file_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    assert "PARAMS_RESUME_FROM" in refusal(str(tmp_path / "x.safetensors"))


def test_a_file_that_was_cut_off_is_refused(attention):
    Path(attention).write_bytes(Path(attention).read_bytes()[:-9])
    assert "cut off" in refusal(attention)


def test_a_file_for_another_width_is_refused_before_the_download(tmp_path):
    """By the weights of a base that is here, and by the width of the published one."""
    tensors = peft("transformer_blocks.0.attn.to_q", rank=2, width=64)
    file = write(tmp_path / "x.safetensors", tensors)
    assert "attn.to_q is [128, 128] in the base model and [64, 64] in the file" in refusal(file)
    assert "layers of flux are 3072 wide" in refusal(file, BASE_MODEL="flux")
    missing = write(tmp_path / "y.safetensors", peft("transformer_blocks.40.attn.to_q", rank=2))
    assert "the base model has no layer transformer.transformer_blocks.40.attn.to_q" in refusal(missing)


def test_what_is_wrong_with_a_file_is_said_with_the_fix_and_the_variable(tmp_path):
    whole = write(tmp_path / "x.safetensors", {"double_blocks.0.img_attn.qkv.weight": ((2, 2), [1.0] * 4)})
    message = refusal(whole)
    assert f"PARAMS_RESUME_FROM={whole}: it holds whole weights" in message and "MODEL_PATH" in message
    assert "Allowed: a LoRA file" not in message  # one fix is enough
    tensors = kohya("double_blocks_0_img_attn_proj", rank=2, rows=WIDTH, alpha=0)
    assert "img_attn_proj.alpha: alpha is 0" in refusal(write(tmp_path / "y.safetensors", tensors))
