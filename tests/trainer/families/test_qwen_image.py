"""Qwen-Image's conventions against diffusers: places of text and image, captions of any length, the text encoder's
files. More: test_contract.py.
"""

import json
import math
import shutil

import pytest
import torch
from diffusers import QwenImagePipeline
from safetensors.torch import load_file, save_file
from transformers import Qwen2Tokenizer

from tests.support import models
from tests.support.miniatures import folder, pipeline
from trainer.data.batches import stack_texts
from trainer.engine import adapters
from trainer.families import qwen_image, qwen_vae
from trainer.spec.errors import SettingsError
from trainer.training.objective import FlowMatching, shifted

LENGTHS = [[5], [5, 5], [5, 7], [32, 1, 31], [5, 140]]  # of captions, in tokens
SIZES = [(2, 2), (4, 16), (8, 8), (10, 6), (14, 22)]  # of latents


def captions(lengths):
    """Items of the cache."""
    return [{"tokens": torch.randn(length, 24)} for length in lengths]


@pytest.fixture(scope="module")
def denoiser():
    return models.qwen_image_denoiser()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_each_image_gets_the_velocity_of_the_pipelines_call_with_its_own_caption(denoiser, lengths, size):
    """One after the other, as the pipeline calls the model, with its own packing: no image sees another's caption."""
    torch.manual_seed(1)
    items, count, (height, width) = captions(lengths), len(lengths), size
    noisy, t = torch.randn(count, 16, *size), torch.rand(count)
    with torch.no_grad():
        got = qwen_image.predict(denoiser, noisy, t, text=stack_texts(items))
        own = []
        for i, item in enumerate(items):
            (tokens,) = denoiser(
                hidden_states=QwenImagePipeline._pack_latents(noisy[i : i + 1], 1, 16, height, width),
                timestep=t[i : i + 1],
                encoder_hidden_states=item["tokens"][None],
                encoder_hidden_states_mask=torch.ones(1, len(item["tokens"]), dtype=torch.long),
                img_shapes=[[(1, height // 2, width // 2)]],
                return_dict=False,
            )
            own.append(QwenImagePipeline._unpack_latents(tokens, 8 * height, 8 * width, 8)[:, :, 0])
    expected = torch.cat(own)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_captions_of_one_length_are_attended_to_without_a_mask(denoiser):
    masks = []
    hooks = [
        block.register_forward_pre_hook(
            lambda _, inputs, named: masks.append(named["encoder_hidden_states_mask"]), with_kwargs=True
        )
        for block in denoiser.transformer_blocks
    ]
    qwen_image.predict(denoiser, torch.randn(2, 16, 4, 4), torch.rand(2), text=stack_texts(captions([6, 6])))
    for hook in hooks:
        hook.remove()
    assert masks == [None] * 3


def test_noisy_latents_are_those_of_the_schedule_and_qwen_shift_is_its_shift():
    scheduler = models.qwen_image_scheduler()
    latents, noise = torch.randn(3, 16, 4, 4), torch.randn(3, 16, 4, 4)
    steps = scheduler.timesteps[[100, 500, 900]]
    drawn = FlowMatching().at(latents, steps / 1000, noise)
    torch.testing.assert_close(drawn.noisy_BCHW, scheduler.scale_noise(latents, steps, noise))
    plain = torch.linspace(1, 1 / 50, 50, dtype=torch.float64)
    for tokens in (64, 256, 4096, 6889, 8192):
        mu = scheduler.config.base_shift + (tokens - 256) * (
            scheduler.config.max_shift - scheduler.config.base_shift
        ) / (scheduler.config.max_image_seq_len - 256)
        expected = torch.tensor(scheduler.time_shift(mu, 1.0, plain.numpy()))
        torch.testing.assert_close(shifted(plain, math.exp(mu)), expected)
        drawn, even = (
            FlowMatching(sampling).times(100, tokens=tokens, generator=torch.Generator().manual_seed(1)).double()
            for sampling in ("qwen_shift", "sigmoid")
        )
        torch.testing.assert_close(drawn, torch.tensor(scheduler.time_shift(mu, 1.0, even.numpy())), atol=1e-6, rtol=0)


def test_latents_are_normalised_channel_by_channel_and_decoded_again():
    vae = models.qwen_image_vae()
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    mean, std = qwen_vae.encode_images(vae, pixels).chunk(2, dim=1)
    assert mean.shape == (2, 16, 4, 6) and std.min() > 0
    with torch.no_grad():
        raw = vae.encode(pixels.unsqueeze(2)).latent_dist.mean
        own, _ = vae.encode(pixels.unsqueeze(2)).latent_dist.parameters.squeeze(2).chunk(2, dim=1)
        mean_11, std_11 = torch.tensor([vae.config.latents_mean, vae.config.latents_std])[..., None, None]
        assert torch.equal(mean, (own - mean_11) / std_11), "one frame needs no memory of those before it"
        # As the pipeline does it, in its own order.
        usual_mean = torch.tensor(vae.config.latents_mean).view(1, 16, 1, 1, 1)
        usual_std = 1.0 / torch.tensor(vae.config.latents_std).view(1, 16, 1, 1, 1)
        torch.testing.assert_close(mean.unsqueeze(2) / usual_std + usual_mean, raw, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(qwen_vae.decode_latents(vae, mean), vae.decode(raw).sample[:, :, 0])


def test_samples_are_decoded_in_tiles_where_the_plan_says_so():
    vae = models.qwen_image_vae()
    latents = torch.randn(1, 16, 48, 40)
    with torch.no_grad():
        whole = qwen_vae.decode_latents(vae, latents)
        vae.enable_tiling()
        tiled = qwen_vae.decode_latents(vae, latents)
    assert whole.shape == tiled.shape and not torch.equal(whole, tiled)
    assert (whole - tiled).abs().mean() < 0.1


# ---- texts


@pytest.fixture(scope="module")
def encoders():
    return qwen_image.load_encoders(folder("qwen_image"), device="cpu", dtype=torch.float32)


def test_the_template_is_the_pipelines_and_34_tokens_long(encoders):
    pipe = pipeline("qwen_image")
    assert pipe.prompt_template_encode == f"{qwen_image.BEFORE}{{}}{qwen_image.AFTER}"
    assert pipe.prompt_template_encode_start_idx == qwen_image.DROPPED_TOKENS
    assert len(encoders.tokenizer(qwen_image.BEFORE).input_ids) == qwen_image.DROPPED_TOKENS


@pytest.mark.parametrize("words", [["a red spot", "", "a big teal and yellow striped hexagon " * 9], ["x " * 900]])
def test_texts_are_those_that_the_pipeline_draws_with(encoders, words):
    """`{` and `}` in a caption are no places in the template; 512 tokens are read."""
    words = [*words, "a {} in {0} braces"]
    with torch.no_grad():
        pipe = pipeline("qwen_image")
        expected, mask = pipe.encode_prompt(words, device="cpu", max_sequence_length=512)
        mask = torch.ones(expected.shape[:2]) if mask is None else mask
    for item, wanted, real in zip(qwen_image.encode_text(encoders, words), expected, mask.bool(), strict=True):
        assert item.keys() == {"tokens"} and len(item["tokens"]) <= qwen_image.TEXT_TOKENS
        torch.testing.assert_close(item["tokens"], wanted[real])


def test_a_caption_alone_has_the_same_states_as_among_longer_ones(encoders):
    together = qwen_image.encode_text(encoders, ["a red spot", "a big teal and yellow striped hexagon " * 9])
    alone = qwen_image.encode_text(encoders, ["a red spot"])
    torch.testing.assert_close(together[0]["tokens"], alone[0]["tokens"])


def test_the_tokenizer_is_the_one_that_transformers_loads(encoders):
    own = Qwen2Tokenizer.from_pretrained(folder("qwen_image") / "tokenizer")
    assert own.get_vocab() == encoders.tokenizer.get_vocab()
    for text in ("A red  spot, it's 12 o'clock!\n\n x", "naïve Ünïcode 😀", "<|im_end|> a <|im_start|>", " \t "):
        assert own(text).input_ids == encoders.tokenizer(text).input_ids


# ---- the text encoder's files

IMAGE_ROPE = {"mrope_section": [2, 3, 3], "type": "mrope"}


def as_older_versions(config):
    """All keys on one level, with rope_scaling."""
    inner = dict(config["text_config"])
    rope = inner.pop("rope_parameters")
    del inner["model_type"], inner["layer_types"]
    return {
        "architectures": config["architectures"],
        "model_type": "qwen2_5_vl",
        "vision_config": {"depth": 1},
        **inner,
        "rope_scaling": IMAGE_ROPE,
        "rope_theta": rope["rope_theta"],
        "sliding_window": 32768,
    }


def as_published(config):
    """The inner config besides, as Qwen-Image's own has it."""
    return {**as_older_versions(config), "text_config": config["text_config"]}


@pytest.mark.parametrize("change", [as_older_versions, as_published])
@pytest.mark.parametrize("level", ["model.", "model.language_model.", ""])
def test_every_version_of_the_text_encoders_files_is_read(tmp_path, encoders, change, level):
    """In shards, too. What reads images, and the output layer, are left where they are."""
    shutil.copytree(folder("qwen_image"), tmp_path / "model")
    place = tmp_path / "model" / "text_encoder"
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(change(config)))
    state = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    renamed = {k.replace("model.", level, 1) if k.startswith("model.") else k: v for k, v in state.items()}
    renamed["lm_head.weight"] = torch.zeros(len(encoders.tokenizer), 64)
    names = sorted(renamed)
    files = {name: f"model-0000{1 + (i > len(names) // 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({k: v for k, v in renamed.items() if files[k] == file}, place / file)
    (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    found = qwen_image.load_encoders(tmp_path / "model", device="cpu", dtype=torch.float32)
    assert type(found.text_encoder).__name__ == "Qwen2_5_VLTextModel"
    (got,), (wanted,) = (qwen_image.encode_text(each, ["a red spot"]) for each in (found, encoders))
    assert torch.equal(got["tokens"], wanted["tokens"])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"mrope_section": [2, 3, 4]}, "the sum of mrope_section is not half"),
        ({"mrope_section": [16, 24]}, "allowed is .*three whole numbers"),
        ({"rope_type": "yarn", "factor": 4.0, "mrope_section": [2, 3, 3]}, "allowed is .*three whole numbers"),
    ],
)
def test_other_rotary_embeddings_are_refused(tmp_path, changes, problem):
    shutil.copytree(folder("qwen_image"), tmp_path / "model")
    path = tmp_path / "model" / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["rope_parameters"] = {"rope_theta": 10_000.0, **changes}
    path.write_text(json.dumps(config))
    with pytest.raises(SettingsError, match=problem):
        qwen_image.load_encoders(tmp_path / "model", device="cpu", dtype=torch.float32)


# ---- adapters


def test_attention_and_mlp_of_text_and_image_get_adapters_and_the_modulations_none():
    model = models.qwen_image_denoiser()
    targets = qwen_image.FACTS.targets
    adapters.add_adapters(model, qwen_image.blocks(model), targets=targets, fused={}, rank=2, alpha=2.0, seed=7)
    found = {key.rpartition(".lora_")[0] for key in adapters.state(model)}
    linear = {name for name, layer in models.qwen_image_denoiser().named_modules() if type(layer) is torch.nn.Linear}
    assert found == {name for name in linear if name.startswith("transformer_blocks.") and "_mod." not in name}
