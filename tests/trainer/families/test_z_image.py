"""Z-Image's conventions against diffusers: time, sign, captions of any length, shift. More: test_contract.py."""

import copy
import json
import shutil
import weakref

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM, Qwen3Model

from tests.support import models
from tests.support.miniatures import folder, pipeline
from trainer.data.batches import stack_texts
from trainer.engine import adapters
from trainer.families import z_image
from trainer.training.objective import FlowMatching, shifted

LENGTHS = [[5], [32], [33], [5, 7], [32, 1, 31], [5, 40], [96, 1, 64, 65]]  # of captions, in tokens
SIZES = [(2, 2), (4, 16), (8, 8), (10, 6), (16, 8)]  # of latents: 1 to 32 tokens


def captions(lengths):
    """Items of the cache: texts of these lengths, filled up to a multiple of 32."""
    items = []
    for length in lengths:
        filled = -(-length // SEQ_MULTI_OF) * SEQ_MULTI_OF
        tokens = torch.zeros(filled, 24)
        tokens[:length] = torch.randn(length, 24)
        items.append({"tokens": tokens, "real": torch.arange(filled) < length})
    return items


@pytest.fixture(scope="module")
def denoiser():
    return models.z_image_denoiser()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_velocity_is_that_of_the_models_own_forward_pass(denoiser, lengths, size):
    torch.manual_seed(1)
    items, count = captions(lengths), len(lengths)
    noisy, t = torch.randn(count, 16, *size), torch.rand(count)
    with torch.no_grad():
        got = z_image.predict(denoiser, noisy, t, text=stack_texts(items))
        filled = z_image.predict(denoiser, noisy, t, text=stack_texts(items, {"tokens": 128, "real": 128}))
        # As the pipeline calls it: lists, one frame, the time reversed; and it negates what comes back.
        own = denoiser(
            list(noisy.unsqueeze(2)), 1 - t, [item["tokens"][item["real"]] for item in items], return_dict=False
        )[0]
    expected = -torch.stack(own).squeeze(2)
    for ours in (got, filled):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_an_image_does_not_see_the_captions_of_others(denoiser):
    """Nor their lengths."""
    torch.manual_seed(1)
    items, noisy, t = captions([5, 40, 70]), torch.randn(3, 16, 6, 10), torch.rand(3)
    with torch.no_grad():
        together = z_image.predict(denoiser, noisy, t, text=stack_texts(items))
        for i, item in enumerate(items):
            alone = z_image.predict(denoiser, noisy[i : i + 1], t[i : i + 1], text=stack_texts([item]))
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [64, 160])
def test_captions_that_are_filled_up_for_captured_steps_change_neither_velocity_nor_gradients(length):
    """In float64: what is filled up is not attended to, and the image stands where it stood."""
    torch.manual_seed(1)
    denoiser = models.z_image_denoiser().double()
    adapters.add_adapters(
        denoiser, z_image.blocks(denoiser), targets=z_image.FACTS.targets, fused={}, rank=2, alpha=2.0, seed=7
    )
    params = [p for p in denoiser.parameters() if p.requires_grad]
    for p in params:
        p.data = torch.randn_like(p, dtype=torch.float64) * 0.3
    items = captions([5, 40])
    noisy, t = torch.randn(2, 16, 6, 10).double(), torch.rand(2).double()
    found = []
    for lengths in (None, {"tokens": length, "real": length}):
        got = z_image.predict(denoiser, noisy, t, text=stack_texts(items, lengths))
        found.append([got, *torch.autograd.grad(got.square().sum(), params)])
    assert stack_texts(items, lengths)["tokens"].shape[1] == length
    for alone, filled in zip(*found, strict=True):
        assert alone.abs().max() > 0
        torch.testing.assert_close(filled, alone, rtol=1e-9, atol=1e-9 * alone.abs().max().item())


def test_captions_of_one_length_are_attended_to_without_a_mask(denoiser):
    text = stack_texts(captions([5, 30]))
    assert "padding" not in text
    masks = []
    hooks = [block.register_forward_pre_hook(lambda _, inputs: masks.append(inputs[1])) for block in denoiser.layers]
    z_image.predict(denoiser, torch.randn(2, 16, 4, 4), torch.rand(2), text=text)
    for hook in hooks:
        hook.remove()
    assert masks == [None] * len(denoiser.layers)


def test_noisy_latents_and_the_shift_are_those_of_the_scheduler():
    for base, shift in (("z-image", 6.0), ("z-image-turbo", 3.0)):
        config = z_image.FACTS.models[base].published.configs["scheduler/scheduler_config.json"]
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        latents, noise = torch.randn(3, 16, 4, 4), torch.randn(3, 16, 4, 4)
        steps = scheduler.timesteps[[100, 500, 900]]
        drawn = FlowMatching().at(latents, steps / 1000, noise)
        torch.testing.assert_close(drawn.noisy_BCHW, scheduler.scale_noise(latents, steps, noise))
        plain = torch.linspace(1, 1 / 1000, 1000, dtype=torch.float64)
        torch.testing.assert_close(shifted(plain, shift).float(), scheduler.sigmas[:1000], atol=1e-6, rtol=1e-6)


# ---- texts


@pytest.fixture(scope="module")
def encoders():
    return z_image.load_encoders(folder("z_image"), device="cpu", dtype=torch.float32)


def test_captions_are_given_to_qwen_as_its_chat_template_says(encoders):
    """With enable_thinking, as the pipeline sets it: without, there would be an empty thought in the template."""
    own = Qwen2Tokenizer.from_pretrained(folder("z_image") / "tokenizer")
    for caption in ("a red spot", "", "two\nlines"):
        message = [{"role": "user", "content": caption}]
        templates = [
            own.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
            for thinking in (True, False)
        ]
        assert templates[0] == f"{z_image.BEFORE}{caption}{z_image.AFTER}" != templates[1]
        tokens = len(encoders.tokenizer(templates[0]).input_ids) - len(encoders.tokenizer(caption).input_ids)
        # The miniature's vocabulary has no words as long as `assistant`.
        assert tokens >= z_image.TOKENS_BEFORE + 5  # those behind it


@pytest.mark.parametrize("words", [["a red spot", "", "a big teal and yellow striped hexagon " * 9], ["x " * 900]])
def test_texts_are_the_real_tokens_of_the_pipeline(encoders, words):
    with torch.no_grad():
        expected, _ = pipeline("z_image").encode_prompt(list(words), device="cpu", do_classifier_free_guidance=False)
    for item, wanted in zip(z_image.encode_text(encoders, list(words)), expected, strict=True):
        assert item["real"].sum() == len(wanted) <= z_image.TEXT_TOKENS
        assert len(item["tokens"]) % SEQ_MULTI_OF == 0 and len(item["tokens"]) - len(wanted) < SEQ_MULTI_OF
        torch.testing.assert_close(item["tokens"][item["real"]], wanted)
        assert not item["tokens"][~item["real"]].any()


@pytest.fixture
def deep(encoders, tmp_path):
    """A folder with an encoder of six layers."""
    shutil.copytree(folder("z_image") / "tokenizer", tmp_path / "tokenizer")
    config = copy.deepcopy(encoders.text_encoder.config)
    config.num_hidden_layers = 6
    config.layer_types = ["full_attention"] * 6
    Qwen3Model(config).save_pretrained(tmp_path / "text_encoder")
    return tmp_path


def test_texts_are_the_state_before_the_whole_encoders_last_layer_to_the_bit(deep):
    words = ["a red spot", "", "a big teal and yellow striped hexagon"]
    whole = Qwen3Model.from_pretrained(deep / "text_encoder", dtype=torch.float32).eval()
    encoders = z_image.load_encoders(deep, device="cpu", dtype=torch.float32)
    read = encoders.tokenizer(
        [f"{z_image.BEFORE}{text}{z_image.AFTER}" for text in words], padding="longest", return_tensors="pt"
    )
    with torch.no_grad():
        states_BLD = whole(**read, output_hidden_states=True, use_cache=False).hidden_states[-2]
    for item, state_LD, mask_L in zip(
        z_image.encode_text(encoders, words), states_BLD, read.attention_mask, strict=True
    ):
        assert torch.equal(item["tokens"][item["real"]], state_LD[mask_L.bool()])


def test_no_hidden_state_is_kept_longer_than_the_next_layer_needs_it(deep):
    encoders = z_image.load_encoders(deep, device="cpu", dtype=torch.float32)
    layers = encoders.text_encoder.layers
    made = []  # the output of each layer, as long as somebody holds it
    kept = []  # how many are held after each layer

    def note(layer, inputs, output):
        made.append(weakref.ref(output))
        kept.append(sum(ref() is not None for ref in made))

    hooks = [layer.register_forward_hook(note) for layer in layers]
    z_image.encode_text(encoders, ["a red spot"])
    for hook in hooks:
        hook.remove()
    assert len(kept) == len(layers) == 5 and max(kept) <= 2


def test_the_encoder_may_be_saved_as_the_published_one_is(encoders, tmp_path):
    """As the language model with its output layer, which repeats the embeddings; in shards; with an older config."""
    shutil.copytree(folder("z_image") / "tokenizer", tmp_path / "tokenizer")
    config = copy.deepcopy(encoders.text_encoder.config)
    config.num_hidden_layers += 1  # the last one is not read
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    whole = Qwen3ForCausalLM(config)
    whole.model.load_state_dict(encoders.text_encoder.state_dict(), strict=False)
    whole.save_pretrained(tmp_path / "text_encoder", max_shard_size="200KB")
    path = tmp_path / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    path.write_text(json.dumps({**config, "rope_theta": rope["rope_theta"], "rope_scaling": None}))
    names = json.loads((tmp_path / "text_encoder" / "model.safetensors.index.json").read_text())["weight_map"]
    assert all(name.startswith("model.") for name in names)
    found = z_image.load_encoders(tmp_path, device="cpu", dtype=torch.float32)
    ours, theirs = (z_image.encode_text(own, ["a red spot"])[0]["tokens"] for own in (found, encoders))
    assert torch.equal(ours, theirs)


def test_the_tokenizer_is_the_one_that_transformers_loads(encoders):
    own = Qwen2Tokenizer.from_pretrained(folder("z_image") / "tokenizer")
    assert own.get_vocab() == encoders.tokenizer.get_vocab()
    for text in ("A red  spot, it's 12 o'clock!\n\n x", "naïve Ünïcode 😀", "<|im_end|> a <|im_start|>", " \t "):
        assert own(text).input_ids == encoders.tokenizer(text).input_ids


# ---- adapters


def adapted(denoiser, targets):
    adapters.add_adapters(denoiser, z_image.blocks(denoiser), targets=targets, fused={}, rank=2, alpha=2.0, seed=7)
    return {key.rpartition(".lora_")[0] for key in adapters.state(denoiser)}


def test_attention_and_mlp_of_the_main_blocks_get_adapters_and_the_refiners_none():
    names = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
    names += ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    expected = {f"layers.{i}.{name}" for i in range(3) for name in names}
    assert adapted(models.z_image_denoiser(), z_image.FACTS.targets) == expected


def test_refiners_get_adapters_where_they_are_asked_for():
    found = adapted(models.z_image_denoiser(), ("attention.to_q", "adaLN_modulation.0"))
    assert {"noise_refiner.0.attention.to_q", "context_refiner.0.attention.to_q", "layers.2.attention.to_q"} < found
    assert "noise_refiner.0.adaLN_modulation.0" in found and "context_refiner.0.adaLN_modulation.0" not in found


def test_the_pipeline_takes_the_scale_that_users_of_other_families_write():
    """cfg counts from 1 everywhere: 1 draws without the negative prompt, as guidance_scale=0 does in this pipeline."""
    defaults = z_image.FACTS.models["z-image-turbo"].defaults
    assert (defaults["cfg"], z_image.FACTS.prompt_cfg) == (1.0, 5.0)
    pipe = ZImagePipeline(None, None, None, None, None)
    pipe._guidance_scale = defaults["cfg"] - 1
    assert not pipe.do_classifier_free_guidance
