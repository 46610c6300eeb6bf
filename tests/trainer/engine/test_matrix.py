"""Every family in every layout with every LoRA format, and every published variant: what was trained comes back.

Each time the base is read from the files through the product, trained numbers are put on it, written, and read back
onto the base read once more: the same output to 1e-4 in fp32.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from bench import layouts
from bench.original_names import (
    checkpoint,
    flux2_files,
    flux_files,
    hugging_face,
    krea2_files,
    miniature,
    original,
    qwen_image_files,
    under,
    vae_original,
    weights,
    z_image_files,
)  # fmt: skip
from tests.support.miniatures import random_text
from tests.support.single_files import model_folder
from tests.support.variants import CLASSES, NARROW, VARIANTS, config
from trainer.base_model import single_file
from trainer.engine import adapters
from trainer.engine.load import stored_dtype
from trainer.job.verify import verify
from trainer.lora_files import convert, peft_bridge
from trainer.sample import apply_loras
from trainer.spec.family import get_family

FAMILIES = ("flux", "flux2", "sdxl", "sd3", "z_image", "qwen_image", "krea2")
PARTS = {"vae": "VAE_PATH", "clip_l": "CLIP_L_PATH", "clip_g": "CLIP_G_PATH", "t5": "T5_PATH"}


# ---- layouts: each writes a miniature's files, and returns the variables of a job that name them


def one_file(name, folder, dtype):
    file = folder / "all.safetensors"
    save_file({k: v.to(dtype) if v.is_floating_point() else v for k, v in checkpoint(name).items()}, file)
    return {"MODEL_PATH": str(file)}


def a_file_for_each_part(name, folder):
    if name == "flux":
        return flux_files(folder, torch.bfloat16)
    if name == "flux2":
        return flux2_files(folder, torch.bfloat16)
    if name == "z_image":
        return z_image_files(folder, torch.bfloat16)
    if name == "qwen_image":
        return qwen_image_files(folder, torch.bfloat16)
    if name == "krea2":
        return krea2_files(folder, torch.bfloat16)
    save_file(under("model.diffusion_model.", original(name)), folder / "denoiser.safetensors")
    asked = {"MODEL_PATH": str(folder / "denoiser.safetensors")}
    for part, place in get_family(name).FACTS.parts.items():
        if part != "denoiser":
            state = weights(miniature(name) / place)
            state = vae_original(state) if part == "vae" else hugging_face(state) if part != "t5" else state
            save_file(under("", state), folder / f"{part}.safetensors")
            asked[PARTS[part]] = str(folder / f"{part}.safetensors")
    return asked


def diffusers_folder(name, folder, *, shard="10GB", dtype=torch.float32, variant=None):
    place = folder / "model" / get_family(name).FACTS.parts["denoiser"]
    shutil.copytree(miniature(name), folder / "model")
    for file in place.glob("*.safetensors"):
        file.unlink()
    denoiser = get_family(name).load_denoiser(miniature(name), device="cpu", dtype=dtype)
    denoiser.save_pretrained(place, max_shard_size=shard, variant=variant)
    return {"MODEL_PATH": str(folder / "model")}


LAYOUTS = {
    "a folder": diffusers_folder,
    "a folder of shards": lambda name, folder: diffusers_folder(name, folder, shard="400KB"),
    "a folder of fp16 copies": lambda name, folder: diffusers_folder(
        name, folder, shard="400KB", dtype=torch.float16, variant="fp16"
    ),
    "one file of fp32": lambda name, folder: one_file(name, folder, torch.float32),
    "one file of fp16": lambda name, folder: one_file(name, folder, torch.float16),
    "one file of bf16": lambda name, folder: one_file(name, folder, torch.bfloat16),
    "one file of fp8": lambda name, folder: one_file(name, folder, torch.float8_e4m3fn),
    "a file for each part": a_file_for_each_part,
}


# ---- round trips


def output(name, denoiser):
    """The model's output for something made up, the same each time."""
    kind, generator = get_family(name), torch.Generator().manual_seed(3)
    noisy = torch.randn(1, 4 if name == "sdxl" else 16, 8, 8, generator=generator)
    text = random_text(name, denoiser, 9, generator=generator)
    geometry = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    with torch.no_grad():
        return kind.predict(denoiser, noisy, torch.tensor([0.4]), text=text, guidance=2.0, geometry_B6=geometry)


def assert_round_trip(name, folder, to, file):
    """Train, write, verify; and the file on the base that is read once more."""
    kind, facts = get_family(name), get_family(name).FACTS
    read = [kind.load_denoiser(folder, device="cpu", dtype=torch.float32) for _ in range(2)]
    trained, plain = read
    before = output(name, plain)
    adapters.fuse_projections(kind.blocks(trained), fused=facts.fused_targets, targets=facts.targets)
    blocks, fused = kind.blocks(trained), facts.fused_targets
    params = adapters.add_adapters(trained, blocks, targets=facts.targets, fused=fused, rank=3, alpha=2.0, seed=7)
    torch.manual_seed(3)
    for p in params:
        torch.nn.init.normal_(p, std=0.1)
    state = adapters.state(trained)
    modules = peft_bridge.from_peft_state(state, prefix=facts.lora_prefix, fused=fused, scale=2 / 3)
    save_file(convert.to_file(modules, to, name).tensors, file)
    prefix = facts.lora_prefix
    verified = verify(
        file, {prefix: trained}, family_name=name, fused=fused, save_precision="fp32",
        output=lambda: output(name, trained),
    )  # fmt: skip
    assert verified.worst < 1e-6 and verified.output < 1e-4
    apply_loras(plain, [(convert.load(file, name), 1.0)], component=prefix)
    after, expected = output(name, plain), output(name, trained)
    assert (expected - before).norm() > 0.005 * before.norm()
    assert (after - expected).norm() < 1e-4 * expected.norm()
    return modules


@pytest.fixture(scope="module")
def read_once(tmp_path_factory):
    """`read_once(name, layout)`: the folder that a job makes of a layout, made once for all formats."""
    known = {}

    def folder(name, layout):
        if (name, layout) not in known:
            place = tmp_path_factory.mktemp("layout")
            known[name, layout] = model_folder(place, name, **LAYOUTS[layout](name, place))
        return known[name, layout]

    return folder


def often(*values, now):
    """A third of the matrix in every run of the tests, the rest among the slow ones."""
    return pytest.param(*values, marks=[] if now else pytest.mark.slow)


MATRIX = [
    often(name, layout, to, now=(i + j + k) % 3 == 0)
    for i, name in enumerate(FAMILIES)
    for j, layout in enumerate(LAYOUTS)
    for k, to in enumerate(convert.KEY_FORMATS)
]


@pytest.mark.parametrize(("name", "layout", "to"), MATRIX)
def test_every_layout_with_every_format(name, layout, to, read_once, tmp_path):
    folder, kind = read_once(name, layout), get_family(name)
    assert_round_trip(name, folder, to, tmp_path / "x.safetensors")
    for part, place in kind.FACTS.parts.items():  # each part is that of the miniature, as far as its format has it
        if (part, name) == ("clip_l", "sd3"):  # whose projection is another from a file
            continue
        got, want = weights(folder / place), weights(miniature(name) / place)
        inner = {"qwen2_5_vl": "model.", "qwen3_vl": "language_model."}.get(part, "")
        if inner and "norm.weight" in got:  # the language model alone is taken from a file
            want = {key.removeprefix(inner): value for key, value in want.items() if key.startswith(inner)}
        assert got.keys() == want.keys(), part
        allowed = 0.07 if "fp8" in layout else 0.01 if "bf16" in layout or "part" in layout else 1e-3
        for key in want:
            assert (got[key].float() - want[key].float()).norm() <= allowed * want[key].float().norm() + 1e-6, key


@pytest.mark.parametrize(
    ("base", "to"),
    [
        often(base, to, now=to == get_family(VARIANTS[base][0]).LORA_KEYS.file_formats[0] and "large" not in base)
        for base in VARIANTS
        for to in convert.KEY_FORMATS
    ],
)
def test_every_published_variant_with_every_format(base, to, tmp_path):
    """Its numbers of layers, kinds of blocks and conditions at a small width, from one file in its original names."""
    name = VARIANTS[base][0]
    own = json.loads((miniature(name) / get_family(name).FACTS.parts["denoiser"] / "config.json").read_text())
    facing = {key: own[key] for key in OF_TEXT if key in own}  # its text encoders are those of the miniature
    changes = {"denoiser": {**VARIANTS[base][1], **NARROW[name], **facing}}
    plan = layouts.write_model(tmp_path, name, "file", changes=changes, dtype=torch.bfloat16)
    folder = single_file.convert_single_files(plan, tmp_path / "cache")
    place = folder / get_family(name).FACTS.parts["denoiser"]
    assert layouts.wrong_weights(place) == [] and stored_dtype(place) == torch.bfloat16
    modules = assert_round_trip(name, folder, to, tmp_path / "x.safetensors")
    assert len(modules) == MODULES[base]


# Sizes of a denoiser that its text encoders decide.
OF_TEXT = (
    *("joint_attention_dim", "pooled_projection_dim", "cross_attention_dim", "addition_time_embed_dim"),
    *("projection_class_embeddings_input_dim", "cap_feat_dim", "text_hidden_dim"),
)
# Layers with adapters in a published model, counted by hand. Flux: 12 in a double block, 5 in a single one. SD3: 12 in
# a block, 3 less in the last, 4 more with a second attention. SDXL: 10 in each of 70 blocks, 2 in each of 11
# transformers. Z-Image: 7 in a block. Qwen-Image: 12 in a block. FLUX.2: 12 in a double block, 2 in a single one.
# Krea 2: 8 in each of 28 blocks, and in each of 4 that fuse the text.
MODULES = {
    **dict.fromkeys(("flux-dev", "flux-krea", "flux-schnell"), 19 * 12 + 38 * 5),
    "flux2-klein-4b": 5 * 12 + 20 * 2,
    "flux2-klein-9b": 8 * 12 + 24 * 2,
    "flux2-dev": 8 * 12 + 48 * 2,
    "sd3-medium": 24 * 12 - 3,
    "sd3.5-medium": 24 * 12 - 3 + 13 * 4,
    "sd3.5-large": 38 * 12 - 3,
    "sdxl-base": 70 * 10 + 11 * 2,
    "z-image": 30 * 7,
    "qwen-image": 60 * 12,
    "krea2": 32 * 8,
}


@pytest.mark.parametrize("base", [base for base, (name, _) in VARIANTS.items() if name == "flux"])
def test_only_variants_with_embedded_guidance_are_told_one(base):
    torch.manual_seed(0)
    model = CLASSES["flux"](**config(base, narrow=True))
    generator = torch.Generator().manual_seed(1)
    noisy, text = torch.randn(1, 16, 4, 4, generator=generator), {"tokens": torch.randn(1, 5, 24, generator=generator)}
    text["pooled"] = torch.randn(1, 20, generator=generator)
    with torch.no_grad():
        weak, strong = (
            get_family("flux").predict(model, noisy, torch.tensor([0.5]), text=text, guidance=g, geometry_B6=None)
            for g in (1.0, 4.0)
        )
    assert torch.equal(weak, strong) == (base == "flux-schnell")
