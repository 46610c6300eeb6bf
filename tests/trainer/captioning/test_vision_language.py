"""Florence-2, LLaVA and Qwen3-VL: inputs and answers against transformers' own processors and `generate`."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image, ImageOps

from tests.support import captioners as minis
from trainer.captioning.text_tokens import load_text_tokens
from trainer.captioning.vision_language import VisionLanguage
from trainer.spec.errors import SettingsError, StopRequestedError
from trainer.spec.plan import EnginePlan

PROMPT = "Describe ohwx, in 20 words; it's 3 o'clock.  Go!"
MAKERS = {"florence2": minis.make_florence2, "llava": minis.make_llava, "qwen3_vl": minis.make_qwen3_vl}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("captioners")
    return {kind: make(place / kind) for kind, make in MAKERS.items()}


@pytest.fixture(scope="module")
def images(photographs):
    first, second = sorted((photographs / "dog").glob("*.jpg"))[:2]
    wide = Image.open(sorted((photographs / "can").glob("*.jpg"))[0]).convert("RGB").resize((400, 150))
    others = [Image.new("RGB", (60, 60), "black"), Image.effect_noise((90, 200), 120).convert("RGB")]
    return [Image.open(first).convert("RGB"), ImageOps.invert(Image.open(second).convert("RGB")), wide, *others]


def load(folder) -> VisionLanguage:
    return VisionLanguage(folder, EnginePlan(), variable="CAPTION_WITH=x")


def ask(model: VisionLanguage, images, prompt: str = PROMPT, *, check_in=lambda: None) -> list[str]:
    answers = model.captions(images, "m", prompt=prompt, max_tokens=12, check_in=check_in)
    return [made.text for made in answers]


def own_tokenizer(folder, **tokens):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), padding_side="left", **tokens)
    for name, text in tokens.items():
        setattr(tokenizer, name, text)
    return tokenizer


def reference_inputs(kind: str, folder, images):
    """What transformers' own processor makes of the images and the prompt."""
    import transformers

    values = json.loads((folder / "preprocessor_config.json").read_text())
    values.pop("image_processor_type")
    if kind == "florence2":
        tokenizer = own_tokenizer(folder, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
        tokenizer.image_token, tokenizer.image_token_id = "<image>", tokenizer.convert_tokens_to_ids("<image>")
        pixels = transformers.CLIPImageProcessorPil(**values)
        pixels.image_seq_length = values["image_seq_length"]
        processor = transformers.Florence2Processor(pixels, tokenizer)
        return processor(images=images, text=["<MORE_DETAILED_CAPTION>"] * len(images), return_tensors="pt")
    if kind == "llava":
        tokenizer = own_tokenizer(folder, pad_token="<|end_of_text|>")
        token = "<|reserved_special_token_69|>"
        processor = transformers.LlavaProcessor(
            transformers.SiglipImageProcessorPil(**values),
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="full",
            image_token=token,
        )
        text = (
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
            "Today Date: 26 July 2024\n\nYou are a helpful image captioner.<|eot_id|><|start_header_id|>user"
            f"<|end_header_id|>\n\n<|reserved_special_token_70|>{token}<|reserved_special_token_71|>{PROMPT}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        )
        return processor(images=images, text=[text] * len(images), return_tensors="pt", padding=True)
    values["size"] = {"shortest_edge": 1 << 16, "longest_edge": 1 << 20}
    tokenizer = own_tokenizer(folder, pad_token="<|endoftext|>")

    # Its own class wants a processor of videos, which needs torchvision.
    class OfImages(transformers.Qwen3VLProcessor):
        def check_argument_for_proper_class(self, argument_name, argument):
            return type(argument)

    processor = OfImages(transformers.Qwen2VLImageProcessorPil(**values), tokenizer)
    text = f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    return processor(images=images, text=[text] * len(images), return_tensors="pt", padding=True)


@pytest.mark.parametrize("kind", MAKERS)
def test_inputs_are_those_of_transformers_own_processor(folders, images, kind):
    model = load(folders[kind])
    found, _ = model.inputs(images, "plain" if kind == "florence2" else PROMPT)
    expected = reference_inputs(kind, folders[kind], images)
    assert found["input_ids"].tolist() == expected["input_ids"].tolist()
    assert found["attention_mask"].tolist() == expected["attention_mask"].tolist()
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    if kind == "qwen3_vl":
        assert found["image_grid_thw"].tolist() == expected["image_grid_thw"].tolist()


@pytest.mark.parametrize("kind", MAKERS)
def test_answers_are_those_of_generate_for_each_image_alone(folders, images, kind):
    model = load(folders[kind])
    found = ask(model, images, "plain" if kind == "florence2" else PROMPT)
    for image, answer in zip(images, found, strict=True):
        inputs = reference_inputs(kind, folders[kind], [image])
        more = {"num_beams": 3, "no_repeat_ngram_size": 3, "early_stopping": True} if kind == "florence2" else {}
        if kind == "florence2":
            text = model.model.config.text_config
            more |= {
                "decoder_start_token_id": text.decoder_start_token_id,
                "forced_bos_token_id": text.bos_token_id,
                "eos_token_id": text.eos_token_id,
                "pad_token_id": text.pad_token_id,
            }
        ids = model.model.generate(**inputs, max_new_tokens=12, do_sample=False, **more)
        own = ids[0] if kind == "florence2" else ids[0, inputs["input_ids"].shape[1] :]
        expected = model.tokens.tokenizer.decode(own.tolist(), skip_special_tokens=True).strip()
        assert answer == expected
    assert len(set(found)) > 1  # the model looks at the image


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_the_prompt_decides_as_well(folders, images, kind):
    model = load(folders[kind])
    assert ask(model, images[:1]) != ask(model, images[:1], "Write one word.")


def test_a_stop_is_noticed_between_two_tokens(folders, images):
    calls = []

    def check_in() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise StopRequestedError("Stopped.", exit_code=143)

    with pytest.raises(StopRequestedError):
        ask(load(folders["llava"]), images[:1], check_in=check_in)


def test_a_batch_that_is_too_large_for_the_memory_is_halved(folders, images, monkeypatch):
    model = load(folders["llava"])
    expected = ask(model, images)
    original, sizes = model.model.generate, []

    def generate(**inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("out of memory")
        return original(**inputs)

    monkeypatch.setattr(model.model, "generate", generate)
    assert ask(model, images) == expected
    assert sizes == [5, 2, 1, 1, 3, 1, 2, 1, 1]


def changed(folder, tmp_path, name: str, **values):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    content = json.loads((copy / name).read_text())
    for key, value in values.items():
        part, _, inner = key.partition("__")
        if inner:
            content[part][inner] = value
        else:
            content[part] = value
    (copy / name).write_text(json.dumps(content))
    return copy


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "names code of its own, which Kiln never downloads or runs"),
        ({"text_config__auto_map": {"AutoModel": "evil.Model"}}, "names code of its own"),
        ({"architectures": ["MoondreamForCausalLM"]}, "architectures="),
        ({"quantization_config": {"quant_method": "awq"}}, "says quantization_config"),
        ({"text_config__model_type": "mamba"}, "text_config.model_type="),
        ({"text_config__num_hidden_layers": 10**9}, "num_hidden_layers="),
        ({"text_config__hidden_size": 2**20}, r"describes [\d,]+ weights"),
        ({"text_config__num_attention_heads": 7}, "no model is as"),
    ],
)
def test_a_config_that_is_none_of_the_kind_is_refused(folders, tmp_path, values, says):
    with pytest.raises(SettingsError, match=says):
        load(changed(folders["llava"], tmp_path, "config.json", **values))


def test_keys_that_choose_kernels_have_no_effect(folders, tmp_path, images):
    copy = changed(folders["llava"], tmp_path, "config.json", _attn_implementation="evil/kernels", use_kernels=True)
    assert ask(load(copy), images[:1]) == ask(load(folders["llava"]), images[:1])


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"image_processor_type": "EvilProcessor"}, "image_processor_type="),
        ({"size": {"height": 10**6, "width": 28}}, "size=1000000"),
        ({"image_std": [0, 1, 1]}, "numbers above 0"),
        ({"image_mean": ["a", 1, 1]}, "three numbers"),
    ],
)
def test_an_image_processor_that_is_not_known_is_refused(folders, tmp_path, values, says):
    with pytest.raises(SettingsError, match=says):
        load(changed(folders["llava"], tmp_path, "preprocessor_config.json", **values))


def test_weights_that_are_missing_are_not_made_up(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(folders["llava"], copy)
    weights = load_file(copy / "model.safetensors")
    lost = weights.pop(next(name for name in weights if "q_proj" in name))
    save_file({**weights, "another": lost}, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SettingsError, match=r"lack .*q_proj"):
        load(copy)


def test_a_model_that_does_not_fit_is_refused_with_the_fix(folders):
    engine = EnginePlan(memory_limit_gib=0.00001)
    with pytest.raises(SettingsError, match=r"MEMORY_LIMIT_GIB=1e-05.*Fix: a smaller model"):
        VisionLanguage(folders["llava"], engine, variable="CAPTION_WITH=x")


def test_the_pattern_of_a_tokenizer_is_not_compiled(folders, tmp_path):
    """A pattern that takes for ever on the prompt has no effect: what splits words is written down in Kiln."""
    copy = tmp_path / "copy"
    shutil.copytree(folders["qwen3_vl"], copy)
    content = json.loads((copy / "tokenizer.json").read_text())
    slow = {"type": "Split", "pattern": {"Regex": "(.*)*(.*)*x"}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = slow
    (copy / "tokenizer.json").write_text(json.dumps(content))
    tokens = load_text_tokens(copy, "qwen3_vl")
    question = tokens.question("a" * 2000, image_token=5, count=1)
    assert len(question) > 1000


def test_splitting_is_llama_3s_and_qwens():
    """Against the patterns of both, as tiktoken's and Qwen's own files have them, on what they treat differently."""
    from tokenizers import Regex, pre_tokenizers

    from trainer.captioning.text_tokens import LLAMA3_WORDS, QWEN_WORDS

    def words(pattern, text):
        return [word for word, _ in pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text)]

    text = "It's 12345  cats!\n\nÉté"
    assert words(LLAMA3_WORDS, text) == ["It", "'s", " ", "123", "45", " ", " cats", "!\n\n", "Été"]
    assert words(QWEN_WORDS, text) == ["It", "'s", " ", "1", "2", "3", "4", "5", " ", " cats", "!\n\n", "Été"]
