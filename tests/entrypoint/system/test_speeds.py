"""Which card a machine has, and its maker's figures."""

import dataclasses

import pytest

from entrypoint.system.cards import CARDS, card_of, hardware_of
from entrypoint.system.speeds import SPEEDS, speed_of


def test_every_row_is_a_card_that_can_be_planned_for():
    names = {card.name for card in CARDS}
    assert {name.removesuffix(" PCIe") for name in SPEEDS} <= names
    for speed in SPEEDS.values():
        assert 1.9 <= speed.tflops_8 / speed.tflops_16 <= 4.1 and speed.gb_s > 200 and speed.source


@pytest.mark.parametrize(
    ("driver", "architecture", "card", "gb_s"),
    [
        ("NVIDIA GeForce RTX 4090", "8.9", "RTX 4090", 1008),
        ("NVIDIA H100 80GB HBM3", "9.0", "H100", 3350),
        ("NVIDIA H100 PCIe", "9.0", "H100", 2000),
        ("NVIDIA A100-SXM4-80GB", "8.0", "A100 80GB", 1935),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "12.0", "RTX PRO 6000 Blackwell", 1792),
        ("NVIDIA RTX 6000 Ada Generation", "8.9", "RTX 6000 Ada", 960),
    ],
)
def test_a_card_is_known_by_the_name_of_its_driver(driver, architecture, card, gb_s):
    found = dataclasses.replace(hardware_of(card), architecture=architecture, name=driver)
    assert card_of(found) == card
    assert speed_of(found).gb_s == gb_s


def test_without_a_name_the_only_card_of_its_kind_and_size_is_meant():
    assert card_of(dataclasses.replace(hardware_of("MI300X"), name="")) == "MI300X"
    assert card_of(dataclasses.replace(hardware_of("RTX 4090"), name="")) is None  # others have its memory


@pytest.mark.parametrize(
    "unknown", [dataclasses.replace(hardware_of("RTX 4090"), name="NVIDIA X9"), hardware_of("12 GB")]
)
def test_what_is_no_known_card_has_no_figures(unknown):
    assert speed_of(unknown) is None


def test_cards_without_figures_have_none():
    assert speed_of(hardware_of("GTX 1080 Ti")) is None
