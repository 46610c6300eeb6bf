"""What a wrong command line is told."""

import pytest

from trainer.spec.commands.parser import Parser

SECRET = "s3cretpart"


@pytest.mark.parametrize(
    "words",
    [
        [f"https://me:{SECRET}@example.org/x?token={SECRET}"],
        ["a", f"https://example.org/x?X-Amz-Signature={SECRET}"],
        ["a", f"--token={SECRET}"],
        ["a", f"--hf-token={SECRET}"],
        ["a", f"HF_TOKEN=hf_{SECRET * 3}"],
    ],
)
def test_no_secret_of_an_argument_is_quoted(words, capsys):
    parser = Parser("program")
    parser.add_argument("command", choices=("a", "b"))
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(words)
    said = capsys.readouterr().err
    assert ended.value.code == 64
    assert SECRET not in said
    assert "usage: program" in said and "***" in said


def test_an_argument_without_end_and_raw_characters_are_not_printed_as_they_are(capsys):
    with pytest.raises(SystemExit):
        Parser("program").parse_args(["\x1b[31m" + "x" * 100_000])
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert len(said) < 2000
