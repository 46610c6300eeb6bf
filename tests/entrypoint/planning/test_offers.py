"""`python -m entrypoint quote`: the job on each GPU that can be rented."""

import json

import pytest

from entrypoint import __main__ as entrypoint
from entrypoint.system import prices
from entrypoint.system.cards import card_of, hardware_of
from entrypoint.system.speeds import speed_of
from tests.support.drawings import draw
from trainer.spec.errors import SettingsError


@pytest.fixture
def quoted(monkeypatch, tmp_path, capsys):
    """`quoted(*arguments, **variables)`: the exit code and what is printed for a job for Flux.1 on 12 images."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(12):
        draw(64, 64, seed=i).save(images / f"{i}.png")
    names = {"BASE_MODEL": "flux", "DATASET_NAME": str(images), "PARAMS_RESOLUTION": "512"}
    names |= {"OUTPUT_PATH": str(tmp_path / "out"), "CACHE_PATH": str(tmp_path / "cache")}

    def run(*arguments, **variables):
        for name, value in (names | variables).items():
            monkeypatch.setenv(name, value)
        code = entrypoint.main(["quote", *arguments])
        return code, capsys.readouterr().out

    return run


def offers(tmp_path, **found):
    path = tmp_path / "prices.json"
    path.write_text(json.dumps({name.replace("_", " "): price for name, price in found.items()}))
    return str(path)


def test_every_offer_of_the_table_has_a_card_with_known_figures():
    for offer in prices.OFFERS:
        hardware = hardware_of(offer.card)
        assert card_of(hardware) and speed_of(hardware), offer
        assert 0.1 < offer.per_hour < 20 and offer.seen.startswith("202")


def test_the_table_is_by_price_and_marks_the_cheapest_and_the_fastest(quoted):
    code, printed = quoted()
    rows = printed.split("\n\n")[0].splitlines()[1:]
    assert code == 0 and len(rows) == len(prices.OFFERS)
    assert rows[0].endswith("cheapest") and sum("fastest" in row for row in rows) == 1
    assert "approximate" in printed and "--prices" in printed


def test_time_money_and_steps_belong_together_and_are_those_of_a_check(quoted, tmp_path, capsys):
    file = offers(tmp_path, RTX_4090=0.5, H100=3.0)
    code, printed = quoted("--json", "--prices", file)
    found = {row["gpu"]: row for row in json.loads(printed)["gpus"]}
    assert code == 0 and found.keys() == {"RTX 4090", "H100"}
    for row in found.values():
        assert row["fits"] and row["steps"] == 1200
        assert row["cost"] == pytest.approx(row["price_per_hour"] * row["seconds"] / 3600, abs=0.006)
    assert found["H100"]["seconds"] < found["RTX 4090"]["seconds"]
    entrypoint.main(["--check", "--gpu", "RTX 4090", "--json"])
    checked = json.loads(capsys.readouterr().out)["job"]["quote"]
    assert (checked["seconds"], checked["step_seconds"]) == tuple(
        found["RTX 4090"][key] for key in ("seconds", "step_seconds")
    )


def test_captions_by_a_model_are_in_the_time(quoted, tmp_path, capsys):
    """Twelve images without a caption; the model's size is known by its name."""
    file = offers(tmp_path, RTX_4090=0.5)
    (plain,) = json.loads(quoted("--json", "--prices", file)[1])["gpus"]
    (row,) = json.loads(quoted("--json", "--prices", file, CAPTION_WITH="joycaption")[1])["gpus"]
    assert plain["caption_seconds"] == 0 and row["caption_seconds"] > 12
    assert row["seconds"] == pytest.approx(plain["seconds"] + row["caption_seconds"], abs=1)
    assert "Times are with the captions that a model is to write" in quoted("--prices", file)[1]
    entrypoint.main(["--check", "--gpu", "RTX 4090", "--json"])
    checked = json.loads(capsys.readouterr().out)["job"]["quote"]
    assert (checked["seconds"], checked["caption_seconds"]) == (row["seconds"], row["caption_seconds"])
    code, printed = quoted("--prices", file, CAPTION_WITH="somebody/model")
    assert code == 0 and "Captions by a model (CAPTION_WITH) come on top" in printed


def test_several_machines_cost_the_price_of_each(quoted, tmp_path):
    """MAX_COST is what each of them may cost."""
    file = offers(tmp_path, H100=3.0)
    code, printed = quoted("--json", "--prices", file, NODES="2", PARAMS_MAX_STEPS="1000", MAX_COST="1000")
    (row,) = json.loads(printed)["gpus"]
    assert code == 0 and row["machines"] == 2
    assert row["cost"] == pytest.approx(2 * 3.0 * row["seconds"] / 3600, abs=0.01)
    limit = str(0.75 * row["cost"])  # less than both cost together, more than one of them
    marks = json.loads(quoted("--json", "--prices", file, MAX_COST=limit)[1])["gpus"][0]["marks"]
    assert not any("MAX_COST" in mark for mark in marks)
    assert "those of 2 machines together" in quoted("--prices", file)[1]


def test_a_gpu_that_is_too_small_says_why_and_comes_last(quoted, tmp_path):
    _, printed = quoted("--json", "--prices", offers(tmp_path, RTX_3070=0.01, H100=3.0), PARAMS_BATCH_SIZE="64")
    rows = json.loads(printed)["gpus"]
    assert [row["gpu"] for row in rows] == ["H100", "RTX 3070"]
    assert not rows[1]["fits"] and "PARAMS_BATCH_SIZE" in rows[1]["why_not"] and rows[1]["cost"] is None


def test_what_goes_beyond_a_limit_is_marked(quoted, tmp_path):
    file = offers(tmp_path, RTX_4090=0.5, H100=300.0)
    _, printed = quoted("--json", "--prices", file, MAX_COST="5", PRICE_PER_HOUR="1", MAX_RUNTIME="0.0001")
    marks = {row["gpu"]: row["marks"] for row in json.loads(printed)["gpus"]}
    assert marks["RTX 4090"] == ["cheapest", "above MAX_RUNTIME=0.0001"]
    assert marks["H100"] == ["fastest", "above MAX_COST=5", "above MAX_RUNTIME=0.0001"]


def test_images_that_are_elsewhere_are_quoted_for_an_assumed_number_of_steps(quoted, tmp_path):
    code, printed = quoted("--prices", offers(tmp_path, H100=3.0), DATASET_NAME="https://example.com/images.zip")
    assert code == 0 and "time and money are for 1,000 steps without samples" in printed


def test_a_job_that_no_gpu_can_do_is_refused_with_the_reason(quoted, tmp_path, caplog):
    code, printed = quoted("--prices", offers(tmp_path, H100=3.0), PARAMS_LORA_TYPE="dora", PARAMS_OFFLOAD="weights")
    assert code == 78 and not printed and "PARAMS_OFFLOAD=weights does not work with" in caplog.text


def test_names_that_no_card_has_are_left_out_and_said(quoted, tmp_path):
    _, printed = quoted("--prices", offers(tmp_path, H100=3.0, Quantum_9=1.0))
    assert "left out: Quantum 9" in printed


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "{", '{"H100": "3"}', '{"H100": 0}', '{"H100": true}', '{"H100": NaN}']
)
def test_a_file_that_is_no_list_of_prices_is_refused(tmp_path, text):
    (tmp_path / "prices.json").write_text(text)
    with pytest.raises(SettingsError, match="--prices"):
        prices.read_offers(tmp_path / "prices.json")
    with pytest.raises(SettingsError, match="--prices"):
        prices.read_offers(tmp_path / "missing.json")
