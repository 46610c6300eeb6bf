"""LoRA files in 16 bits: what is promised holds for numbers of any size, and what a job starts from stays as it was."""

import json
import math
import types

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support import variants
from trainer.engine import adapters
from trainer.lora_files import convert, inspect, peft_bridge, precision
from trainer.lora_files.precision import Pair
from trainer.lora_files.weights import LoraWeights
from trainer.lora_files.write import write_lora
from trainer.spec import memory_model
from trainer.spec.family import base_models, get_family
from trainer.spec.weight_formats import SAVE_PRECISIONS
from trainer.storage import safetensors_header

IN_16_BITS = ("fp16", "bf16")


def norm(up, down):
    return (up.double().flatten(1) @ down.double().flatten(1)).norm()


def errors(pair, narrow):
    """How far each part is off, by its size; computed from whole products."""
    found = []
    for before, after in zip(pair.up.split(pair.heights), narrow.up.split(pair.heights), strict=True):
        both = torch.cat([after.double().flatten(1), -before.double().flatten(1)], dim=1)
        off = norm(both, torch.cat([narrow.down.double(), pair.down.double()]))
        size = norm(before, pair.down)
        found.append((off / size if size else off).item())
    return found


@given(
    down_size=st.floats(-12, 4),
    up_size=st.floats(-12, 4),
    rank=st.integers(1, 24),
    part_sizes=st.lists(st.floats(-12, 0), min_size=1, max_size=3),
    zero_columns=st.integers(0, 24),
    seed=st.integers(0, 2**16),
    kind=st.sampled_from(["normal", "sign", "one direction", "cancelling"]),
    name=st.sampled_from(IN_16_BITS),
)
@example(-1.7, -6, 8, [0.0], 0, 0, "sign", "fp16")  # one step of Prodigy
@example(4, 4, 1, [0.0], 0, 0, "normal", "fp16")
@example(-12, -12, 24, [0.0, -12.0], 0, 0, "normal", "fp16")
@example(0, 0, 2, [0.0], 2, 0, "normal", "bf16")  # nothing but zeros
def test_each_part_is_within_the_bound_whatever_its_size(
    down_size, up_size, rank, part_sizes, zero_columns, seed, kind, name
):
    torch.manual_seed(seed)
    down = torch.randn(rank, 40) * 10.0**down_size
    ups = [torch.randn(16, rank) * 10.0 ** (up_size + size) for size in part_sizes]
    up = torch.cat(ups)
    if kind == "sign":
        up = up.sign() * 10.0**up_size
    elif kind == "one direction":
        up = up[:, :1].repeat(1, rank)
    elif kind == "cancelling":  # the second half of the terms nearly undoes the first
        half = rank // 2
        down[half : 2 * half] = down[:half]
        up[:, half : 2 * half] = -up[:, :half] * (1 + 1e-5 * torch.randn(()))
        if rank % 2:
            up[:, -1] = 0
    up[:, :zero_columns] = 0
    pair = Pair(down, up, [16] * len(part_sizes))
    stored = precision.store({"x": pair}, name)
    narrow = stored.pairs["x"]
    assert bool(narrow.down.isfinite().all() and narrow.up.isfinite().all())
    assert max(errors(pair, narrow)) <= SAVE_PRECISIONS[name].bound
    assert narrow.down.dtype == narrow.up.dtype == (torch.float32 if stored.wide else precision.DTYPES[name])
    # fp32 is the exception: what a training makes is far inside of the range.
    if kind != "cancelling" and -7 <= down_size + up_size <= 7 and min(part_sizes) >= -1:
        assert not stored.wide
    if stored.wide:
        assert torch.equal(narrow.down, down) and torch.equal(narrow.up, up)

    # Undone, the matrices have the sizes that they had.
    exponent = precision.balance(stored.header, ["x"])["x"]
    back = precision.unbalanced(LoraWeights(narrow.down.float(), narrow.up.float(), 1.0), exponent)
    torch.testing.assert_close(back.down.norm(), down.norm(), rtol=1e-2, atol=0)
    torch.testing.assert_close(back.up.norm(), up.norm(), rtol=1e-2, atol=0)


def test_the_first_step_of_prodigy_is_kept_by_the_balance_alone():
    down = torch.nn.init.kaiming_uniform_(torch.empty(32, 3072), a=math.sqrt(5))
    up = 1e-6 * torch.randn(3072, 32).sign()
    pair = Pair(down, up, [3072])
    stored = precision.store({"x": pair}, "fp16")
    assert not stored.wide and stored.pairs["x"].up.dtype == torch.float16
    assert errors(pair, stored.pairs["x"])[0] < 4e-4
    assert errors(pair, Pair(down.half(), up.half(), [3072]))[0] > 0.01, "this would need no balance"


def test_fp32_is_what_was_trained_bit_by_bit():
    pair = Pair(torch.randn(4, 8), 1e-20 * torch.randn(6, 4), [6])
    stored = precision.store({"x": pair}, "fp32")
    assert torch.equal(stored.pairs["x"].down, pair.down) and torch.equal(stored.pairs["x"].up, pair.up)
    assert stored.header == {} and not stored.wide


@pytest.mark.parametrize("to", convert.KEY_FORMATS)
@pytest.mark.parametrize("name", IN_16_BITS)
def test_one_adapter_for_q_k_and_v_stays_one_in_every_format(to, name):
    """k is a thousandth of q: balanced by itself, its lora_A would have other bits than that of q."""
    torch.manual_seed(1)
    down = torch.randn(3, 32)
    sizes = {"to_q": 1.0, "to_k": 1e-3, "to_v": 30.0}
    modules = {
        f"transformer.transformer_blocks.0.attn.{part}": LoraWeights(down, size * torch.randn(32, 3), 2 / 3)
        for part, size in sizes.items()
    }
    file = convert.to_file(modules, to, "flux", name)
    back = convert.from_tensors(file.tensors, file.header, "flux")
    assert convert.to_file(back, "kohya", "flux").rank == 3
    assert len({module.down.numpy().tobytes() for module in back.values()}) == 1
    for module, weights in modules.items():
        pair = Pair(weights.down, weights.scale * weights.up, [32])
        assert errors(pair, Pair(back[module].down, back[module].scale * back[module].up, [32]))[0] < (
            SAVE_PRECISIONS[name].bound
        )
        # Training goes on with the sizes that they had, not with those of the file.
        torch.testing.assert_close(back[module].down, down, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("text", ["[99]", "[1, 2]", "[1.5]", "[true]", "{}", "7", "[", "[" * 9999, ""])
def test_a_header_that_does_not_fit_is_not_followed(text):
    assert precision.balance({precision.BALANCE: text}, ["x"]) == {"x": 0}


def test_a_header_of_another_file_changes_nothing_that_counts():
    weights = LoraWeights(torch.full((1, 2), 1e38), torch.full((2, 1), 1e-38), 1.0)
    assert precision.unbalanced(weights, -60) is weights
    other = LoraWeights(torch.randn(2, 8), torch.randn(8, 2), 1.0)
    torch.testing.assert_close(precision.unbalanced(other, 17).delta(), other.delta())


# ---- the export


def test_an_export_has_the_type_of_the_file_unless_another_is_asked_for(flux_denoiser, tmp_path):
    from trainer.export import export_command

    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    modules = {
        f"transformer.transformer_blocks.0.attn.to_{x}": LoraWeights(torch.randn(4, 32), torch.randn(32, 4), 0.5)
        for x in "qkv"
    }
    file = convert.to_file(modules, "kohya", "flux", "fp16")
    write_lora(first, file.tensors, {**file.header, "ss_steps": "7"})

    def exported(*arguments):
        assert export_command([str(first), *arguments, "--overwrite", "--out", str(second)]) == 0
        header = safetensors_header.read_header(second)
        assert header.metadata["ss_steps"] == "7"
        assert header.metadata[precision.PRECISION] == inspect.save_precision(header)
        before, after = convert.load(first, "flux"), convert.load(second, "flux")
        for name, weights in before.items():
            off = (after[name].delta() - weights.delta()).norm() / weights.delta().norm()
            assert off <= SAVE_PRECISIONS[inspect.save_precision(header)].bound
        return inspect.save_precision(header), len(json.loads(header.metadata.get(precision.BALANCE, "[]")))

    assert exported("--to", "peft") == ("fp16", 3)
    assert exported("--to", "kohya", "--precision", "bf16")[0] == "bf16"
    assert exported("--to", "peft", "--precision", "fp32") == ("fp32", 0)


# ---- sizes


@pytest.mark.parametrize(
    ("base", "split"),
    [
        ("flux-dev", False),
        ("flux-dev", True),
        ("sdxl-base", False),
        ("sd3-medium", False),
        ("sd3.5-medium", False),
        ("sd3.5-large", False),
        ("z-image", False),
        ("flux2-klein-4b", False),
        ("flux2-klein-4b", True),
        ("flux2-klein-9b", False),
        ("flux2-dev", False),
        ("qwen-image", False),
        ("krea2", False),
    ],
)
def test_the_planner_knows_the_size_of_a_file(base, split):
    """Counted on the published model; the file itself has 30 kB of names besides."""
    rank = 4
    name = variants.VARIANTS[base][0]
    family, facts = get_family(name), get_family(name).FACTS
    model = variants.shape(base, {}).requires_grad_(False)
    fused = {} if split else facts.fused_targets
    with torch.device("meta"):
        adapters.fuse_projections(family.blocks(model), fused=fused, targets=facts.targets)
        blocks = family.blocks(model)
        adapters.add_adapters(model, blocks, targets=facts.targets, fused=fused, rank=rank, alpha=rank, seed=0)
    modules = peft_bridge.from_peft_state(adapters.state(model), prefix=facts.lora_prefix, fused=fused, scale=1.0)
    formats = family.LORA_KEYS.file_formats
    counted = sum(convert.count_numbers(modules, key_format, name)[0] for key_format in formats)
    plan = types.SimpleNamespace(
        model=types.SimpleNamespace(base=base),
        lora=types.SimpleNamespace(rank=rank, split_qkv=split, kind="lora"),
        output=types.SimpleNamespace(save_precision="fp16"),
    )
    assert memory_model.lora_bytes(plan) == pytest.approx(2 * counted, rel=1e-3)
    footprint = base_models()[base][1].footprint
    peft = convert.count_numbers(modules, "peft", name)[0] / rank
    assert footprint.peft_weights_per_rank == pytest.approx(peft, rel=1e-3)


@pytest.mark.parametrize("to", convert.KEY_FORMATS)
@pytest.mark.parametrize("split", [True, False])
def test_the_numbers_of_a_file_are_counted_without_making_it(flux_denoiser, to, split):
    facts = get_family("flux").FACTS
    fused = {} if split else facts.fused_targets
    adapters.fuse_projections(get_family("flux").blocks(flux_denoiser), fused=fused, targets=facts.targets)
    blocks = get_family("flux").blocks(flux_denoiser)
    adapters.add_adapters(
        flux_denoiser, blocks, targets=facts.targets, fused=fused, rank=3, alpha=1.0, seed=0, kind="dora"
    )
    state = adapters.state(flux_denoiser)
    modules = peft_bridge.from_peft_state(state, prefix="transformer", fused=fused, scale=1.0)
    tensors = convert.to_file(modules, to, "flux").tensors
    assert sum(convert.count_numbers(modules, to, "flux")) == sum(tensor.numel() for tensor in tensors.values())
