"""The README is short, and the table of variables says what the code says."""

import datetime
import re
from pathlib import Path

import pytest

from entrypoint.dataset_config.manifest import read_manifest
from entrypoint.planning.plan import make_plan
from entrypoint.settings.read import help_env, read_settings
from entrypoint.system import cards

ROOT = Path(__file__).parents[2]


def test_the_table_of_variables_is_printed_from_the_code():
    text = (ROOT / "docs/variables.md").read_text(encoding="utf-8")
    table = text.split("<!-- variables -->\n")[1].split("<!-- /variables -->")[0]
    assert table.strip() == help_env().strip(), "make readme renews it"


def test_it_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


SIZES = {"SDXL": "sdxl", "Stable Diffusion 3 medium": "sd3-medium", "Flux.1": "flux"}


def predicted(base: str, card: str) -> str:
    """What `--check --gpu CARD` says of the memory mode."""
    settings = read_settings({"BASE_MODEL": base, "DATASET_NAME": "/images"})
    manifest = read_manifest(None, None)
    plan = make_plan(settings, manifest, cards.hardware_of(card), now=datetime.datetime.now(datetime.UTC))
    (reason,) = (reason for reason in plan.reasons if reason.startswith("Memory mode"))
    return reason


def card_table() -> list[tuple[str, str, str]]:
    """(card, base, cell) of the table of cards."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| card |"))
    names = [cell.strip() for cell in lines[start].split("|")[2:-1]]
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        card, *cells = [cell.strip() for cell in line.split("|")[1:-1]]
        found += [(card, SIZES[name], cell) for name, cell in zip(names, cells, strict=True)]
    return found


@pytest.mark.parametrize(("card", "base", "cell"), card_table())
def test_the_table_of_cards_is_what_the_check_predicts(card, base, cell):
    reason = predicted(base, card)
    if "the same as 8 GB" in cell:
        assert reason == predicted(base, "8 GB")
        return
    gib = re.search(r"([\d.]+) GiB", cell)
    assert gib and f"{gib[1]} GiB" in reason
    assert ("fastest" in cell.replace("slowest", "")) == ("everything kept" in reason)
    assert ("the weights wait" in cell) == ("weights streamed" in reason)
    assert ("a part waits" in cell) == ("activations offloaded" in reason and "streamed" not in reason)
    assert ("8-bit" in cell) <= ("int8" in reason)
