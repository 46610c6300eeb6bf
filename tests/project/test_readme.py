"""The README is short, and the table of variables says what the code says."""

from pathlib import Path

from entrypoint.settings.read import help_env

ROOT = Path(__file__).parents[2]


def test_the_table_of_variables_is_printed_from_the_code():
    text = (ROOT / "docs/variables.md").read_text(encoding="utf-8")
    table = text.split("<!-- variables -->\n")[1].split("<!-- /variables -->")[0]
    assert table.strip() == help_env().strip(), "make readme renews it"


def test_it_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
