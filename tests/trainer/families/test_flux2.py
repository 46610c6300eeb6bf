"""FLUX.2's conventions against diffusers: template, statistics, guidance, LoRA files. More: test_contract.py."""

import copy
import dataclasses
import json
import shutil

import pytest
import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from PIL import ImageChops
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3ForCausalLM,
)

from entrypoint.dataset_config.manifest import read_manifest
from entrypoint.planning.plan import make_plan
from entrypoint.settings.read import read_settings
from tests.support import models
from tests.support.machines import HOME, NOW
from tests.support.miniatures import folder, pipeline
from trainer.base_model import loading
from trainer.engine import adapters
from trainer.families import flux2
from trainer.lora_files import contents, convert
from trainer.lora_files.weights import LoraWeights
from trainer.sample import apply_loras
from trainer.spec import prompts
from trainer.spec.errors import SettingsError
from trainer.spec.family import facts_of
from trainer.spec.plan import Prompt

SIZES = [(2, 2), (4, 16), (8, 8), (10, 6)]  # of latents


def own_velocity(denoiser, noisy, t, tokens, guidance=None):
    """As the pipeline calls the model: its own packing and places."""
    patches = Flux2KleinPipeline._patchify_latents(noisy)
    out = denoiser(
        hidden_states=Flux2KleinPipeline._pack_latents(patches),
        timestep=t,
        guidance=guidance,
        encoder_hidden_states=tokens,
        txt_ids=Flux2KleinPipeline._prepare_text_ids(tokens),
        img_ids=Flux2KleinPipeline._prepare_latent_ids(patches),
        return_dict=False,
    )[0]
    places = Flux2KleinPipeline._prepare_latent_ids(patches)
    unpacked = Flux2KleinPipeline._unpack_latents_with_ids(out, places, *patches.shape[2:])
    return Flux2KleinPipeline._unpatchify_latents(unpacked)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("guided", [False, True], ids=["klein", "with embedded guidance"])
def test_the_velocity_is_that_of_the_models_own_forward_pass(guided, size):
    denoiser = models.flux2_denoiser(guidance_embeds=guided)
    torch.manual_seed(1)
    noisy, t, text = torch.randn(2, 16, *size), torch.rand(2), models.flux2_text()
    with torch.no_grad():
        got = flux2.predict(denoiser, noisy, t, text=text, guidance=3.5)
        expected = own_velocity(denoiser, noisy, t, text["tokens"], torch.full((2,), 3.5) if guided else None)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("guided", [False, True], ids=["klein", "with embedded guidance"])
def test_only_a_model_with_the_embedding_is_told_the_guidance(guided):
    denoiser = models.flux2_denoiser(guidance_embeds=guided)
    noisy, t = torch.randn(1, 16, 4, 4), torch.rand(1)
    text = {"tokens": models.flux2_text()["tokens"][:1]}
    with torch.no_grad():
        weak, strong = (flux2.predict(denoiser, noisy, t, text=text, guidance=scale) for scale in (1.0, 4.0))
    assert torch.equal(weak, strong) != guided


def test_gradients_are_those_of_the_models_own_forward_pass():
    denoiser, text = models.flux2_denoiser(), models.flux2_text()
    params = adapters.add_adapters(
        denoiser, flux2.blocks(denoiser), targets=flux2.FACTS.targets, fused={}, rank=2, alpha=2.0, seed=7
    )
    for p in params:
        torch.nn.init.normal_(p, std=0.2)
    torch.manual_seed(1)
    noisy, t, target = torch.randn(2, 16, 4, 6), torch.rand(2), torch.randn(2, 16, 4, 6)
    ours = flux2.predict(denoiser, noisy, t, text=text, guidance=1.0)
    theirs = own_velocity(denoiser, noisy, t, text["tokens"])
    gradients = [torch.autograd.grad((out - target).square().mean(), params) for out in (ours, theirs)]
    for one, other in zip(*gradients, strict=True):
        assert one.any()
        torch.testing.assert_close(one, other)


# ---- texts


@pytest.fixture(scope="module")
def encoders():
    return flux2.load_encoders(folder("flux2"), device="cpu", dtype=torch.float32)


def test_captions_are_given_to_qwen_as_its_chat_template_says(encoders):
    """Without thinking, as the pipeline sets it: an empty thought is in the template."""
    own = Qwen2Tokenizer.from_pretrained(folder("flux2") / "tokenizer")
    for caption in ("a red spot", "", "two\nlines"):
        message = [{"role": "user", "content": caption}]
        templates = [
            own.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
            for thinking in (False, True)
        ]
        assert templates[0] == f"{flux2.QWEN3.before}{caption}{flux2.QWEN3.after}" != templates[1]


@pytest.mark.parametrize("words", [["a red spot", "", "a big teal and yellow striped hexagon " * 9], ["x " * 900]])
def test_texts_are_those_of_the_pipeline(encoders, words):
    pipe = pipeline("flux2")
    with torch.no_grad():
        expected, _ = pipe.encode_prompt(list(words), device="cpu", max_sequence_length=pipe.tokenizer.model_max_length)
    for item, wanted in zip(flux2.encode_text(encoders, list(words)), expected, strict=True):
        assert torch.equal(item["tokens"], wanted)


def test_the_encoder_may_be_saved_as_the_published_one_is(encoders, tmp_path):
    """As the language model with an output layer of its own; in shards; with an older config and more layers."""
    shutil.copytree(folder("flux2"), tmp_path, ignore=shutil.ignore_patterns("text_encoder"), dirs_exist_ok=True)
    config = copy.deepcopy(encoders.text_encoder.config)
    config.num_hidden_layers, config.tie_word_embeddings = 30, False
    config.layer_types = ["full_attention"] * 30
    whole = Qwen3ForCausalLM(config)
    whole.model.load_state_dict(encoders.text_encoder.state_dict(), strict=False)
    whole.save_pretrained(tmp_path / "text_encoder", max_shard_size="200KB")
    path = tmp_path / "text_encoder" / "config.json"
    saved = json.loads(path.read_text())
    rope = saved.pop("rope_parameters")
    path.write_text(json.dumps({**saved, "rope_theta": rope["rope_theta"], "rope_scaling": None}))
    found = flux2.load_encoders(tmp_path, device="cpu", dtype=torch.float32)
    assert len(found.text_encoder.layers) == flux2.QWEN3.states[-1]
    ours, theirs = (flux2.encode_text(own, ["a red spot"])[0]["tokens"] for own in (found, encoders))
    assert torch.equal(ours, theirs)


# ---- dev's texts


@pytest.fixture(scope="module")
def dev_encoders():
    return flux2.load_encoders(folder("flux2_dev"), device="cpu", dtype=torch.float32)


def test_dev_reads_captions_as_the_chat_template_says():
    """The system message is the pipeline's, and the template's that of Mistral's own tokenizer."""
    own = AutoTokenizer.from_pretrained(folder("flux2_dev") / "tokenizer")
    for caption in ("a red spot", "", "two\nlines"):
        (message,) = format_input([caption], SYSTEM_MESSAGE)
        assert own.apply_chat_template(message, tokenize=False) == (
            f"{flux2.MISTRAL.before}{caption}{flux2.MISTRAL.after}"
        )


@pytest.mark.parametrize("words", [["a red spot", "", "[IMG] a dog"], ["x " * 900, "y"]])
def test_dev_texts_are_those_of_the_pipeline(dev_encoders, words):
    """Filled up on the left, without the mark of an image, and cut at the end of the template's last mark."""
    pipe = pipeline("flux2_dev")
    length = pipe.tokenizer.model_max_length
    with torch.no_grad():
        expected, _ = pipe.encode_prompt(list(words), device="cpu", max_sequence_length=length)
    for item, wanted in zip(flux2.encode_text(dev_encoders, list(words)), expected, strict=True):
        assert torch.equal(item["tokens"], wanted)


@pytest.mark.parametrize("names", ["language_model.model.", "model.language_model.", "language_model."])
def test_devs_encoder_may_be_saved_as_the_published_one_is(dev_encoders, tmp_path, names):
    """With what reads images, more layers than are read, and the names of different versions of transformers."""
    shutil.copytree(folder("flux2_dev"), tmp_path, ignore=shutil.ignore_patterns("text_encoder"), dirs_exist_ok=True)
    read = dev_encoders.text_encoder
    text = {**read.config.to_dict(), "num_hidden_layers": 40}
    images = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8}
    whole = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=images))
    whole.model.language_model.load_state_dict(read.state_dict(), strict=False)
    tensors = {}
    for name, tensor in whole.state_dict().items():
        tensors[name.replace("model.language_model.", names)] = tensor.clone()  # some are tied
    place = tmp_path / "text_encoder"
    place.mkdir()
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    whole.config.save_pretrained(place)
    saved = json.loads((place / "config.json").read_text())
    saved["architectures"] = ["Mistral3ForConditionalGeneration"]
    rope = saved["text_config"].pop("rope_parameters")
    saved["text_config"]["rope_theta"] = rope["rope_theta"]
    (place / "config.json").write_text(json.dumps(saved))
    found = flux2.load_encoders(tmp_path, device="cpu", dtype=torch.float32)
    assert len(found.text_encoder.layers) == flux2.MISTRAL.states[-1]
    ours, theirs = (flux2.encode_text(own, ["a red spot"])[0]["tokens"] for own in (found, dev_encoders))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("saved_as", ["LlamaTokenizer", "LlamaTokenizerFast", "TokenizersBackend"])
def test_devs_tokenizer_may_be_saved_as_the_published_one_is(tmp_path, saved_as):
    """By an older transformers: the marks in the config too, no limit of length, and filling up on the right."""
    place = tmp_path / "tokenizer"
    shutil.copytree(folder("flux2_dev") / "tokenizer", place)
    marks = json.loads((place / "tokenizer.json").read_text())["added_tokens"]
    config = {
        **{
            name: json.loads((place / "tokenizer_config.json").read_text())[name] for name in ("bos_token", "eos_token")
        },
        "unk_token": "<unk>",
        "tokenizer_class": saved_as,
        "processor_class": "PixtralProcessor",
        "legacy": True,
        "model_max_length": 10**30,
        "padding_side": "right",
        "extra_special_tokens": {},
        "additional_special_tokens": [mark["content"] for mark in marks],
        "added_tokens_decoder": {str(mark["id"]): {k: v for k, v in mark.items() if k != "id"} for mark in marks},
    }
    (place / "tokenizer_config.json").write_text(json.dumps(config))
    found, own = (
        loading.load_tokenizer(each, flux2.MISTRAL.kinds["tokenizer"])
        for each in (place, folder("flux2_dev") / "tokenizer")
    )
    text = f"{flux2.MISTRAL.before}don't 2048 Ünïcode 😀\n{flux2.MISTRAL.after}"
    assert found(text).input_ids == own(text).input_ids and found.pad_token_id == own.pad_token_id
    assert found.convert_tokens_to_ids(["<s>", "[INST]", "[/SYSTEM_PROMPT]"]) == [1, 4, 7]


def test_a_text_encoder_with_too_few_layers_is_named():
    encoder = {"hidden_size": 24, "num_hidden_layers": 29}
    sizes = flux2.published.dev_same_sizes({"text_encoder": encoder})
    assert sizes == [("the depth that is read", "text_encoder num_hidden_layers", 30, 29)]
    assert all(
        one == other
        for *_, one, other in flux2.published.dev_same_sizes({"text_encoder": {**encoder, "num_hidden_layers": 40}})
    )


# ---- the VAE and the schedule


def test_statistics_that_are_no_numbers_are_named(tmp_path):
    shutil.copytree(folder("flux2") / "vae", tmp_path / "vae")
    vae = models.flux2_vae()
    vae.bn.running_mean[3] = float("nan")
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(SettingsError, match=r"bn\.running_mean has values that are not numbers"):
        flux2.load_vae(tmp_path, device="cpu")


def test_the_schedule_of_a_sample_has_the_shift_of_its_size_and_steps():
    scheduler = loading.load_scheduler(
        type(models.flux_scheduler()), folder("flux2") / "scheduler", flux2.KINDS["scheduler"], None
    )
    mu = compute_empirical_mu(image_seq_len=4096, num_steps=50)
    scheduler.set_timesteps(50, mu=mu, sigmas=torch.linspace(1, 1 / 50, 50).numpy())
    t = torch.linspace(1, 1 / 50, 50)
    shift = torch.tensor(mu).exp()
    torch.testing.assert_close(scheduler.sigmas[:50], shift * t / (1 + (shift - 1) * t))


def test_a_distilled_model_is_drawn_without_cfg_as_its_own_pipeline_does(tmp_path):
    place = tmp_path / "model"
    shutil.copytree(folder("flux2"), place)
    index = json.loads((place / "model_index.json").read_text())
    images = {}
    for distilled in (False, True):
        (place / "model_index.json").write_text(json.dumps({**index, "is_distilled": distilled}))
        pipe = Flux2KleinPipeline.from_pretrained(place, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        expected = pipe(
            prompt="a red spot",
            width=96,
            height=64,
            num_inference_steps=4,
            guidance_scale=4.0,
            max_sequence_length=pipe.tokenizer.model_max_length,
            generator=torch.Generator("cpu").manual_seed(3),
        ).images[0]
        encoders = flux2.load_encoders(place, device="cpu", dtype=torch.float32)
        text, negative = ({k: v[None] for k, v in t.items()} for t in flux2.encode_text(encoders, ["a red spot", ""]))
        denoiser = flux2.load_denoiser(place, device="cpu", dtype=torch.float32)
        vae = flux2.load_vae(place, device="cpu")
        prompt = Prompt("a red spot", 96, 64, seed=3, steps=4, guidance=1.0, cfg=4.0, negative="")
        with torch.no_grad():
            got = flux2.sample(denoiser, vae, place, prompt=prompt, text=text, negative=negative)
        assert max(high for _, high in ImageChops.difference(got, expected).getextrema()) <= 1
        images[distilled] = got
    assert max(high for _, high in ImageChops.difference(*images.values()).getextrema()) > 1


# ---- memory


@pytest.mark.parametrize(("base", "gib"), [("flux2-klein-4b", 8.0), ("flux2-klein-9b", 12.0)])
def test_the_published_models_train_on_home_cards_with_their_encoder_streamed(base, gib, tmp_path):
    settings = read_settings({"BASE_MODEL": base, "DATASET_NAME": "org/images"})
    card = dataclasses.replace(HOME, memory_gib=gib)
    engine = make_plan(settings, read_manifest(None, None), card, now=NOW).engine
    assert engine.stream_encoders and engine.precision == "fp8"


@pytest.mark.parametrize(
    ("gib", "host_gib", "precision", "offload", "streamed"),
    [(12, 64, "nf4", "weights", True), (24, 128, "fp8", "weights", True), (48, 64, "fp8", "none", False)],
)
def test_devs_24_billion_encoder_never_has_to_fit_on_the_card(gib, host_gib, precision, offload, streamed, tmp_path):
    engine = dev_plan(gib, host_gib).engine
    assert (engine.precision, engine.offload, engine.stream_encoders) == (precision, offload, streamed)


def test_a_machine_that_holds_devs_encoder_nowhere_is_refused():
    with pytest.raises(SettingsError, match=r"encoders take 32\.8 GiB.* has 32 GiB\. Fix: .* or a card with 36 GiB"):
        dev_plan(24, 32)


def dev_plan(gib, host_gib):
    settings = read_settings({"BASE_MODEL": "flux2-dev", "DATASET_NAME": "org/images"})
    card = dataclasses.replace(HOME, memory_gib=float(gib), host_memory_gib=float(host_gib))
    return make_plan(settings, read_manifest(None, None), card, now=NOW)


def test_what_dev_is_not_drawn_with_is_said():
    """Its pipeline has embedded guidance and no negative caption; klein's has the other one."""
    lines = "a cat --l 4\na cat --n dogs\na cat --g 3"
    said = {}
    for base in ("flux2-dev", "flux2-klein-4b"):
        requests = prompts.parse_lines(lines, origin="prompts.txt", problems=prompts.Problems())
        model = flux2.FACTS.models[base]
        said[base] = prompts.idle_guidance(requests, facts_of("flux2", base), model)
    assert [line.partition(":")[0] for line in said["flux2-dev"]] == ["prompts.txt, line 1", "prompts.txt, line 2"]
    assert all("--l and --n have no effect" in line and "Fix: --g" in line for line in said["flux2-dev"])
    assert [line.partition(":")[0] for line in said["flux2-klein-4b"]] == ["prompts.txt, line 3"]


# ---- LoRA files

RANK = 3
LAYERS = {  # of diffusers' model → (rows, columns) in the small model
    **{f"transformer_blocks.{{}}.attn.{n}": (32, 32) for n in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")},
    **{f"transformer_blocks.{{}}.attn.add_{x}_proj": (32, 32) for x in "qkv"},
    **{f"transformer_blocks.{{}}.{ff}.linear_in": (192, 32) for ff in ("ff", "ff_context")},
    **{f"transformer_blocks.{{}}.{ff}.linear_out": (32, 96) for ff in ("ff", "ff_context")},
    "single_transformer_blocks.{}.attn.to_qkv_mlp_proj": (288, 32),
    "single_transformer_blocks.{}.attn.to_out": (32, 128),
}


@pytest.fixture
def modules():
    """Random adapters of every target, by diffusers' names, with a scale that is not 1."""
    torch.manual_seed(1)
    made = {}
    for block in range(2):
        for layer, (rows, columns) in LAYERS.items():
            down, up = torch.randn(RANK, columns) / 4, torch.randn(rows, RANK) / 4
            made[f"transformer.{layer.format(block)}"] = LoraWeights(down, up, 0.5)
    return made


def deltas(modules):
    return {name: weights.scale * weights.up @ weights.down for name, weights in modules.items()}


def assert_same(found, expected):
    found, expected = deltas(found), deltas(expected)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-5, atol=1e-6)


def with_names(modules, prefix, *, peft, dots="."):
    """A file with diffusers' names behind `prefix`: PEFT's endings, with the scale in B; or kohya's, with an alpha."""
    tensors = {}
    for name, weights in modules.items():
        stem = f"{prefix}{name.removeprefix('transformer.').replace('.', dots)}"
        if peft:
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = weights.down, weights.folded().up
        else:
            tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = weights.down, weights.up
            tensors[f"{stem}.alpha"] = torch.tensor(weights.scale * weights.rank)
    return tensors


SPELLINGS = {
    "musubi-tuner": lambda modules: convert.to_file(modules, "kohya", "flux2").tensors,
    "ai-toolkit": lambda modules: convert.to_file(modules, "native", "flux2").tensors,
    "ComfyUI": lambda modules: convert.to_file(modules, "comfyui", "flux2").tensors,
    "diffusers": lambda modules: with_names(modules, "transformer.", peft=True),
    "diffusers' names for ComfyUI": lambda modules: with_names(modules, "diffusion_model.", peft=True),
    "OneTrainer": lambda modules: with_names(modules, "lora_transformer_", peft=False, dots="_"),
    "OneTrainer's dotted": lambda modules: with_names(modules, "transformer.", peft=False),
}


@pytest.mark.parametrize("tool", SPELLINGS)
def test_every_tools_file_is_read_and_known_as_this_familys(modules, tmp_path, tool):
    written = {key: tensor.contiguous() for key, tensor in SPELLINGS[tool](modules).items()}
    save_file(written, tmp_path / "x.safetensors")
    assert_same(convert.load(tmp_path / "x.safetensors", "flux2"), modules)
    assert contents.likely_family({key: tuple(tensor.shape) for key, tensor in written.items()}, {}) == "flux2"


def test_native_names_are_the_original_models(modules):
    keys = SPELLINGS["ai-toolkit"](modules).keys()
    double = ("img_attn.qkv", "txt_attn.qkv", "img_attn.proj", "txt_attn.proj")
    double += ("img_mlp.0", "img_mlp.2", "txt_mlp.0", "txt_mlp.2")
    stems = {f"double_blocks.{i}.{name}" for i in range(2) for name in double}
    stems |= {f"single_blocks.{i}.linear{n}" for i in range(2) for n in (1, 2)}
    assert keys == {f"diffusion_model.{stem}.lora_{side}.weight" for stem in stems for side in "AB"}


@pytest.mark.parametrize("tool", ["musubi-tuner", "ai-toolkit", "diffusers", "diffusers' names for ComfyUI"])
def test_diffusers_makes_the_same_model_of_each_file(modules, tmp_path, tool):
    """By its own forward pass, against a model with the changes added to its weights."""
    plain = models.flux2_denoiser()
    merged = copy.deepcopy(plain)
    apply_loras(merged, [(modules, 1.0)], component="transformer")
    torch.manual_seed(2)
    noisy, t, tokens = torch.randn(2, 16, 4, 6), torch.rand(2), models.flux2_text()["tokens"]
    with torch.no_grad():
        before, expected = (own_velocity(model, noisy, t, tokens) for model in (plain, merged))
    save_file({k: v.contiguous() for k, v in SPELLINGS[tool](modules).items()}, tmp_path / "x.safetensors")
    pipe = Flux2KleinPipeline(None, models.flux2_vae(), None, None, plain)
    pipe.load_lora_weights(tmp_path / "x.safetensors")
    assert (expected - before).norm() > 0.1 * before.norm()
    with torch.no_grad():
        got = own_velocity(plain, noisy, t, tokens)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("tool", ["musubi-tuner", "ai-toolkit"])
def test_a_lora_of_flux1_and_one_of_this_family_are_told_apart_by_their_sides(modules, tmp_path, tool):
    """Their blocks have the same names in these files."""
    written = {key: tensor.contiguous() for key, tensor in SPELLINGS[tool](modules).items()}
    save_file(written, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="it looks like a LoRA for flux2, and flux is needed"):
        convert.load(tmp_path / "x.safetensors", "flux")
    ending = ("lora_down", "lora_up") if tool == "musubi-tuner" else ("lora_A", "lora_B")
    stem = "lora_unet_single_blocks_0_linear1" if tool == "musubi-tuner" else "diffusion_model.single_blocks.0.linear1"
    of_flux1 = {f"{stem}.{ending[0]}.weight": torch.ones(2, 32), f"{stem}.{ending[1]}.weight": torch.ones(224, 2)}
    save_file(of_flux1, tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match="it looks like a LoRA for flux, and flux2 is needed"):
        convert.load(tmp_path / "y.safetensors", "flux2")
