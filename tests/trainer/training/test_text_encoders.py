"""CLIP text encoders that train along: against diffusers' pipelines, for each family, with the miniatures' own."""

import json
import signal

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from peft import LoraConfig
from peft.utils import set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from tests.support.miniatures import FAMILIES, encoded, folder, pipeline
from trainer import sample
from trainer.data.batches import MicroBatch
from trainer.engine import adapters
from trainer.job import session
from trainer.job.run import run
from trainer.lora_files import arguments
from trainer.spec.errors import SettingsError, StopRequestedError
from trainer.spec.family import get_family, trainable_encoders
from trainer.spec.plan import TrainPlan
from trainer.training import optimizers, text_encoders
from trainer.training.gradients import seeded
from trainer.training.loop import train
from trainer.training.objective import make_objective
from trainer.training.step_guard import StepGuard
from trainer.training.stop_flag import StopFlag

CAPTIONS = ("a red circle on a grey background", "a big kilnpot")
RANK, ALPHA, SEED, RATES = 4, 2.0, 42, {"text_encoder": 0.02, "text_encoder_2": 0.01}


def adapted(name, components):
    """The encoders with adapters, and what trains in each."""
    texts = text_encoders.load(folder(name), components, family=get_family(name), device="cpu", dtype=torch.float32)
    params = {
        component: adapters.add_adapters(
            model, text_encoders.blocks(model), targets=text_encoders.TARGETS, fused={}, rank=RANK, alpha=ALPHA, seed=7
        )
        for component, model in texts.models.items()
    }
    return texts, params


def given(model, state):
    """The same adapters on a model of diffusers' pipeline."""
    names = sorted({key.rpartition(".lora_")[0] for key in state})
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names), adapter_name="default")
    set_peft_model_state_dict(model, state)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("which", [0, 1, None], ids=["the first", "the second", "all"])
def test_captions_are_encoded_as_the_pipeline_does(name, which):
    every = list(trainable_encoders(name))
    components = every if which is None else every[which : which + 1]
    if not components:
        pytest.skip("this family has one CLIP encoder")
    texts, params = adapted(name, components)
    for p in (p for some in params.values() for p in some):
        torch.nn.init.normal_(p, std=0.05)
    pipe = pipeline(name)
    with torch.no_grad():
        before = encoded(name, pipe, CAPTIONS)
        for component, model in texts.models.items():
            given(getattr(pipe, component), adapters.state(model))
        expected, got = encoded(name, pipe, CAPTIONS), texts.encode_trained(before, CAPTIONS)
    for key in ("tokens", "pooled"):
        torch.testing.assert_close(got[key], expected[key], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before["pooled"], expected["pooled"], atol=1e-3) or (name, which) == ("sdxl", 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_they_are_loaded_frozen_in_the_type_and_for_the_length_that_is_asked_for(name):
    components = list(trainable_encoders(name))
    kind = {"family": get_family(name), "device": "cpu", "dtype": torch.bfloat16, "max_tokens": 150}
    texts = text_encoders.load(folder(name), components, **kind)
    assert list(texts.models) == components
    for component, encoder in texts.encoders.items():
        weights = [*encoder.model.parameters()]
        assert {p.dtype for p in weights} == {torch.bfloat16} and not encoder.model.training
        room = encoder.tokenizer.model_max_length - 2
        assert encoder(CAPTIONS).tokens_BLD.shape[:2] == (2, 2 * room + 2), component
        for place, layer in text_encoders.blocks(encoder.model):
            assert encoder.model.get_submodule(place) is layer
        assert len(text_encoders.blocks(encoder.model)) == encoder.model.config.num_hidden_layers


def test_without_any_that_trains_the_texts_are_the_cached_ones():
    text = {"tokens": torch.ones(1)}
    assert text_encoders.TextEncoders(get_family("sdxl")).encode_trained(text, ["a"]) is text


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_come_back_from_the_names_that_files_use(name):
    """Each encoder takes its own, with the scale of the file in it, and refuses what does not fit."""
    components = list(trainable_encoders(name))
    (trained, params), (fresh, _) = adapted(name, components), adapted(name, components)
    for p in (p for some in params.values() for p in some):
        torch.nn.init.normal_(p, std=0.05)
    loaded = {}
    for component, model in trained.models.items():
        own = text_encoders.modules(adapters.state(model), component, family_name=name, scale=ALPHA / RANK)
        assert f"{component}.text_model.encoder.layers.0.mlp.fc1" in own and len(own) * 2 == len(adapters.state(model))
        loaded |= own
    assert len(loaded) == sum(len(adapters.state(model)) for model in trained.models.values()) // 2
    for component, model in fresh.models.items():
        text_encoders.start(model, component, loaded, family_name=name, scale=ALPHA / RANK)
        expected, got = adapters.state(trained.models[component]), adapters.state(model)
        assert got.keys() == expected.keys()
        for module in {key.rpartition(".lora_")[0] for key in got}:
            products = [t[f"{module}.lora_B.weight"] @ t[f"{module}.lora_A.weight"] for t in (expected, got)]
            torch.testing.assert_close(products[1], products[0], rtol=1e-5, atol=1e-7)
    loaded[f"{components[0]}.text_model.encoder.layers.99.mlp.fc1"] = next(iter(loaded.values()))
    with pytest.raises(ValueError, match="99"):
        text_encoders.start(fresh.models[components[0]], components[0], loaded, family_name=name, scale=1.0)


def micro_batch(name, text):
    channels = 4 if name == "sdxl" else 16
    generator = torch.Generator().manual_seed(1)
    mean, std = torch.randn(2, 2, channels, 16, 16, generator=generator)
    geometry = torch.tensor([[128.0, 128, 0, 0, 128, 128]] * 2)
    moments = torch.cat([mean, 0.1 * std.abs()], dim=1)
    return MicroBatch(moments, text, geometry, None, torch.ones(2), ("a.png", "b.png"), CAPTIONS)


def objective(name):
    plan = TrainPlan(timestep_sampling=get_family(name).FACTS.timestep_samplings[0])
    return make_objective(get_family(name).FACTS, plan, scheduler=folder(name) / "scheduler", device="cpu")


def predicted(name, pipe, noisy, t, text, batch):
    """The model's output, by diffusers' own names."""
    if name == "sdxl":
        told = {"text_embeds": text["pooled"], "time_ids": batch.geometry_B6}
        return pipe.unet(noisy, (t * 1000).round(), encoder_hidden_states=text["tokens"], added_cond_kwargs=told).sample
    if name == "sd3":
        return pipe.transformer(
            hidden_states=noisy, timestep=t * 1000,
            encoder_hidden_states=text["tokens"], pooled_projections=text["pooled"],
        ).sample  # fmt: skip
    b, c, h, w = noisy.shape
    packed = pipe.transformer(
        hidden_states=FluxPipeline._pack_latents(noisy, b, c, h, w),
        timestep=t,
        guidance=torch.ones(b),
        pooled_projections=text["pooled"],
        encoder_hidden_states=text["tokens"],
        txt_ids=torch.zeros(text["tokens"].shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", torch.float32),
    ).sample
    return FluxPipeline._unpack_latents(packed, h * 8, w * 8, 8)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_them_is_a_straightforward_loop(name):
    """Denoiser and encoders, each with its own learning rate: the losses of a loop that encodes with the pipeline."""
    kind, trained_on, pipe = get_family(name), objective(name), pipeline(name)
    with torch.no_grad():
        cached = encoded(name, pipe, CAPTIONS)
    batch = micro_batch(name, cached)
    denoiser = kind.load_denoiser(folder(name), device="cpu", dtype=torch.float32)
    targets, blocks = kind.FACTS.targets, kind.blocks(denoiser)
    shape = {"rank": RANK, "alpha": ALPHA, "seed": 7}
    own = adapters.add_adapters(denoiser, blocks, targets=targets, fused={}, **shape)
    texts, params = adapted(name, list(trainable_encoders(name)))
    begin = [adapters.state(denoiser), *map(adapters.state, texts.models.values())]
    begin = [{k: v.clone() for k, v in state.items()} for state in begin]
    groups = [{"params": own}, *({"params": some, "lr": RATES[c]} for c, some in params.items())]
    optimizer = optimizers.make_optimizer("adamw", groups, learning_rate=0.005, weight_decay=0.0, args={})
    got = [
        step.loss
        for step in train(
            ((1, [batch]) for _ in range(5)),
            predict=lambda noisy, t, b: kind.predict(
                denoiser,
                noisy,
                t,
                text=texts.encode_trained(b.text, b.captions),
                guidance=1.0,
                geometry_B6=b.geometry_B6,
            ),
            objective=trained_on,
            params=[p for group in groups for p in group["params"]],
            optimizer=optimizer,
            schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
            max_grad_norm=1.0,
            guard=StepGuard(),
            device="cpu",
            seed=SEED,
            first_step=1,
        )
    ]
    expected = straightforward(name, pipe, trained_on, batch, begin, list(params))
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert len(set(got)) == 5
    for component, model in texts.models.items():
        moved = [v.abs().max() > 0 for k, v in adapters.state(model).items() if ".lora_B." in k]
        assert sum(moved) >= len(moved) / 2, component  # the last layer's output is not read by every pipeline


def straightforward(name, pipe, objective, batch, begin, components):
    denoiser = pipe.unet if name == "sdxl" else pipe.transformer
    rates = [0.005, *(RATES[c] for c in components)]
    params = []
    for model, state in zip((denoiser, *(getattr(pipe, c) for c in components)), begin, strict=True):
        model.requires_grad_(False)
        given(model, state)
        params.append([p for p in model.parameters() if p.requires_grad])
    for frozen in {"text_encoder_2", "text_encoder_3"} - set(components):
        if getattr(pipe, frozen, None) is not None:
            getattr(pipe, frozen).requires_grad_(False)
    pairs = zip(params, rates, strict=True)
    optimizer = torch.optim.AdamW([{"params": p, "lr": rate} for p, rate in pairs], weight_decay=0.0)
    losses = []
    for step in range(1, 6):
        generator = seeded(torch.Generator(), SEED, step, 0)
        mean, std = batch.moments_B2CHW.chunk(2, dim=1)
        drawn = objective.add_noise(mean + std * torch.randn(mean.shape, generator=generator), generator)
        out = predicted(name, pipe, drawn.noisy_BCHW, drawn.t_B, encoded(name, pipe, CAPTIONS), batch)
        loss = F.mse_loss(out, drawn.target_BCHW)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for some in params for p in some], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


ADAMW = {
    "PARAMS_OPTIMIZER_TYPE": "adamw",
    "PARAMS_LEARNING_RATE": "0.01",
    "PARAMS_NETWORK_DIM": "4",
    "PARAMS_SAVE_PRECISION": "fp32",
}
SPELLED = {
    "flux": {"kohya": {"lora_unet", "lora_te1"}, "peft": {"transformer", "text_encoder"}},
    "sdxl": {"kohya": {"lora_unet", "lora_te1", "lora_te2"}, "peft": {"unet", "text_encoder", "text_encoder_2"}},
    "sd3": {"kohya": {"lora_unet", "lora_te1", "lora_te2"}, "peft": {"transformer", "text_encoder", "text_encoder_2"}},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_job_saves_them_where_every_tool_looks_and_goes_on_from_there(name, job_plan, tmp_path, monkeypatch):
    rates = "0.02" if name == "flux" else "0.02,0.01"
    asked = {**ADAMW, "PARAMS_TEXT_ENCODER_LR": rates, "PARAMS_MAX_STEPS": "4"}
    run(job_plan(name, **asked, OUTPUT_PATH=str(tmp_path / "whole")), StopFlag())
    kohya = load_file(tmp_path / "whole" / "x.safetensors")
    peft = load_file(tmp_path / "whole" / "x-diffusers.safetensors")
    assert {"_".join(key.split("_")[:2]) for key in kohya} == SPELLED[name]["kohya"]
    assert {key.split(".")[0] for key in peft} == SPELLED[name]["peft"]
    assert all(".text_model.encoder.layers." in key for key in peft if key.startswith("text_encoder"))
    assert all("_text_model_encoder_layers_" in key for key in kohya if key.startswith("lora_te"))
    assert all(kohya[key].any() for key in kohya if "te1_text_model_encoder_layers_0_mlp_fc1.lora_up" in key)

    with safe_open(tmp_path / "whole" / "x.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["ss_text_encoder_lr"]) == [float(rate) for rate in rates.split(",")]

    # Stopped after the second step, and gone on: the same bytes.
    plan = job_plan(name, **asked, OUTPUT_PATH=str(tmp_path / "parts"))
    stop = StopFlag()
    record = session.Metrics.step

    def step(self, done, *, learning_rate, estimate, compiled):
        record(self, done, learning_rate=learning_rate, estimate=estimate, compiled=compiled)
        stop.signal = signal.SIGTERM if done.number == 2 else None

    with monkeypatch.context() as patched, pytest.raises(StopRequestedError):
        patched.setattr(session.Metrics, "step", step)
        run(plan, stop)
    run(plan, StopFlag())
    for file in ("x.safetensors", "x-diffusers.safetensors"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()

    # Gone on from the file's weights alone, which one step that changes nothing shows.
    start = {"PARAMS_RESUME_FROM": str(tmp_path / "whole" / "x.safetensors"), "OUTPUT_PATH": str(tmp_path / "next")}
    still = {"PARAMS_LEARNING_RATE": "1e-30", "PARAMS_TEXT_ENCODER_LR": "1e-30", "PARAMS_MAX_STEPS": "1"}
    run(job_plan(name, **{**asked, **start, **still}), StopFlag())
    again = load_file(tmp_path / "next" / "x-diffusers.safetensors")
    for module in {key.rpartition(".lora_")[0] for key in peft}:
        products = [t[f"{module}.lora_B.weight"] @ t[f"{module}.lora_A.weight"] for t in (peft, again)]
        torch.testing.assert_close(products[1], products[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", FAMILIES)
def test_diffusers_and_our_sampler_draw_with_them(name, job_plan, tmp_path):
    run(job_plan(name, **ADAMW, PARAMS_TEXT_ENCODER_LR="0.05", PARAMS_MAX_STEPS="3"), StopFlag())
    file, pipe = tmp_path / "out" / "x-diffusers.safetensors", pipeline(name)
    before = encoded(name, pipe, CAPTIONS)
    pipe.load_lora_weights(file)
    expected = encoded(name, pipe, CAPTIONS)
    assert not torch.allclose(before["pooled"], expected["pooled"], atol=1e-3)

    encoders = get_family(name).load_encoders(folder(name), device="cpu", dtype=torch.float32)
    loaded = [(arguments.load_lora(tmp_path / "out" / "x.safetensors", name), 1.0)]
    for component in get_family(name).LORA_KEYS.encoders:
        sample.apply_loras(getattr(encoders, component), loaded, component=component)
    ours = get_family(name).encode_text(encoders, list(CAPTIONS))
    for key in ("tokens", "pooled"):
        torch.testing.assert_close(torch.stack([o[key] for o in ours]), expected[key], rtol=1e-4, atol=1e-4)


def test_rates_are_one_for_all_or_one_for_each(job_plan):
    rates = job_plan("sdxl", **ADAMW, PARAMS_TEXT_ENCODER_LR="0, 1e-5").optim.text_encoders
    assert rates == {"text_encoder_2": 1e-5}
    assert job_plan("flux").optim.text_encoders == {}
    both = job_plan("sd3", PARAMS_TEXT_ENCODER_LR="1").optim.text_encoders
    assert both == {"text_encoder": 1.0, "text_encoder_2": 1.0}
    with pytest.raises(SettingsError, match=r"PARAMS_TEXT_ENCODER_LR=1,1: mini-flux has 1 to train, CLIP-L"):
        job_plan("flux", PARAMS_TEXT_ENCODER_LR="1,1")
    with pytest.raises(SettingsError, match="prodigy finds one step size for all"):
        job_plan("sdxl", PARAMS_TEXT_ENCODER_LR="0.1")


def test_a_file_with_encoders_needs_a_job_that_trains_them(job_plan, tmp_path):
    run(job_plan("sdxl", **ADAMW, PARAMS_TEXT_ENCODER_LR="0.01,0", PARAMS_MAX_STEPS="1"), StopFlag())
    file = str(tmp_path / "out" / "x.safetensors")
    with pytest.raises(SettingsError, match="PARAMS_TEXT_ENCODER_LR"):
        job_plan("sdxl", PARAMS_RESUME_FROM=file)
    plan = job_plan("sdxl", PARAMS_RESUME_FROM=file, PARAMS_TEXT_ENCODER_LR="1,0")
    assert plan.lora.rank == 4
    assert json.loads(plan.to_json())["optim"]["text_encoders"] == {"text_encoder": 1.0}
