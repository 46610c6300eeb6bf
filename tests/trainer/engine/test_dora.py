"""DoRA and rsLoRA: whole jobs, and their files in diffusers; every way in which a DoRA's file may be wrong."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.miniatures import FAMILIES, encoded, folder, pipeline
from trainer.engine import adapters
from trainer.engine.quantization.frozen_linear import freeze
from trainer.export import export_command
from trainer.families import flux
from trainer.job.run import run
from trainer.job.verify import verify
from trainer.lora_files import convert, peft_bridge
from trainer.sample import apply_loras
from trainer.spec.errors import FileMismatchError, SettingsError
from trainer.spec.family import get_family
from trainer.spec.weight_formats import SAVE_PRECISIONS
from trainer.training.stop_flag import StopFlag

# fp32, so that the files of a job in two spellings are the same numbers.
QUICK = {
    "PARAMS_OPTIMIZER_TYPE": "adamw",
    "PARAMS_LEARNING_RATE": "0.05",
    "PARAMS_MAX_STEPS": "3",
    "PARAMS_SAVE_PRECISION": "fp32",
}
SHAPE = {"PARAMS_NETWORK_DIM": "3", "PARAMS_NETWORK_ALPHA": "2", "PARAMS_TEXT_ENCODER_LR": "0.05"}


def output(name, denoiser):
    """The model's output for something made up, the same each time."""
    kind, generator = get_family(name), torch.Generator().manual_seed(3)
    config = denoiser.config
    channels = 4 if name == "sdxl" else 16
    wide = config.cross_attention_dim if name == "sdxl" else config.joint_attention_dim
    pooled = {"sdxl": lambda: config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim}
    count = pooled.get(name, lambda: config.pooled_projection_dim)()
    noisy = torch.randn(2, channels, 16, 16, generator=generator)
    text = {
        "tokens": torch.randn(2, 20, wide, generator=generator),
        "pooled": torch.randn(2, count, generator=generator),
    }
    geometry = torch.tensor([[128.0, 128, 0, 0, 128, 128]] * 2)
    with torch.no_grad():
        return kind.predict(
            denoiser, noisy, torch.tensor([0.3, 0.8]), text=text, guidance=1.0, geometry_B6=geometry
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["dora", "rslora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_jobs_files_are_one_model_in_diffusers_and_here(name, kind, job_plan, tmp_path):
    run(job_plan(name, **QUICK, **SHAPE, PARAMS_LORA_TYPE=kind), StopFlag())
    kohya, peft = tmp_path / "out" / "x.safetensors", tmp_path / "out" / "x-diffusers.safetensors"
    assert (kind == "dora") == any("dora_scale" in k for k in load_file(kohya))
    component, pipe = get_family(name).FACTS.lora_prefix, pipeline(name)
    before = output(name, getattr(pipe, component))
    pipe.load_lora_weights(peft)
    theirs = output(name, getattr(pipe, component))
    ours = get_family(name).load_denoiser(folder(name), device="cpu", dtype=torch.float32)
    apply_loras(ours, [(convert.load(kohya, name), 1.0)], component=component)
    torch.testing.assert_close(output(name, ours), theirs, rtol=1e-4, atol=1e-4)
    assert (theirs - before).norm() > 0.01 * before.norm()


@pytest.mark.parametrize("name", FAMILIES)
def test_diffusers_reads_the_magnitudes_of_text_encoders(name, job_plan, tmp_path):
    """The encoders give in diffusers what they give here, and change with the magnitudes alone."""
    run(job_plan(name, **QUICK, **SHAPE, PARAMS_LORA_TYPE="dora"), StopFlag())
    kohya, peft = tmp_path / "out" / "x.safetensors", tmp_path / "out" / "x-diffusers.safetensors"
    tensors, captions = load_file(peft), ["a red circle on a blue ground"]
    only_magnitudes = {k: torch.zeros_like(v) if k.endswith("lora_B.weight") else v for k, v in tensors.items()}
    longer = change(only_magnitudes, ".lora_magnitude_vector.weight", lambda v: v * 1.5)
    save_file(longer, tmp_path / "longer.safetensors")
    found = {}
    for which, file in {"base": None, "trained": peft, "longer": tmp_path / "longer.safetensors"}.items():
        pipe = pipeline(name)
        if file:
            pipe.load_lora_weights(file)
        found[which] = encoded(name, pipe, captions)["pooled"]
    ours = pipeline(name)
    for component in get_family(name).LORA_KEYS.encoders:
        apply_loras(getattr(ours, component), [(convert.load(kohya, name), 1.0)], component=component)
    torch.testing.assert_close(found["trained"], encoded(name, ours, captions)["pooled"], rtol=1e-4, atol=1e-4)
    assert (found["trained"] - found["base"]).norm() > 1e-3 * found["base"].norm()
    assert (found["longer"] - found["base"]).norm() > 1e-2 * found["base"].norm()


def test_the_older_names_of_magnitudes_are_still_read(trained):
    modules = {"text_encoder.text_model.encoder.layers.0.mlp.fc1": next(iter(trained[2].values()))}
    tensors = convert.to_file(modules, "peft", "flux").tensors
    older = {k.replace("_vector.weight", "_vector"): v for k, v in tensors.items()}
    assert older.keys() != tensors.keys()
    (new,), (old,) = (convert.from_tensors(t, {}, "flux").values() for t in (tensors, older))
    assert torch.equal(new.magnitude, old.magnitude)


def test_the_scale_of_rslora_is_by_the_root_of_the_rank(job_plan, tmp_path):
    shape = {"PARAMS_NETWORK_DIM": "4", "PARAMS_NETWORK_ALPHA": "2"}
    assert job_plan("sdxl", **shape).lora.scale == 0.5
    plan = job_plan("sdxl", **shape, **QUICK, PARAMS_LORA_TYPE="rslora")
    assert plan.lora.scale == 1.0
    run(plan, StopFlag())
    alphas = {v.item() for k, v in load_file(tmp_path / "out" / "x.safetensors").items() if k.endswith(".alpha")}
    assert alphas == {4.0}  # tools divide by the rank


@pytest.fixture
def trained(flux_denoiser, text):
    """A Flux model with a trained DoRA, what it gives, and its modules."""
    fused = flux.FACTS.fused_targets
    adapters.fuse_projections(flux.blocks(flux_denoiser), fused=fused, targets=flux.FACTS.targets)
    params = adapters.add_adapters(
        flux_denoiser, flux.blocks(flux_denoiser), targets=flux.FACTS.targets, fused=fused, rank=3, alpha=2.0, seed=7,
        kind="dora",
    )  # fmt: skip
    torch.manual_seed(5)
    for p in params:
        p.data += 0.1 * torch.randn(p.shape)
    x, t = torch.randn(2, 16, 4, 6), torch.tensor([0.3, 0.8])
    modules = peft_bridge.from_peft_state(adapters.state(flux_denoiser), prefix="transformer", fused=fused, scale=2 / 3)
    return flux_denoiser, lambda: flux.predict(flux_denoiser, x, t, text=text, guidance=1.0), modules


def test_it_goes_onto_weights_in_8_bits(flux_denoiser, text, tmp_path):
    for _, block in flux.blocks(flux_denoiser):
        freeze(block, "int8-storage")
    targets = ("ff.net.0.proj", "attn.to_out.0")
    params = adapters.add_adapters(
        flux_denoiser, flux.blocks(flux_denoiser), targets=targets, fused={}, rank=3, alpha=2.0, seed=7, kind="dora"
    )
    x, t = torch.randn(2, 16, 4, 6), torch.tensor([0.3, 0.8])
    out = lambda: flux.predict(flux_denoiser, x, t, text=text, guidance=1.0)  # noqa: E731
    out().square().mean().backward()
    assert sum(p.grad is not None and p.grad.abs().max() > 0 for p in params) >= len(params) * 2 / 3
    for p in params:
        p.data += 0.1 * torch.randn(p.shape)
    modules = peft_bridge.from_peft_state(adapters.state(flux_denoiser), prefix="transformer", fused={}, scale=2 / 3)
    save_file(convert.to_file(modules, "kohya", "flux").tensors, tmp_path / "x.safetensors")
    assert check(tmp_path / "x.safetensors", flux_denoiser, out).output < 1e-3


def check(path, denoiser, out, save_precision="fp32"):
    models, fused = {"transformer": denoiser}, flux.FACTS.fused_targets
    return verify(path, models, family_name="flux", fused=fused, save_precision=save_precision, output=out)


@pytest.mark.parametrize("save_precision", SAVE_PRECISIONS)
@pytest.mark.parametrize("to", convert.KEY_FORMATS)
def test_a_right_file_passes(trained, tmp_path, to, save_precision):
    """Magnitudes stay in fp32: training changes their last bits."""
    denoiser, out, modules = trained
    tensors = convert.to_file(modules, to, "flux", save_precision).tensors
    save_file(tensors, tmp_path / "x.safetensors")
    assert {v.dtype for k, v in tensors.items() if "dora" in k or "magnitude" in k} == {torch.float32}
    before = out()
    assert check(tmp_path / "x.safetensors", denoiser, out, save_precision).output < (
        1e-5 if save_precision == "fp32" else SAVE_PRECISIONS[save_precision].bound
    )
    assert torch.equal(out(), before)


def change(tensors, ending, how):
    return {k: how(v) if k.endswith(ending) else v for k, v in tensors.items()}


MUTATIONS = {
    "no magnitudes": lambda t: {k: v for k, v in t.items() if not k.endswith(".dora_scale")},
    "one layer without": lambda t: {k: v for k, v in t.items() if not k.endswith("0_linear2.dora_scale")},
    "rows in another order": lambda t: change(t, ".dora_scale", lambda v: v.flip(0)),
    "one percent longer": lambda t: change(t, ".dora_scale", lambda v: v * 1.01),
    "twice the product": lambda t: change(t, ".alpha", lambda v: v * 2),
}


@pytest.mark.parametrize("save_precision", SAVE_PRECISIONS)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_file_is_an_error(trained, tmp_path, mutation, save_precision):
    denoiser, out, modules = trained
    tensors = MUTATIONS[mutation](convert.to_file(modules, "kohya", "flux", save_precision).tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(FileMismatchError):
        check(tmp_path / "x.safetensors", denoiser, out, save_precision)


def test_nothing_is_lost_between_the_formats(trained, tmp_path):
    *_, modules = trained
    for to in convert.KEY_FORMATS:
        back = convert.from_tensors(convert.to_file(modules, to, "flux").tensors, {}, "flux")
        assert back.keys() == modules.keys()
        for name, adapter in modules.items():
            torch.testing.assert_close(back[name].delta(), adapter.delta())
            assert torch.equal(back[name].magnitude, adapter.magnitude)
    save_file(convert.to_file(modules, "kohya", "flux").tensors, tmp_path / "x.safetensors")
    one = str(tmp_path / "x.safetensors")
    assert export_command(["--merge", one, one, "--out", str(tmp_path / "y.safetensors")]) == 78
    assert export_command([one, "--to", "peft", "--out", str(tmp_path / "y.safetensors")]) == 0


def test_a_dora_goes_on_as_a_dora_alone(job_plan, tmp_path):
    run(job_plan("sd3", **QUICK, **SHAPE, PARAMS_LORA_TYPE="dora"), StopFlag())
    file = str(tmp_path / "out" / "x.safetensors")
    more = {**SHAPE, "PARAMS_RESUME_FROM": file, "OUTPUT_PATH": str(tmp_path / "next")}
    with pytest.raises(SettingsError, match="PARAMS_LORA_TYPE=dora"):
        job_plan("sd3", **more)
    still = {**QUICK, "PARAMS_LEARNING_RATE": "1e-30", "PARAMS_TEXT_ENCODER_LR": "1e-30", "PARAMS_MAX_STEPS": "1"}
    run(job_plan("sd3", **{**more, **still}, PARAMS_LORA_TYPE="dora"), StopFlag())
    first, second = (
        convert.load(tmp_path / "out" / "x.safetensors", "sd3"),
        convert.load(tmp_path / "next" / "x.safetensors", "sd3"),
    )
    assert first.keys() == second.keys()
    for name, adapter in first.items():
        torch.testing.assert_close(second[name].delta(), adapter.delta(), rtol=1e-5, atol=1e-7)
        assert torch.equal(second[name].magnitude, adapter.magnitude)


def test_a_part_of_a_layer_that_files_have_as_one_trains_alone(job_plan, tmp_path):
    only = {**QUICK, **SHAPE, "PARAMS_LORA_TYPE": "dora", "PARAMS_TARGET_MODULES": "attn.to_q,proj_out"}
    plan = job_plan("flux", **only)
    assert any("sd-scripts" in reason for reason in plan.reasons)
    run(plan, StopFlag())
    kohya, peft = tmp_path / "out" / "x.safetensors", tmp_path / "out" / "x-diffusers.safetensors"
    modules = convert.load(kohya, "flux")
    assert modules.keys() == convert.load(peft, "flux").keys()
    assert {name.split("attn.")[-1] for name in modules if ".attn." in name and "text" not in name} == {"to_q"}
    # The rows without a LoRA keep their own norms, so that every reader leaves them as they are.
    base = get_family("flux").load_denoiser(folder("flux"), device="cpu", dtype=torch.float32)
    rows = load_file(kohya)["lora_unet_double_blocks_0_img_attn_qkv.dora_scale"].flatten()
    norms = base.transformer_blocks[0].attn.to_k.weight.norm(dim=1)
    torch.testing.assert_close(rows[len(norms) : 2 * len(norms)], norms)
    pipe, before = pipeline("flux"), output("flux", base)
    pipe.load_lora_weights(peft)
    apply_loras(base, [(modules, 1.0)], component="transformer")
    torch.testing.assert_close(output("flux", base), output("flux", pipe.transformer), rtol=1e-4, atol=1e-4)
    assert (output("flux", base) - before).norm() > 0.01 * before.norm()
    again = tmp_path / "again.safetensors"  # the same file by the export tool, with the rows that did not train
    assert export_command([str(kohya), "--to", "kohya", "--out", str(again)]) == 0
    assert load_file(again).keys() == load_file(kohya).keys()
    assert all(torch.equal(tensor, load_file(again)[key]) for key, tensor in load_file(kohya).items())
    assert export_command([str(kohya), "--to", "peft", "--out", str(tmp_path / "p.safetensors")]) == 0
    assert convert.load(tmp_path / "p.safetensors", "flux").keys() == modules.keys()
    assert export_command([str(again), "--to", "comfyui", "--out", str(tmp_path / "c.safetensors")]) == 0
    assert convert.load(tmp_path / "c.safetensors", "flux").keys() == modules.keys()
    more = {**only, "PARAMS_RESUME_FROM": str(kohya), "OUTPUT_PATH": str(tmp_path / "next")}
    del more["PARAMS_TARGET_MODULES"]
    assert job_plan("flux", **more).lora.targets == ("attn.to_q", "proj_out")
    run(job_plan("flux", **more), StopFlag())
