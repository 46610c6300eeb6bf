"""A saved file must give the trained model, or the job fails: every way in which files were ever wrong is noticed."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.engine import adapters
from trainer.engine.quantization.frozen_linear import freeze
from trainer.families import flux, sd3
from trainer.job.run import run
from trainer.job.verify import verify
from trainer.lora_files import convert, peft_bridge
from trainer.spec import weight_formats
from trainer.spec.errors import CrashLoopError, FileMismatchError
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


SAVE_PRECISIONS = tuple(weight_formats.SAVE_PRECISIONS)


def save(denoiser, path, *, to="kohya", save_precision="fp32", change=lambda tensors: tensors):
    modules = peft_bridge.from_peft_state(
        adapters.state(denoiser), prefix="transformer", fused=flux.FACTS.fused_targets, scale=ALPHA / RANK
    )
    file = convert.to_file(modules, to, "flux", save_precision)
    save_file({k: v.contiguous() for k, v in change(file.tensors).items()}, path, file.header)


def check(path, denoiser, output, save_precision="fp32"):
    fused = flux.FACTS.fused_targets
    models = {"transformer": denoiser}
    return verify(path, models, family_name="flux", fused=fused, save_precision=save_precision, output=output)


@pytest.mark.parametrize("save_precision", SAVE_PRECISIONS)
@pytest.mark.parametrize("to", convert.KEY_FORMATS)
def test_a_right_file_passes_and_leaves_the_model_unchanged(trained, tmp_path, to, save_precision):
    denoiser, output = trained
    save(denoiser, tmp_path / "x.safetensors", to=to, save_precision=save_precision)
    before, state = output(), {k: v.clone() for k, v in denoiser.state_dict().items()}
    found = check(tmp_path / "x.safetensors", denoiser, output, save_precision)
    assert found.worst <= {"fp32": 1e-6}.get(save_precision, weight_formats.SAVE_PRECISIONS[save_precision].bound)
    if before.dtype == torch.float32:
        assert 0 <= found.output < 3 * found.worst + 1e-5 and found.effect > 0.01
    assert torch.equal(output(), before)
    assert all(torch.equal(v, state[k]) for k, v in denoiser.state_dict().items())
    assert not any(m._forward_hooks for m in denoiser.modules())


@pytest.mark.parametrize("problem", [float("nan"), torch.OutOfMemoryError("no memory here")])
def test_whatever_the_base_makes_of_the_last_bits_a_right_file_passes(trained, tmp_path, problem):
    """Chaos in the base, overflow, and no memory to look: the layers decide."""
    denoiser, _ = trained
    save(denoiser, tmp_path / "x.safetensors")

    def output():
        if isinstance(problem, Exception):
            raise problem
        return torch.rand(4) * problem

    found = check(tmp_path / "x.safetensors", denoiser, output)
    assert found.worst < 1e-6 and "each layer is what was trained" in str(found)
    assert not any(m._forward_hooks for m in denoiser.modules())


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
    "alpha of one layer 2 % off": lambda t: t | {k: v * 1.02 for k, v in t.items() if "0_linear2.alpha" in k},
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


@pytest.mark.parametrize("save_precision", SAVE_PRECISIONS)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_file_is_an_error(trained, tmp_path, mutation, save_precision):
    denoiser, output = trained
    path = tmp_path / "x.safetensors"
    save(denoiser, path, save_precision=save_precision, change=MUTATIONS[mutation])
    with pytest.raises(FileMismatchError, match="safetensors"):
        check(path, denoiser, output, save_precision)


@pytest.mark.parametrize("save_precision", SAVE_PRECISIONS)
@pytest.mark.parametrize("size", [1e-6, 1e-9, 1e-14])
def test_a_wrong_file_of_tiny_updates_is_an_error_too(flux_denoiser, tmp_path, size, save_precision):
    """After one step of Prodigy B is at 1e-6, and its k a ten thousandth of the rest."""
    denoiser = flux_denoiser
    targets, fused = flux.FACTS.targets, flux.FACTS.fused_targets
    adapters.fuse_projections(flux.blocks(denoiser), fused=fused, targets=targets)
    adapters.add_adapters(denoiser, flux.blocks(denoiser), targets=targets, fused=fused, rank=RANK, alpha=ALPHA, seed=7)
    torch.manual_seed(3)
    for key, tensor in adapters.state(denoiser).items():
        if ".lora_B." in key:
            tensor.copy_(size * torch.randn_like(tensor).sign())
            if "to_qkv" in key:
                tensor[32:64] *= 1e-4
    path = tmp_path / "x.safetensors"
    save(denoiser, path, save_precision=save_precision)
    check(path, denoiser, lambda: torch.ones(1), save_precision)
    for name, mutation in {**MUTATIONS, "k without": lambda t: t | {QKV: zeroed(t[QKV], slice(32, 64))}}.items():
        save(denoiser, path, save_precision=save_precision, change=mutation)
        with pytest.raises(FileMismatchError, match="safetensors"):
            check(path, denoiser, lambda: torch.ones(1), save_precision)
            pytest.fail(name)


def zeroed(up, rows):
    out = up.clone()
    out[rows] = 0
    return out


TOLD = {
    "alpha doubled": "2 times as strong",
    "a module dropped": "single_transformer_blocks.1.proj_out: the file has nothing for it",
    "q and k exchanged": "transformer_blocks.1.attn.to_q: the file has another change: rows or columns in another",
    "a module that was not trained": "single_transformer_blocks.1.norm.linear: it was not trained, and the file has it",
    "sign of an up matrix": "transformer_blocks.1.ff_context.net.2: the file has it -1 times as strong",
}


@pytest.mark.parametrize("mutation", TOLD)
def test_the_message_says_which_layer_is_wrong_and_how(trained, tmp_path, mutation):
    denoiser, output = trained
    save(denoiser, tmp_path / "x.safetensors", save_precision="fp16", change=MUTATIONS[mutation])
    with pytest.raises(FileMismatchError) as caught:
        check(tmp_path / "x.safetensors", denoiser, output, "fp16")
    assert TOLD[mutation] in str(caught.value)


@pytest.mark.parametrize("save_precision", SAVE_PRECISIONS)
def test_swapped_halves_of_a_modulation_are_noticed(sd3_denoiser, text, tmp_path, save_precision):
    """SD3's last block keeps shift and scale the other way round than diffusers does."""
    targets = ("norm1_context.linear",)
    for p in adapters.add_adapters(
        sd3_denoiser, sd3.blocks(sd3_denoiser), targets=targets, fused={}, rank=2, alpha=2.0, seed=7
    ):
        torch.nn.init.normal_(p, std=0.1)
    modules = peft_bridge.from_peft_state(adapters.state(sd3_denoiser), prefix="transformer", fused={}, scale=1.0)
    tensors = convert.to_file(modules, "kohya", "sd3", save_precision).tensors
    x, t = torch.randn(2, 16, 8, 8), torch.tensor([0.3, 0.8])

    def checked():
        save_file(tensors, tmp_path / "x.safetensors")
        return verify(
            tmp_path / "x.safetensors", {"transformer": sd3_denoiser}, family_name="sd3", fused={},
            save_precision=save_precision, output=lambda: sd3.predict(sd3_denoiser, x, t, text=text),
        )  # fmt: skip

    assert checked().worst < weight_formats.SAVE_PRECISIONS[save_precision].bound
    last = "lora_unet_joint_blocks_2_context_block_adaLN_modulation_1.lora_up.weight"
    assert tensors[last].shape[0] == 2 * 32
    tensors[last] = tensors[last].roll(32, 0)
    with pytest.raises(FileMismatchError, match=r"transformer_blocks\.2\.norm1_context\.linear"):
        checked()


def test_a_wrong_file_keeps_its_lora_and_the_state_and_is_not_tried_again(job_plan, tmp_path, monkeypatch):
    def wrong(modules, to, name, save_precision):
        made = right(modules, to, name, save_precision)
        bad = {k: v.roll(1, 0) if ".lora_B." in k else v for k, v in made.tensors.items()}
        return dataclasses.replace(made, tensors=bad)

    few = {"PARAMS_MAX_STEPS": "1", "PARAMS_NETWORK_DIM": "2", "PARAMS_SAVE_EVERY_N_STEPS": "0"}
    plan = job_plan("flux", **few, PARAMS_SAVE_PRECISION="bf16")
    right = convert.to_file
    monkeypatch.setattr(convert, "to_file", wrong)
    with pytest.raises(FileMismatchError) as caught:
        run(plan, StopFlag())
    assert caught.value.exit_code == 70
    out = tmp_path / "out"
    # The file that is right has its name, and the state is there although no saves were asked for.
    finals = {"x-diffusers.safetensors.unverified", "x.safetensors"}
    assert finals <= {p.name for p in out.glob("*safetensors*")} and list(out.rglob("state.safetensors"))

    # A later start, and another machine's time and memory, change nothing.
    monkeypatch.setattr(convert, "to_file", right)
    later = dataclasses.replace(plan.output, started=plan.output.started + 1000)
    with pytest.raises(CrashLoopError, match=r"ended at step 1, and would end so again.*is not what was trained"):
        run(dataclasses.replace(plan, output=later, reasons=("other words",)), StopFlag())

    (out / "crashes.json").unlink()
    run(plan, StopFlag())
    rows = [json.loads(line) for line in next(out.rglob("metrics.jsonl")).read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1], "the second start trained again"
    assert not list(out.glob("*.unverified"))
    for path in (out / "x-diffusers.safetensors", out / "x.safetensors"):
        types = {v.dtype for k, v in load_file(path).items() if ".lora_" in k}
        assert types == {torch.bfloat16}
    states = next(out.rglob("state.safetensors"))
    assert {v.dtype for v in load_file(states).values() if v.ndim == 2 and v.is_floating_point()} == {torch.float32}
