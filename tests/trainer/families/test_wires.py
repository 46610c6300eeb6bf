"""Where outputs of text encoders go, which blocks are fused, and Flux.1's own file against diffusers' converter."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

from tests.support import models
from trainer.families import flux, sd3, sdxl
from trainer.spec.family import ClipOutput, get_family

# Of seven captions, so that no two sizes are the same by chance.
L = ClipOutput(torch.full((7, 3, 2), 1.0), torch.full((7, 2), 10.0))  # CLIP-L's: three tokens of two features
G = ClipOutput(torch.full((7, 3, 4), 2.0), torch.full((7, 4), 20.0))  # CLIP-G's: four features
SUBSETS = [{}, {"text_encoder": L}, {"text_encoder_2": G}, {"text_encoder": L, "text_encoder_2": G}]


@pytest.mark.parametrize("outputs", SUBSETS)
def test_flux_takes_the_pooled_output_of_clip_l_alone(outputs):
    text = {"tokens": torch.randn(7, 5, 8), "pooled": torch.randn(7, 2)}
    found = flux.with_clip_outputs(text, outputs)
    assert found.keys() == text.keys() and torch.equal(found["tokens"], text["tokens"])
    assert torch.equal(found["pooled"], L.pooled_BD if "text_encoder" in outputs else text["pooled"])


@pytest.mark.parametrize("outputs", SUBSETS)
def test_sdxl_has_clip_l_to_the_left_of_clip_g_and_the_pooled_output_of_the_latter(outputs):
    text = {"tokens": torch.randn(7, 3, 6), "pooled": torch.randn(7, 4)}
    wanted = {key: tensor.clone() for key, tensor in text.items()}
    if "text_encoder" in outputs:
        wanted["tokens"][:, :, :2] = 1
    if "text_encoder_2" in outputs:
        wanted["tokens"][:, :, 2:] = 2
        wanted["pooled"][:] = 20
    found = sdxl.with_clip_outputs(text, outputs)
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("outputs", SUBSETS)
def test_sd3_has_both_above_the_tokens_of_t5_and_side_by_side_in_the_pooled_output(outputs):
    text = {"tokens": torch.randn(7, 5, 9), "pooled": torch.randn(7, 6)}
    wanted = {key: tensor.clone() for key, tensor in text.items()}
    if "text_encoder" in outputs:
        wanted["tokens"][:, :3, :2] = 1
        wanted["pooled"][:, :2] = 10
    if "text_encoder_2" in outputs:
        wanted["tokens"][:, :3, 2:6] = 2
        wanted["pooled"][:, 2:] = 20
    found = sd3.with_clip_outputs(text, outputs)
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    ("name", "fused", "others"),
    [
        (
            "flux",
            {"FluxTransformerBlock": "FusedDoubleBlock", "FluxSingleTransformerBlock": "FusedSingleBlock"},
            set(),
        ),
        (
            "flux2",
            {
                "Flux2TransformerBlock": "FusedFlux2DoubleBlock",
                "Flux2SingleTransformerBlock": "FusedFlux2SingleBlock",
            },
            set(),
        ),
        (
            "krea2",
            {"Krea2TransformerBlock": "FusedKrea2Block", "Krea2TextFusionBlock": "FusedKrea2TextBlock"},
            set(),
        ),
        ("sd3", {"JointTransformerBlock": "FusedJointBlock"}, set()),
        ("sdxl", {"BasicTransformerBlock": "FusedBasicBlock"}, {"ResnetBlock2D"}),
        ("qwen_image", {"QwenImageTransformerBlock": "FusedQwenImageBlock"}, set()),
        ("z_image", {"ZImageTransformerBlock": "FusedZImageBlock"}, set()),
    ],
)
def test_regions_are_all_blocks_and_those_with_attention_are_fused(name, fused, others):
    family, denoiser = get_family(name), getattr(models, f"{name}_denoiser")()
    assert {old.__name__: new.__name__ for old, new in family.fused_forwards().items()} == fused
    kinds = {*fused, *others}
    wanted = [module for module in denoiser.modules() if type(module).__name__ in kinds]
    found = family.regions(denoiser)
    assert {id(region) for region in found} == {id(module) for module in wanted} and len(found) == len(wanted)
    assert {type(region).__name__ for region in found} == kinds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flux_gets_the_positions_of_diffusers_in_its_own_type(dtype):
    given = {}

    def denoiser(**arguments):
        given.update(arguments)
        return (arguments["hidden_states"],)

    denoiser.dtype, denoiser.config = dtype, SimpleNamespace(guidance_embeds=True)
    text = {"tokens": torch.zeros(2, 5, 8, dtype=dtype), "pooled": torch.zeros(2, 2, dtype=dtype)}
    flux.predict(denoiser, torch.randn(2, 16, 6, 10), torch.tensor([0.25, 0.5]), text=text, guidance=3.5)
    wanted = FluxPipeline._prepare_latent_image_ids(2, 3, 5, torch.device("cpu"), dtype)
    assert given["img_ids"].dtype == dtype and torch.equal(given["img_ids"], wanted)
    assert given["txt_ids"].dtype == dtype and torch.equal(given["txt_ids"], torch.zeros(5, 3, dtype=dtype))
    assert given["hidden_states"].dtype == dtype and given["hidden_states"].shape == (2, 15, 64)
    assert given["guidance"].tolist() == [3.5, 3.5] and given["timestep"].tolist() == [0.25, 0.5]
    denoiser.config.guidance_embeds = False  # as of schnell
    flux.predict(denoiser, torch.randn(2, 16, 6, 10), torch.tensor([0.25, 0.5]), text=text, guidance=3.5)
    assert given["guidance"] is None


def flux_file():
    """A file of black-forest-labs' names with all of its rows and one column, each number another."""
    width = 3072
    rows = {"img_in": width, "txt_in": width, "final_layer.linear": 64, "final_layer.adaLN_modulation.1": 2 * width}
    for embedder in ("time_in", "vector_in", "guidance_in"):
        rows |= {f"{embedder}.in_layer": width, f"{embedder}.out_layer": width}
    norms = []
    for number in (0, 1):
        double, single = f"double_blocks.{number}", f"single_blocks.{number}"
        for stream in ("img", "txt"):
            rows |= {f"{double}.{stream}_attn.qkv": 3 * width, f"{double}.{stream}_attn.proj": width}
            rows |= {f"{double}.{stream}_mlp.0": 4 * width, f"{double}.{stream}_mlp.2": width}
            rows[f"{double}.{stream}_mod.lin"] = 6 * width
            norms += [f"{double}.{stream}_attn.norm.{of}_norm.scale" for of in ("query", "key")]
        rows |= {f"{single}.linear1": 7 * width, f"{single}.linear2": width, f"{single}.modulation.lin": 3 * width}
        norms += [f"{single}.norm.{of}_norm.scale" for of in ("query", "key")]
    state = {name: torch.randn(128) for name in norms}
    for name, count in rows.items():
        state |= {f"{name}.weight": torch.randn(count, 1), f"{name}.bias": torch.randn(count)}
    return state


def test_a_file_of_flux_becomes_what_diffusers_makes_of_it():
    state = flux_file()
    wanted = convert_flux_transformer_checkpoint_to_diffusers(dict(state))
    found = flux.from_original(state, {})
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_names_that_no_flux_has_stay_as_they_are():
    state = {name: torch.ones(2) for name in ("double_blocks.0.unknown.weight", "my_blocks.x.weight", "other.3.bias")}
    assert flux.from_original(state, {}) == state
