"""`--check --gpu CARD`: the names by which shops and RunPod's catalog know accelerators."""

import time

import pytest

from entrypoint.system.cards import CARDS, hardware_of
from trainer.spec.errors import SettingsError


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_card_is_found_by_its_own_name(card):
    found = hardware_of(card.name)
    assert (found.vendor, found.architecture, found.memory_gib) == (
        card.vendor,
        card.architecture,
        card.memory_mib / 1024,
    )


def test_no_two_cards_have_the_same_name():
    assert len({card.name.casefold() for card in CARDS}) == len(CARDS)


@pytest.mark.parametrize(
    ("text", "architecture", "gib", "count"),
    [
        ("4090", "8.9", 24, 1),
        ("rtx4090", "8.9", 24, 1),
        ("NVIDIA GeForce RTX 4090", "8.9", 24, 1),
        ("RTX 4070Ti Super", "8.9", 16, 1),
        ("3060 12GB", "8.6", 12, 1),
        ("A100", "8.0", 40, 1),
        ("NVIDIA A100-SXM4-80GB", "8.0", 80, 1),
        ("NVIDIA A100 80GB PCIe", "8.0", 80, 1),
        ("NVIDIA H100 80GB HBM3", "9.0", 80, 1),
        ("NVIDIA H100 NVL", "9.0", 94, 1),
        ("NVIDIA RTX 6000 Ada Generation", "8.9", 48, 1),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "12.0", 96, 1),
        ("AMD Instinct MI300X OAM", "gfx942", 192, 1),
        ("2 x RTX 3090", "8.6", 24, 2),
        ("12 GB", "8.6", 12, 1),
        ("8gb", "8.6", 8, 1),
    ],
)
def test_names_as_people_write_them(text, architecture, gib, count):
    found = hardware_of(text)
    assert (found.architecture, round(found.memory_gib), found.count) == (architecture, gib, count)


def test_the_host_is_taken_to_have_twice_the_memory_of_the_card():
    assert hardware_of("8 GB").host_memory_gib == 32.0
    assert round(hardware_of("2 x A100 80GB").host_memory_gib) == 320


@pytest.mark.parametrize(
    ("text", "hint"),
    [("RTX 4091", "RTX 4090"), ("foo", "'RTX 4090'"), ("", "12 GB"), ("3060 8GB", ""), ("1 GB", "12 GB")],
)
def test_an_unknown_card_is_refused_with_a_hint(text, hint):
    with pytest.raises(SettingsError, match="--gpu") as caught:
        hardware_of(text)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reach"),
    [("2 x RTX 4090", False), ("2 x RTX 4060 Ti 16GB", False), ("4 x H100", True), ("2 x RTX 6000 Ada", True)],
)
def test_gaming_cards_do_not_read_each_others_memory(text, reach):
    assert hardware_of(text).reach_each_other(2) == reach


@pytest.mark.parametrize("text", ["9" * 100_000, "rtx" + " " * 100_000 + "x", "5 x " + "a" * 100_000])
def test_a_text_without_end_is_refused_at_once(text):
    began = time.process_time()
    with pytest.raises(SettingsError, match="is not a card"):
        hardware_of(text)
    assert time.process_time() - began < 0.5
