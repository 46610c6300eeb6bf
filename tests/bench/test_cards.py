"""Predictions for cards that are not here: the document has what the command prints, and they agree with an H100."""

import dataclasses
import re
from pathlib import Path

import pytest

from bench import cards
from bench.__main__ import main
from entrypoint.planning.step_time import step_seconds
from entrypoint.system.cards import hardware_of
from entrypoint.system.speeds import SPEEDS
from trainer.spec.family import get_family
from trainer.spec.memory_model import Strategy, Workload

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
CARDS = "RTX 3060|RTX 3090|RTX 4090|RTX 5090|A100 40GB|L40S|RTX A6000|H100|H200|B200|MI300X|MI325X"
# Rows of docs/performance.md with torch's own attention: family, batch, recompute policy, images/s on an H100.
MEASURED_ON_H100 = [
    ("flux", 4, "products", 4.13),
    ("sdxl", 1, "none", 11.8),
    ("sdxl", 4, "none", 19.7),
    ("sd3", 4, "none", 19.0),
]


def facts_of(family):
    facts = get_family(family).FACTS
    footprint = next(model.footprint for model in facts.models.values() if model.footprint)
    width, height = cards.SIZES[family]
    return facts, footprint, Workload(width * height, 1, cards.RANK, "adamw")


def test_the_document_has_the_tables_that_the_command_prints(capsys):
    assert main(["plans", "--cards"]) == 0
    printed = capsys.readouterr().out.strip()
    written = re.search(r"<!-- cards -->\n(.*)\n<!-- /cards -->", DOCUMENT.read_text(), re.S)[1].strip()
    assert written == printed, "run `python -m bench plans --cards` and put what it prints between the marks"


def test_every_family_has_a_row_for_every_card():
    for family in cards.TITLES:
        assert "|".join(row[0] for row in cards.family_rows(family)) == CARDS


@pytest.mark.parametrize(("family", "batch", "policy", "images_s"), MEASURED_ON_H100)
def test_an_h100_is_predicted_from_an_h200_within_six_per_cent(family, batch, policy, images_s):
    _, footprint, workload = facts_of(family)
    workload = dataclasses.replace(workload, batch=batch)
    strategy = Strategy("fp8", policy, 0, "none", 0.0)
    taken = step_seconds(footprint, workload, strategy, SPEEDS["H100"])
    assert batch / taken == pytest.approx(images_s, rel=0.06)


@pytest.mark.parametrize(("card", "seconds"), [("H200", 0.0824), ("H100", 0.0902)])
def test_smaller_images_are_predicted_from_larger_ones_within_sixteen_per_cent(card, seconds):
    """docs/performance.md: `--size 512 512`, `fp8+none+turned+replay+eager:1`, with torch's attention."""
    _, footprint, workload = facts_of("flux")
    workload = dataclasses.replace(workload, pixels=512 * 512)
    strategy = Strategy("fp8", "none", 0, "none", 0.0, transposed=True)
    assert step_seconds(footprint, workload, strategy, SPEEDS[card]) == pytest.approx(seconds, rel=0.16)


@pytest.mark.parametrize("family", cards.TITLES)
@pytest.mark.parametrize("card", CARDS.split("|"))
def test_ten_shapes_have_room_for_their_graphs_where_one_shape_fits(card, family):
    facts, footprint, workload = facts_of(family)
    hardware = hardware_of(card)
    one = cards.chosen(facts, footprint, hardware, workload)
    ten = cards._ten_shapes(footprint, hardware, workload, one)
    assert cards._fits(hardware, ten) or not cards._fits(hardware, one)
    graphs_gib = 9 * footprint.graph_gib
    assert ten == one if one.offload == "weights" else ten.gib <= one.gib + graphs_gib + 1e-6
    more = dataclasses.replace(hardware, memory_gib=hardware.memory_gib + 1)
    roomy = cards._ten_shapes(footprint, more, workload, one)
    assert (roomy.recompute, roomy.kept_blocks, roomy.offload) == (one.recompute, one.kept_blocks, one.offload)


def test_a_card_that_is_too_small_is_said_to_be():
    facts, footprint, workload = facts_of("flux")
    tiny = dataclasses.replace(hardware_of("RTX 3060"), memory_gib=2.0)
    assert not cards._fits(tiny, cards.chosen(facts, footprint, tiny, workload))
