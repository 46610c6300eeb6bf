"""JSON files that are replaced in one step."""

import json

from trainer.storage import atomic


def test_a_lone_half_of_a_letter_is_written_as_an_escape(tmp_path):
    atomic.write_json(tmp_path / "x.json", {"name": "a\ud800b", "other": "é"})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"name": "a\ud800b", "other": "é"}
    atomic.write_json(tmp_path / "x.json", {"other": "é"})
    assert "é" in (tmp_path / "x.json").read_text(encoding="utf-8")
