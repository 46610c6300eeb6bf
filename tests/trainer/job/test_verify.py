"""A saved file must give the trained model, or the job fails: every way in which files were ever wrong is noticed."""

import contextlib
import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.engine import adapters
from trainer.engine.quantization.frozen_linear import freeze
from trainer.families import flux, sd3
from trainer.job import verify as verification
from trainer.job.run import run
from trainer.job.verify import verify
from trainer.lora_files import convert, peft_bridge
from trainer.spec.errors import FileMismatchError
from trainer.training.stop_flag import StopFlag

RANK, ALPHA = 3, 2.0


@pytest.fixture(params=["fp32", "bf16", "fp8", "torchao"])
def trained(request, flux_denoiser, text):
    """A Flux model with trained adapters, and its output."""
    fused, targets = flux.FACTS.fused_targets, flux.FACTS.targets
    dtype = torch.float32 if request.param == "fp32" else torch.bfloat16
    denoiser = flux_denoiser.to(dtype)
    adapters.fuse_projections(flux.blocks(denoiser), fused=fused, targets=targets)
    if request.param in ("fp8", "torchao"):
        for _, block in flux.blocks(denoiser):
            freeze(block, request.param)
    for p in adapters.add_adapters(
        denoiser, flux.blocks(denoiser), targets=targets, fused=fused, rank=RANK, alpha=ALPHA, seed=7
    ):
        torch.nn.init.normal_(p, std=0.1)
    torch.manual_seed(4)
    x, t = torch.randn(2, 16, 4, 6), torch.tensor([0.3, 0.8])
    there = {k: v.to(dtype) for k, v in text.items()}
    return denoiser, lambda: flux.predict(denoiser, x, t, text=there, guidance=1.0)


def save(denoiser, path, *, to="kohya"):
    modules = peft_bridge.from_peft_state(
        adapters.state(denoiser), prefix="transformer", fused=flux.FACTS.fused_targets, scale=ALPHA / RANK
    )
    save_file(convert.to_file(modules, to, "flux").tensors, path)


def check(path, denoiser, output):
    return verify(path, {"transformer": denoiser}, family_name="flux", fused=flux.FACTS.fused_targets, output=output)


@pytest.mark.parametrize("to", convert.KEY_FORMATS)
def test_a_right_file_passes_and_leaves_the_model_unchanged(trained, tmp_path, to):
    denoiser, output = trained
    save(denoiser, tmp_path / "x.safetensors", to=to)
    before, state = output(), {k: v.clone() for k, v in denoiser.state_dict().items()}
    assert check(tmp_path / "x.safetensors", denoiser, output) < (1e-5 if before.dtype == torch.float32 else 1e-2)
    assert torch.equal(output(), before)
    assert all(torch.equal(v, state[k]) for k, v in denoiser.state_dict().items())
    assert not any(m._forward_hooks for m in denoiser.modules())


@pytest.mark.parametrize("scale", [1.0, 1.01])
def test_a_layer_that_does_not_fit_on_the_device_is_compared_on_the_host(trained, tmp_path, monkeypatch, scale):
    denoiser, output = trained
    save(denoiser, tmp_path / "x.safetensors")
    tensors = load_file(tmp_path / "x.safetensors")
    save_file({k: v * scale if k.endswith("alpha") else v for k, v in tensors.items()}, tmp_path / "x.safetensors")
    compared, places = verification._compared, []

    def full(layer, parts):
        places.append([p.data_ptr() for p in layer.parameters() if p.requires_grad])
        if len(places) % 2:
            raise torch.OutOfMemoryError("no memory here")
        return compared(layer, parts)

    # Another place, as the host's is from an accelerator's.
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor.clone())
    monkeypatch.setattr(verification, "_compared", full)
    before = [p.data_ptr() for p in denoiser.parameters()]
    with contextlib.nullcontext() if scale == 1 else pytest.raises(FileMismatchError, match="relative to its size"):
        check(tmp_path / "x.safetensors", denoiser, output)
    assert all(set(a).isdisjoint(b) for a, b in zip(places[::2], places[1::2], strict=True)) and len(places) > 10
    assert before == [p.data_ptr() for p in denoiser.parameters()]


def swap_rows(up, first, second):
    out = up.clone()
    out[first], out[second] = up[second], up[first]
    return out


QKV = "lora_unet_double_blocks_1_img_attn_qkv.lora_up.weight"
OTHER = {
    f"lora_unet_double_blocks_{i}_img_mlp_2.{end}": f"lora_unet_double_blocks_{1 - i}_img_mlp_2.{end}"
    for i in (0, 1)
    for end in ("lora_up.weight", "lora_down.weight", "alpha")
}
MUTATIONS = {
    "alpha doubled": lambda t: t | {k: v * 2 for k, v in t.items() if k.endswith(".alpha")},
    "alpha of one layer 1 % off": lambda t: t | {k: v * 1.01 for k, v in t.items() if "0_linear2.alpha" in k},
    "no alpha": lambda t: {k: v for k, v in t.items() if not k.endswith(".alpha")},
    "q and k exchanged": lambda t: t | {QKV: swap_rows(t[QKV], slice(0, 32), slice(32, 64))},
    "v before q": lambda t: t | {QKV: swap_rows(t[QKV], slice(0, 32), slice(64, 96))},
    "halves exchanged": lambda t: t | {k: v.roll(len(v) // 2, 0) for k, v in t.items() if "img_mlp_0.lora_up" in k},
    "a module dropped": lambda t: {k: v for k, v in t.items() if "single_blocks_1_linear2." not in k},
    "blocks under each other's numbers": lambda t: {OTHER.get(k, k): v for k, v in t.items()},
    "one number not finite": lambda t: t | {QKV: t[QKV].index_fill(0, torch.tensor(0), float("nan"))},
    "a module that was not trained": lambda t: t
    | {k.replace("linear2", "modulation_lin"): v.clone() for k, v in t.items() if "single_blocks_1_linear2." in k},
    "empty": lambda _: {"lora_unet_double_blocks_0_img_mlp_0.alpha": torch.tensor(1.0)},
    "sign of an up matrix": lambda t: t | {k: -v for k, v in t.items() if "1_txt_mlp_2.lora_up" in k},
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_file_is_an_error(trained, tmp_path, mutation):
    denoiser, output = trained
    save(denoiser, tmp_path / "x.safetensors")
    tensors = MUTATIONS[mutation](load_file(tmp_path / "x.safetensors"))
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "x.safetensors")
    before = output()
    with pytest.raises(FileMismatchError, match="safetensors"):
        check(tmp_path / "x.safetensors", denoiser, output)
    assert torch.equal(output(), before)


def test_swapped_halves_of_a_modulation_are_noticed(sd3_denoiser, text, tmp_path):
    """SD3's last block keeps shift and scale the other way round than diffusers does."""
    targets = ("norm1_context.linear",)
    for p in adapters.add_adapters(
        sd3_denoiser, sd3.blocks(sd3_denoiser), targets=targets, fused={}, rank=2, alpha=2.0, seed=7
    ):
        torch.nn.init.normal_(p, std=0.1)
    modules = peft_bridge.from_peft_state(adapters.state(sd3_denoiser), prefix="transformer", fused={}, scale=1.0)
    tensors = convert.to_file(modules, "kohya", "sd3").tensors
    x, t = torch.randn(2, 16, 8, 8), torch.tensor([0.3, 0.8])

    def checked():
        save_file(tensors, tmp_path / "x.safetensors")
        return verify(
            tmp_path / "x.safetensors", {"transformer": sd3_denoiser}, family_name="sd3", fused={},
            output=lambda: sd3.predict(sd3_denoiser, x, t, text=text),
        )  # fmt: skip

    assert checked() < 1e-5
    last = "lora_unet_joint_blocks_2_context_block_adaLN_modulation_1.lora_up.weight"
    assert tensors[last].shape[0] == 2 * 32
    tensors[last] = tensors[last].roll(32, 0)
    with pytest.raises(FileMismatchError, match=r"transformer_blocks\.2\.norm1_context\.linear"):
        checked()


def test_the_output_is_compared_too(trained, tmp_path, monkeypatch):
    """Should the comparison of layers ever be fooled, the picture is not."""
    denoiser, output = trained
    save(denoiser, tmp_path / "x.safetensors")
    tensors = load_file(tmp_path / "x.safetensors")
    save_file({k: v * 2 if k.endswith(".alpha") else v for k, v in tensors.items()}, tmp_path / "x.safetensors")
    monkeypatch.setattr("trainer.job.verify._difference", lambda layer, parts: 0.0)
    with pytest.raises(FileMismatchError, match="the outputs differ"):
        check(tmp_path / "x.safetensors", denoiser, output)


@pytest.fixture
def plan(job_plan):
    """One step on the miniature."""
    return job_plan("flux", PARAMS_MAX_STEPS="1", PARAMS_NETWORK_DIM="2")


def test_a_job_leaves_a_wrong_file_under_another_name_and_fails(plan, tmp_path, monkeypatch):
    def wrong(modules, to, name):
        made = right(modules, to, name)
        bad = {k: v.roll(1, 0) if ".lora_up." in k or ".lora_B." in k else v for k, v in made.tensors.items()}
        return dataclasses.replace(made, tensors=bad)

    right = convert.to_file
    monkeypatch.setattr(convert, "to_file", wrong)
    with pytest.raises(FileMismatchError) as caught:
        run(plan, StopFlag())
    assert caught.value.exit_code == 70
    left = {p.name for p in (tmp_path / "out").glob("*safetensors*")}
    assert left == {"x-diffusers.safetensors.unverified"}

    monkeypatch.setattr(convert, "to_file", right)
    run(plan, StopFlag())
    left = {p.name for p in (tmp_path / "out").glob("*safetensors*")}
    assert left == {"x-diffusers.safetensors", "x.safetensors"}
