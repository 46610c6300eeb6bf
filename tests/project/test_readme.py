"""The README says what the code says."""

from pathlib import Path

from entrypoint.settings.read import help_env

README = Path(__file__).parents[2] / "README.md"


def test_the_table_of_variables_is_printed_from_the_code():
    text = README.read_text(encoding="utf-8")
    table = text.split("<!-- variables -->\n")[1].split("<!-- /variables -->")[0]
    assert table.strip() == help_env().strip(), "make readme renews it"


def test_it_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150
