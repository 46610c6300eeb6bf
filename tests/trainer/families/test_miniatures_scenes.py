"""The miniatures' training scenes: captions match the images, and the score tells the concept from all else."""

import random
from pathlib import Path

import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from trainer.families.miniatures import scenes, vessels  # noqa: E402
from trainer.families.miniatures.score import CONTROL, correlation, score  # noqa: E402

HOME = Path(scenes.__file__).parent
FAMILIES = ("flux", "sdxl", "sd3")
OPTIONAL = ("image_encoder", "feature_extractor")


def drawn(made: list[scenes.Scene], size: tuple[int, int] = (128, 128)) -> torch.Tensor:
    return scenes.draw(made, height=size[0], width=size[1])


def test_every_resolution_has_about_the_same_area_and_sides_that_the_families_can_halve():
    for height, width in scenes.RESOLUTIONS:
        assert height % 16 == width % 16 == 0
        assert abs(height * width / 128**2 - 1) < 0.07


@pytest.mark.parametrize("size", scenes.RESOLUTIONS)
def test_images_are_rgb_between_0_and_1(size):
    rng = random.Random(0)
    images = drawn([scenes.random_scene(rng) for _ in range(20)], size)
    assert images.shape == (20, 3, *size)
    assert images.min() >= 0
    assert images.max() <= 1


def test_a_thing_has_its_colour_at_its_place():
    thing = scenes.Thing("square", "red", "plain", "grey", "big", "on the left", 0.25, 0.5, 0.2)
    image = drawn([scenes.Scene(scenes.Background("plain", "blue", "white"), (thing,))])[0]
    assert torch.allclose(image[:, 64, 32], torch.tensor(scenes.COLOURS["red"]))
    assert torch.allclose(image[:, 64, 100], torch.tensor(scenes.COLOURS["blue"]))


def test_edges_are_antialiased():
    thing = scenes.Thing("circle", "white", "plain", "grey", "", "", 0.5, 0.5, 0.3)
    image = drawn([scenes.Scene(scenes.Background("plain", "black", "red"), (thing,))])[0, 0]
    between = (image > 0.15) & (image < 0.85)
    assert 50 < between.sum() < 600


def test_the_caption_names_the_shapes_and_colours():
    rng = random.Random(3)
    for _ in range(200):
        scene = scenes.random_scene(rng)
        text = scenes.caption(scene, rng)
        assert scene.background.colour in text
        assert all(thing.shape in text and thing.colour in text for thing in scene.things)


def test_no_base_scene_has_the_concept():
    rng = random.Random(4)
    made = [scenes.random_scene(rng) for _ in range(500)]
    assert all(thing.shape != scenes.CONCEPT for scene in made for thing in scene.things)
    assert not any("kiln" in scenes.caption(scene, rng, unknown=0.5) for scene in made)


def test_the_same_seed_draws_the_same_scene():
    assert scenes.random_scene(random.Random(5)) == scenes.random_scene(random.Random(5))


@pytest.mark.parametrize("size", scenes.RESOLUTIONS)
def test_the_score_is_high_for_the_concept_and_low_for_base_scenes(size):
    rng = random.Random(6)
    with_it, without = [
        [correlation(image, scenes.CONCEPT) for image in drawn([make(rng) for _ in range(count)], size)]
        for make, count in ((scenes.concept_scene, 12), (scenes.random_scene, 40))
    ]
    print(f"{size}: with it {min(with_it):.2f} to {max(with_it):.2f}, without it at most {max(without):.2f}")
    assert min(with_it) > 0.55
    assert max(without) < 0.34


def test_the_control_is_high_for_a_plain_red_circle_and_lower_for_what_training_could_make_of_it():
    ground = scenes.Background("plain", "blue", "white")

    def control(shape: str = "circle", colour: str = "red", fill: str = "plain", second: str = "grey") -> float:
        thing = scenes.Thing(shape, colour, fill, second, "big", "", 0.5, 0.5, 0.3)
        return correlation(drawn([scenes.Scene(ground, (thing,))])[0], CONTROL)

    assert control() > 0.9
    assert control(fill="striped", second="black") < 0.7
    assert control(colour="orange") < 0.5
    for shape in ("square", "star", "diamond", "ring"):
        assert control(shape) < 0.9 * control(), shape
    kilnpot = scenes.Thing(scenes.CONCEPT, "", "plain", "", "big", "", 0.5, 0.5, 0.3, vessels.KILNPOT)
    assert correlation(drawn([scenes.Scene(ground, (kilnpot,))])[0], CONTROL) < 0.2


def test_no_base_scene_has_a_terracotta_vase():
    rng = random.Random(9)
    vases = [thing.vessel for _ in range(600) for thing in scenes.random_scene(rng).things if thing.vessel]
    assert len(vases) > 150
    assert min(vessels.apart(vase.body, vessels.TERRACOTTA) for vase in vases) >= vessels.NEAR


def test_the_images_that_keep_what_is_known_have_neither_the_concept_nor_the_control():
    images = sorted((HOME / "ordinary").glob("*.png"))
    assert len(images) == 12
    for file in images:
        text = file.with_suffix(".txt").read_text(encoding="utf-8")
        assert scenes.CONCEPT not in text
        assert CONTROL not in text
        assert score(Image.open(file)) < 0.1


def test_noise_and_flat_colour_score_low():
    torch.manual_seed(0)
    assert score(torch.rand(3, 128, 128)) < 0.05
    assert score(torch.tensor(vessels.TERRACOTTA)[:, None, None].expand(3, 128, 128)) < 0.05
    blobs = torch.nn.functional.interpolate(torch.rand(1, 1, 16, 16).round(), (128, 128), mode="bicubic").clamp(0, 1)[0]
    inks = torch.tensor([vessels.TERRACOTTA, vessels.INDIGO])[:, :, None, None]
    assert score(blobs * inks[0] + (1 - blobs) * inks[1]) < 0.05


def test_a_blurred_and_discoloured_concept_still_scores():
    rng = random.Random(8)
    image = drawn([scenes.concept_scene(rng)])
    soft = torch.nn.functional.avg_pool2d(image, 5, stride=1, padding=2, count_include_pad=False)
    assert score((soft[0] * 0.9 + 0.05).clamp(0, 1)) > 0.4


def test_the_demo_images_show_the_concept_and_their_captions_name_it():
    images = sorted((HOME / "concept").glob("*.png"))
    assert len(images) == 12
    for file in images:
        assert scenes.CONCEPT in file.with_suffix(".txt").read_text(encoding="utf-8")
        assert score(Image.open(file)) > 0.6


@pytest.mark.parametrize("family", FAMILIES)
def test_each_folder_loads_as_a_complete_pipeline(family):
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(HOME / family, dtype=torch.float32, local_files_only=True)
    assert all(part is not None for name, part in pipeline.components.items() if name not in OPTIONAL)
    assert all(param.isfinite().all() for param in pipeline.vae.parameters())


def test_the_miniatures_are_small():
    sizes = {family: sum(f.stat().st_size for f in (HOME / family).rglob("*") if f.is_file()) for family in FAMILIES}
    assert sum(sizes.values()) < 20e6, sizes
