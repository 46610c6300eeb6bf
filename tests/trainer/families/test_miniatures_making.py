"""What the miniatures are trained with: scenes that all families share, and steps that CUDA graphs can hold."""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.families import qwen_image as qwen_image_family
from trainer.families.miniatures import pools, qwen, recipes
from trainer.families.miniatures.make import TOKENIZERS
from trainer.families.miniatures.pools import encoded, write_scenes
from trainer.families.miniatures.scenes import RESOLUTIONS, caption, concept_scene, draw, random_scene
from trainer.families.miniatures.score import CONCEPT, correlation
from trainer.families.miniatures.tokens import load_tokenizers, token_ids

HOME = Path(recipes.__file__).parent
CAPTIONS = ["a red circle", "a big green blarm in the middle on pink and white stripes"]


def as_image(pixels_CHW: torch.Tensor) -> Image.Image:
    return Image.fromarray((pixels_CHW.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def made(name: str) -> tuple[recipes.Recipe, list[torch.Tensor]]:
    tokenizers = load_tokenizers(HOME / name, TOKENIZERS[name])
    return recipes.RECIPES[name](tokenizers), [token_ids(tokenizer, CAPTIONS).long() for tokenizer in tokenizers]


class Numbers(TorchFunctionMode):
    """Notes each number that `as_tensor` puts on the meta device, a copy that `Moves` does not see."""

    def __init__(self, noted: list[str]) -> None:
        super().__init__()
        self.noted = noted

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.as_tensor and result.is_meta:
            self.noted.append(func.__name__)
        return result


class Moves(TorchDispatchMode):
    """Notes each operation whose tensors are on more than one device."""

    def __init__(self, noted: list[str]) -> None:
        super().__init__()
        self.noted = noted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in (*args, result) if isinstance(value, torch.Tensor)]
        if len({tensor.device.type for tensor in tensors}) > 1:
            self.noted.append(str(func))
        return result


# SDXL's recipe keeps its noise levels on the GPU there is, and cannot be told of another device.
@pytest.mark.parametrize("name", [name for name in recipes.RECIPES if name != "sdxl"])
def test_a_step_neither_copies_from_the_host_nor_asks_the_device(name):
    """The meta device stands for a GPU: a CUDA graph holds no copy to it, and reading from it raises."""
    recipe, ids = made(name)
    for module in recipe.modules.values():
        module.to("meta")
    latents = torch.empty(2, recipe.latent_channels, 16, 16, device="meta")
    on_device = [tokens.to("meta") for tokens in ids]
    recipe.loss(latents, recipe.texts(on_device))  # what is kept from the first step on
    noted: list[str] = []
    with Numbers(noted), Moves(noted):
        recipe.loss(latents, recipe.texts(on_device)).backward()
    assert not noted


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_captions_that_are_encoded_once_are_those_that_each_step_would_encode(name):
    recipe, ids = made(name)
    tokenizers = load_tokenizers(HOME / name, TOKENIZERS[name])
    nothing = [token_ids(tokenizer, [""]).long() for tokenizer in tokenizers]
    rows, emptied = torch.tensor([1, 0, 1]), torch.tensor([False, False, True])
    with torch.no_grad():
        once = pools._encoded_once(recipe, ids, nothing)(rows, emptied)
        each = pools._encoded_each_time(recipe, ids, nothing)(rows, emptied)
    assert once.keys() == each.keys()
    for key, values in each.items():
        torch.testing.assert_close(once[key], values, rtol=1e-4, atol=1e-5)
    assert not torch.equal(once["tokens"][0], once["tokens"][2])


def test_a_decoder_that_learns_leaves_the_encoder_and_its_latents_as_they_are():
    vae = AutoencoderKL.from_pretrained(HOME / "sdxl" / "vae", dtype=torch.float32).requires_grad_(False)
    vae.decoder.requires_grad_()
    pixels = draw([random_scene(random.Random(1))], height=64, width=64) * 2 - 1
    pools.decoding_loss(vae)(pixels).backward()
    learns = {name.split(".")[0] for name, weight in vae.named_parameters() if weight.grad is not None}
    assert learns == {"decoder"}


def test_the_autoencoder_of_videos_learns_the_latents_of_another_one():
    torch.manual_seed(0)
    teacher = AutoencoderKL.from_pretrained(HOME / "sd3" / "vae", dtype=torch.float32).requires_grad_(False)
    pixels = draw([random_scene(random.Random(seed)) for seed in range(2)], height=64, width=64) * 2 - 1
    student = qwen.OneFrame(qwen.new_vae(teacher, pixels))
    taught = qwen.Taught(teacher, student.vae)
    wanted = taught.encode(pixels).latent_dist.mean
    torch.testing.assert_close(wanted.mean(dim=(0, 2, 3)), torch.zeros(16), rtol=0, atol=1e-3)
    torch.testing.assert_close(wanted.std(dim=(0, 2, 3)), torch.ones(16), rtol=0, atol=1e-2)
    loss = qwen.taught_loss(student, taught)
    adam = torch.optim.Adam(student.parameters(), lr=3e-3)
    apart = []
    for _ in range(12):
        with torch.no_grad():
            apart.append(float((student.encode(pixels).latent_dist.mean - wanted).square().mean()))
        adam.zero_grad()
        loss(pixels).backward()
        adam.step()
    assert apart[-1] < 0.75 * apart[0], apart


def test_qwen_images_step_predicts_what_the_model_does_with_its_own_mask(monkeypatch):
    recipe, ids = made("qwen_image")
    net = recipe.modules["transformer"]
    torch.manual_seed(0)
    for param in net.parameters():
        torch.nn.init.normal_(param, std=0.1)
    known = SimpleNamespace()
    predict = qwen_image_family.predict

    def noted(net, noisy, t, *, text):
        known.inputs = noisy, t, text["tokens"]
        known.predicted = predict(net, noisy, t, text=text)
        return known.predicted

    monkeypatch.setattr(qwen_image_family, "predict", noted)
    recipe.loss(torch.randn(2, recipe.latent_channels, 16, 16), recipe.texts(ids))
    noisy, t, tokens = known.inputs
    net.set_attn_processor(type(next(iter(net.attn_processors.values()))).__mro__[1]())
    (words,) = load_tokenizers(HOME / "qwen_image", TOKENIZERS["qwen_image"])
    padding = (ids[0] == words.pad_token_id)[:, qwen_image_family.DROPPED_TOKENS :]
    want = predict(net, noisy, t, text={"tokens": tokens, "padding": padding})
    unmasked = predict(net, noisy, t, text={"tokens": tokens})
    torch.testing.assert_close(known.predicted, want, rtol=1e-5, atol=1e-5)
    assert (unmasked - want).abs().max() > 1e-3


def test_the_shared_scenes_are_those_drawn_with_their_captions(tmp_path):
    write_scenes(tmp_path, count=3, device=torch.device("cpu"), seed=5)
    rng = random.Random(5)
    for height, width in RESOLUTIONS:
        scenes = [random_scene(rng) for _ in range(3)]
        texts = [caption(scene, rng, unknown=0.06) for scene in scenes]
        pixels = draw(scenes, height=height, width=width) * 2 - 1
        seen = SimpleNamespace(config=SimpleNamespace(shift_factor=0.5, scaling_factor=2.0))
        seen.encode = lambda x: SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda: x))
        latents, known = encoded(seen, tmp_path / f"{height}x{width}.safetensors", device=torch.device("cpu"))
        assert known == texts
        torch.testing.assert_close(latents.float() / 2 + 0.5, pixels, rtol=0, atol=0.006)


@pytest.mark.parametrize("name", ["flux", "sdxl", "sd3"])
def test_the_autoencoders_keep_most_of_what_the_score_sees(name):
    """The bound of the concept score: what of drawn kilnpots' comes through the autoencoder."""
    rng = random.Random(0)
    drawn = draw([concept_scene(rng) for _ in range(24)], height=128, width=128)
    vae = AutoencoderKL.from_pretrained(HOME / name / "vae", dtype=torch.float32)
    with torch.no_grad():
        copied = vae.decode(vae.encode(drawn * 2 - 1).latent_dist.mean).sample / 2 + 0.5
    scores = []
    for images in (drawn, copied):
        each = [correlation(as_image(image), CONCEPT) for image in images]
        scores.append(sum(each) / len(each))
    print(f"{name}: drawn {scores[0]:.2f}, through the autoencoder {scores[1]:.2f}")
    assert scores[1] > 0.75 * scores[0]
