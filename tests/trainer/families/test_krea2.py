"""Krea 2's conventions against diffusers: the states of a text and what fills it up, places, both schedules, norms in
fp32, the text encoder's files. More: test_contract.py.
"""

import json
import math
import shutil

import pytest
import torch
from diffusers import Krea2Pipeline
from safetensors.torch import load_file, save_file
from transformers import Qwen2Tokenizer

from tests.support import models
from tests.support.miniatures import folder, pipeline
from trainer.base_model import configs
from trainer.data.batches import stack_texts
from trainer.engine import adapters
from trainer.engine.load import place_denoiser
from trainer.families import krea2
from trainer.spec.errors import SettingsError
from trainer.spec.plan import Prompt
from trainer.training.objective import FlowMatching, shifted

LENGTHS = [[5], [5, 5], [5, 7], [32, 1, 31], [5, 140]]  # of captions, in tokens
SIZES = [(2, 2), (4, 16), (8, 8), (10, 6), (14, 22)]  # of latents


def captions(lengths):
    """Items of the cache."""
    return [{"tokens": torch.randn(length, 12, 24)} for length in lengths]


@pytest.fixture(scope="module")
def denoiser():
    return models.krea2_denoiser()


@pytest.fixture(scope="module")
def whole():
    return pipeline("krea2")


def as_the_pipeline_has_it(tokens_LSD, total=160, behind=3):
    """The tokens of one caption with others before its last ones, and the mask that leaves those out."""
    before, after = tokens_LSD[:-behind], tokens_LSD[-behind:]
    if len(tokens_LSD) <= behind:
        before, after = tokens_LSD[:0], tokens_LSD
    filling = torch.randn(total - len(tokens_LSD), *tokens_LSD.shape[1:])
    mask = torch.cat([torch.ones(len(before)), torch.zeros(len(filling)), torch.ones(len(after))]).bool()
    return torch.cat([before, filling, after])[None], mask[None]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_each_image_gets_the_velocity_of_the_pipelines_call_with_its_own_caption(denoiser, whole, lengths, size):
    """One after the other, filled up in the middle, with the pipeline's packing and places."""
    torch.manual_seed(1)
    items, count, (height, width) = captions(lengths), len(lengths), size
    noisy, t = torch.randn(count, 16, *size), torch.rand(count)
    with torch.no_grad():
        got = krea2.predict(denoiser, noisy, t, text=stack_texts(items))
        own = []
        for i, item in enumerate(items):
            tokens, mask = as_the_pipeline_has_it(item["tokens"])
            (patches,) = denoiser(
                hidden_states=whole._pack_latents(noisy[i : i + 1], 1, 16, height, width),
                encoder_hidden_states=tokens,
                timestep=t[i : i + 1],
                position_ids=whole.prepare_position_ids(tokens.shape[1], height // 2, width // 2, torch.device("cpu")),
                encoder_attention_mask=mask,
                return_dict=False,
            )
            own.append(whole._unpack_latents(patches, 8 * height, 8 * width)[:, :, 0])
    expected = torch.cat(own)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_captions_of_one_length_are_attended_to_without_a_mask(denoiser):
    masks = []
    hooks = [
        block.register_forward_pre_hook(lambda _, inputs: masks.append(inputs[3]))
        for block in denoiser.transformer_blocks
    ]
    krea2.predict(denoiser, torch.randn(2, 16, 4, 4), torch.rand(2), text=stack_texts(captions([6, 6])))
    for hook in hooks:
        hook.remove()
    assert masks == [None] * 3


def test_noisy_latents_are_those_of_the_schedule_and_krea2_shift_is_its_shift():
    scheduler = models.krea2_scheduler()
    latents, noise = torch.randn(3, 16, 4, 4), torch.randn(3, 16, 4, 4)
    steps = scheduler.timesteps[[100, 500, 900]]
    drawn = FlowMatching().at(latents, steps / 1000, noise)
    torch.testing.assert_close(drawn.noisy_BCHW, scheduler.scale_noise(latents, steps, noise))
    torch.testing.assert_close(drawn.target_BCHW, noise - latents)
    plain = torch.linspace(1, 1 / 50, 50, dtype=torch.float64)
    for tokens in (64, 256, 4096, 6400, 9216):
        mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (6400 - 256)
        expected = torch.tensor(scheduler.time_shift(mu, 1.0, plain.numpy()))
        torch.testing.assert_close(shifted(plain, math.exp(mu)), expected)
        drawn, even = (
            FlowMatching(sampling).times(100, tokens=tokens, generator=torch.Generator().manual_seed(1)).double()
            for sampling in ("krea2_shift", "sigmoid")
        )
        torch.testing.assert_close(drawn, torch.tensor(scheduler.time_shift(mu, 1.0, even.numpy())), atol=1e-6, rtol=0)
    assert krea2.FACTS.timestep_samplings[0] == "krea2_shift"
    assert krea2.FACTS.flow_shift == pytest.approx(math.exp(0.5 + (4096 - 256) * 0.65 / 6144), abs=0.03)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("distilled", [False, True])
def test_turbos_schedule_has_one_shift_and_raws_grows_with_the_image(tmp_path, monkeypatch, distilled, cfg):
    """By the latents that are decoded: those of the whole pipeline to rounding, and bit for bit of equal embeddings."""
    place = tmp_path / "model"
    shutil.copytree(folder("krea2"), place)
    index = json.loads((place / "model_index.json").read_text())
    (place / "model_index.json").write_text(json.dumps({**index, "is_distilled": distilled}))
    pipe = Krea2Pipeline.from_pretrained(place, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    encoders = krea2.load_encoders(place, device="cpu", dtype=torch.float32)
    text, nothing = (
        {k: v[None] for k, v in item.items()} for item in krea2.encode_text(encoders, ["a red spot", "a blue ring!!"])
    )
    options = {"width": 96, "height": 64, "num_inference_steps": 3, "guidance_scale": cfg - 1, "output_type": "latent"}

    def drawn(**asked):
        return pipe(generator=torch.Generator("cpu").manual_seed(3), **options, **asked).images

    near = drawn(prompt="a red spot", negative_prompt="a blue ring!!")
    shift = math.exp(1.15 if distilled else 0.5 + (24 - 256) * 0.65 / 6144)
    plain = torch.linspace(1, 1 / 3, 3)
    torch.testing.assert_close(pipe.scheduler.sigmas[:-1], shift * plain / (1 + (shift - 1) * plain), atol=1e-5, rtol=0)
    length = max(text["tokens"].shape[1], nothing["tokens"].shape[1])
    embeddings = {}
    for name, item in {"prompt": text, "negative_prompt": nothing}.items():
        tokens = torch.zeros(1, length, *item["tokens"].shape[2:])
        tokens[:, : item["tokens"].shape[1]] = item["tokens"]
        embeddings[f"{name}_embeds"] = tokens
        embeddings[f"{name}_embeds_mask"] = torch.arange(length)[None] < item["tokens"].shape[1]
    if cfg == 1.0:
        embeddings = {
            "prompt_embeds": text["tokens"],
            "prompt_embeds_mask": torch.ones(text["tokens"].shape[:2]).bool(),
        }
    equal = drawn(**embeddings)

    decoded = []

    def decode(vae, latents_BCHW):
        decoded.append(latents_BCHW)
        return torch.zeros(1, 3, 64, 96)

    monkeypatch.setattr(krea2.qwen_vae, "decode_latents", decode)
    prompt = Prompt("a red spot", 96, 64, seed=3, steps=3, guidance=1.0, cfg=cfg, negative="a blue ring!!")
    with torch.no_grad():
        krea2.sample(pipe.transformer, pipe.vae, place, prompt=prompt, text=text, negative=nothing)
    wanted = [pipe._unpack_latents(latents, 64, 96)[:, :, 0] for latents in (equal, near)]
    assert torch.equal(decoded[0], wanted[0])
    torch.testing.assert_close(decoded[0], wanted[1], rtol=1e-3, atol=1e-3)


def test_norms_stay_fp32_beside_bf16_activations():
    """As diffusers loads them: they multiply by 1 + weight, of which bf16 would keep three digits."""
    model = krea2.load_denoiser(folder("krea2"), device="cpu", dtype=torch.bfloat16)
    place_denoiser(
        model, krea2.blocks(model), precision="bf16", dtype=torch.bfloat16, device="cpu", fused={}, targets=()
    )
    kinds = {name.rpartition(".")[0].rpartition(".")[2]: p.dtype for name, p in model.named_parameters()}
    norms = {kind for kind, dtype in kinds.items() if dtype == torch.float32}
    assert norms == {"norm", "norm1", "norm2", "norm_q", "norm_k"}
    assert kinds["to_q"] == kinds["img_in"] == torch.bfloat16 and model.dtype == torch.bfloat16
    plain = krea2.load_denoiser(folder("krea2"), device="cpu", dtype=torch.float32)
    torch.manual_seed(1)
    noisy, t = torch.randn(1, 16, 8, 8), torch.tensor([0.4])
    text = {"tokens": torch.randn(1, 9, 12, plain.config.text_hidden_dim)}
    with torch.no_grad():
        near, exact = (krea2.predict(each, noisy, t, text=text).float() for each in (model, plain))
    assert (near - exact).norm() < 0.05 * exact.norm()


# ---- texts


@pytest.fixture(scope="module")
def encoders():
    return krea2.load_encoders(folder("krea2"), device="cpu", dtype=torch.float32)


def test_the_template_is_the_pipelines_and_34_tokens_long(encoders, whole):
    assert whole.prompt_template_encode_prefix == krea2.BEFORE
    assert whole.prompt_template_encode_suffix == krea2.AFTER
    assert whole.prompt_template_encode_start_idx == krea2.DROPPED_TOKENS
    assert whole.prompt_template_encode_num_suffix_tokens == krea2.SUFFIX_TOKENS
    assert len(encoders.tokenizer(krea2.BEFORE).input_ids) == krea2.DROPPED_TOKENS
    assert len(encoders.tokenizer(krea2.AFTER).input_ids) == krea2.SUFFIX_TOKENS
    assert Krea2Pipeline(None, None, None, None, None).text_encoder_select_layers == krea2.TAPS


@pytest.mark.parametrize("words", [["a red spot", "", "a big teal and yellow striped hexagon " * 9], ["x " * 900]])
def test_texts_are_those_that_the_pipeline_draws_with(encoders, whole, words):
    """512 tokens are read; the five of the template's end are, however long the caption is."""
    words = [*words, "a {} in {0} braces"]
    with torch.no_grad():
        expected, mask = whole.encode_prompt(words, device="cpu")
    for item, wanted, real in zip(krea2.encode_text(encoders, words), expected, mask, strict=True):
        assert item.keys() == {"tokens"} and item["tokens"].shape[1:] == (12, 32)
        torch.testing.assert_close(item["tokens"], wanted[real], rtol=1e-4, atol=1e-4)
    assert (len(krea2.encode_text(encoders, [words[0]])[0]["tokens"]) == 512) == (len(words[0]) > 1000)


def test_a_caption_alone_has_the_same_states_as_among_longer_ones(encoders):
    together = krea2.encode_text(encoders, ["a red spot", "a big teal and yellow striped hexagon " * 9])
    alone = krea2.encode_text(encoders, ["a red spot"])
    torch.testing.assert_close(together[0]["tokens"], alone[0]["tokens"], rtol=1e-4, atol=1e-4)


def test_the_tokenizer_is_the_one_that_transformers_loads(encoders):
    own = Qwen2Tokenizer.from_pretrained(folder("krea2") / "tokenizer")
    assert own.get_vocab() == encoders.tokenizer.get_vocab()
    for text in ("A red  spot, it's 12 o'clock!\n\n x", "naïve Ünïcode 😀", "<|im_end|> a <|im_start|>", " \t "):
        assert own(text).input_ids == encoders.tokenizer(text).input_ids


# ---- the text encoder's files


def as_older_versions(config):
    """With rope_scaling, as transformers 4 wrote it, and as the model with its output layer."""
    inner = dict(config["text_config"])
    rope = inner.pop("rope_parameters")
    inner |= {"rope_theta": rope["rope_theta"]}
    inner["rope_scaling"] = {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"}
    return {**config, "architectures": ["Qwen3VLForConditionalGeneration"], "text_config": inner}


@pytest.mark.parametrize("change", [as_older_versions, dict])
@pytest.mark.parametrize("level", ["model.", "model.language_model.", "language_model.", ""])
def test_every_version_of_the_text_encoders_files_is_read(tmp_path, encoders, capfd, change, level):
    """In shards, too. What reads images, and the output layer, are left where they are."""
    shutil.copytree(folder("krea2"), tmp_path / "model")
    place = tmp_path / "model" / "text_encoder"
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(change(config)))
    state = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    renamed = {k.replace("language_model.", level, 1): v for k, v in state.items()}
    assert any(k.startswith("visual.") for k in renamed)
    renamed["lm_head.weight"] = torch.zeros(len(encoders.tokenizer), 32)
    names = sorted(renamed)
    files = {name: f"model-0000{1 + (i > len(names) // 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({k: v for k, v in renamed.items() if files[k] == file}, place / file)
    (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    capfd.readouterr()
    found = krea2.load_encoders(tmp_path / "model", device="cpu", dtype=torch.float32)
    assert "UNEXPECTED" not in "".join(capfd.readouterr()), "no table of what is not needed in the log"
    assert type(found.text_encoder).__name__ == "Qwen3VLTextModel"
    (got,), (wanted,) = (krea2.encode_text(each, ["a red spot"]) for each in (found, encoders))
    assert torch.equal(got["tokens"], wanted["tokens"])


@pytest.mark.parametrize(
    ("sections", "problem"), [([4, 2, 3], "is not half of head_dim"), ([4, 2], "three whole numbers")]
)
def test_other_rotary_embeddings_are_refused(tmp_path, sections, problem):
    shutil.copytree(folder("krea2"), tmp_path / "model")
    path = tmp_path / "model" / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["rope_parameters"] = {"mrope_section": sections}
    path.write_text(json.dumps(config))
    with pytest.raises(SettingsError, match=problem):
        krea2.load_encoders(tmp_path / "model", device="cpu", dtype=torch.float32)


@pytest.mark.parametrize(
    ("key", "value"), [("text_encoder_select_layers", [1, 2]), ("patch_size", 1), ("is_distilled", "no")]
)
def test_an_index_of_a_pipeline_that_reads_or_draws_in_another_way_is_refused(tmp_path, key, value):
    index = json.loads((folder("krea2") / "model_index.json").read_text())
    assert index[key] is not None
    for changes, said in (({}, []), ({key: value}, [f"says {key}=", "; allowed is "])):
        (tmp_path / "model_index.json").write_text(json.dumps(index | changes))
        found = configs.problems(tmp_path, ["model_index.json"], krea2.FACTS)
        assert len(found) == bool(said) and all(words in found[0] for words in said)


@pytest.mark.parametrize("layers", [35, 37])
def test_a_text_encoder_of_another_depth_is_of_another_model(layers):
    sizes = krea2.FACTS.same_sizes({"text_encoder": {"hidden_size": 32, "num_hidden_layers": layers}})
    assert [(ours, theirs) for *_, ours, theirs in sizes] == [(36, layers)]


# ---- adapters


def test_all_linear_layers_of_all_blocks_get_adapters():
    model = models.krea2_denoiser()
    targets = krea2.FACTS.targets
    adapters.add_adapters(model, krea2.blocks(model), targets=targets, fused={}, rank=2, alpha=2.0, seed=7)
    found = {key.rpartition(".lora_")[0] for key in adapters.state(model)}
    linear = {name for name, layer in models.krea2_denoiser().named_modules() if type(layer) is torch.nn.Linear}
    assert found == {name for name in linear if "blocks." in name} and len(found) == 8 * 6
