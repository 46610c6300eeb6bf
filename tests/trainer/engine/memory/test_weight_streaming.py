"""Weight streaming: the same bits as with weights on the device, and never more than two regions there at once."""

import pytest
import torch

from tests.support.miniatures import family_of
from tests.support.miniatures import folder as miniature
from tests.support.streamed_models import fetched_again, model, step
from trainer.engine.encoders import load_text_encoders, load_vae
from trainer.engine.memory import checkpointing, weight_streaming
from trainer.engine.memory.weight_streaming import WeightStreamer
from trainer.families import qwen_vae
from trainer.spec.family import get_family
from trainer.spec.memory_model import RESIDENT_REGIONS
from trainer.spec.plan import EnginePlan

FAMILIES = ["flux", "flux2", "sdxl", "sd3", "z_image", "qwen_image", "krea2"]


@pytest.fixture(autouse=True)
def roomy_weights(monkeypatch):
    """Adapters ride in the products of narrow layers as well."""
    monkeypatch.setattr("trainer.spec.adapter_columns.MIN_SIDE_PER_COLUMN", 0)


@pytest.mark.parametrize("policy", checkpointing.POLICIES)
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((n, "bf16") for n in FAMILIES),
        ("flux", "fp8"),
        ("flux", "nf4"),
        ("flux2", "fp8"),
        ("flux2", "int8"),
        ("flux2", "nf4"),
        ("z_image", "fp8"),
        ("z_image", "int8"),
        ("z_image", "nf4"),
        ("qwen_image", "fp8"),
        ("qwen_image", "int8"),
        ("qwen_image", "nf4"),
        ("krea2", "fp8"),
        ("krea2", "int8"),
        ("krea2", "nf4"),
    ],
)
def test_a_step_has_the_same_bits_with_weight_streaming(name, precision, policy):
    found = []
    for streamed in (False, True):
        denoiser, through = model(name, precision, streamed=streamed)
        regions = get_family(name).regions(denoiser)
        checkpointing.apply(regions, [policy] * len(regions), compiled=False)
        if through:
            through.attach()
        found.append([step(name, denoiser, fetched_again(through) if through else None, seed) for seed in (3, 4)])
    for stayed, came in zip(*found, strict=True):
        assert len(stayed) == len(came) > 10 and all(torch.equal(a, b) for a, b in zip(stayed, came, strict=True))


def test_a_compiled_step_has_the_same_bits_with_weight_streaming():
    found = []
    for streamed in (False, True):
        denoiser, through = model("sd3", "fp8", streamed=streamed)
        regions = get_family("sd3").regions(denoiser)
        checkpointing.apply(regions, ["all"] * len(regions), compiled=True)
        if through:
            through.attach()
        found.append(step("sd3", denoiser, fetched_again(through) if through else None))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_two_regions_are_on_the_device_at_once_and_the_next_is_fetched_ahead():
    denoiser, through = model("flux", "bf16", streamed=True)
    through.attach()
    regions = get_family("flux").regions(denoiser)
    weights = {p.untyped_storage().data_ptr() for r in regions for p in r.parameters() if not p.requires_grad}
    assert weights == {through.slots[0].data_ptr()}
    largest = max(sum(p.nbytes for p in r.parameters() if not p.requires_grad) for r in regions)
    assert len(through.slots) == RESIDENT_REGIONS and all(slot.nbytes < 1.1 * largest for slot in through.slots)

    step("flux", denoiser, fetched_again(through))
    load, late = through.load, []

    def watched(index):
        late.extend([index] if index not in through.occupants else [])
        return load(index)

    through.load = watched
    through.attach()
    step("flux", denoiser, fetched_again(through))
    assert late == []


def test_a_region_whose_weights_were_overwritten_fetches_them_again():
    layers = torch.nn.ModuleList(torch.nn.Linear(8, 8).requires_grad_(False) for _ in range(5))
    x = torch.randn(2, 8)
    wanted = [layer(x) for layer in layers]
    through = WeightStreamer("cpu")
    for layer in layers:
        through.add_region(layer)
    through.allocate_slots()
    through.attach()
    for order in ([0, 1, 2, 3, 4], [4, 0, 3, 0, 1], [2, 2, 1, 4, 0]):
        assert all(torch.equal(layers[i](x), wanted[i]) for i in order)


@pytest.mark.parametrize("name", [*FAMILIES, "flux2_dev"])
def test_streamed_text_encoders_give_the_same_embeddings(name):
    captions = ["a red circle", "a blue square on a green background"]
    found = []
    for streamed in (False, True):
        plan = EnginePlan(stream_encoders=streamed)
        encoders = load_text_encoders(family_of(name), miniature(name), plan)
        found.append(family_of(name).encode_text(encoders, captions))
    for stayed, came in zip(*found, strict=True):
        assert all(torch.equal(stayed[key], came[key]) for key in stayed)


def test_the_longest_list_of_layers_is_streamed():
    whole = torch.nn.Module()
    whole.few = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
    whole.many = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(4))
    assert weight_streaming.stream_layers(whole.requires_grad_(False), "cpu").regions == list(whole.many)


def test_a_large_sample_is_decoded_in_the_tiles_of_256_pixels_that_a_vae_of_videos_has():
    seen = []
    for tiled in (False, True):
        vae = load_vae(get_family("qwen_image"), miniature("qwen_image"), EnginePlan(tile_vae=tiled))
        vae.decoder.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[-2:])))
        with torch.no_grad():
            qwen_vae.decode_latents(vae, torch.zeros(1, vae.config.z_dim, 80, 80))
        assert max(seen) == ((32 if tiled else 80),) * 2 and (len(seen) > 1) is tiled
        seen.clear()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("qwen_image", "krea2")])
def test_a_large_sample_is_decoded_in_tiles_of_512_pixels(name):
    seen = []
    for tiled in (False, True):
        vae = load_vae(get_family(name), miniature(name), EnginePlan(tile_vae=tiled))
        vae.decoder.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[-2:])))
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        with torch.no_grad():
            vae.decode(torch.zeros(1, vae.config.latent_channels, 640 // factor, 640 // factor))
        assert max(seen) == ((512 if tiled else 640) // factor,) * 2 and (len(seen) > 1) is tiled
        seen.clear()
