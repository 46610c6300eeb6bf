"""The line that says what was understood from the environment."""

import pytest

from entrypoint.settings import given, read_settings

JOB = {"BASE_MODEL": "flux", "DATASET_NAME": "/images"}


def described(**variables):
    return given.describe(read_settings(JOB | variables))


def test_what_is_set_is_listed_and_the_rest_is_counted():
    text = described(PARAMS_MAX_STEPS="40", STRICT_DATASET="yes")
    assert text.startswith("Set here: BASE_MODEL=flux, ") and "DATASET_NAME=/images" in text
    assert "PARAMS_MAX_STEPS=40" in text and "STRICT_DATASET=true" in text
    assert text.endswith(" variables have their defaults.") and "PARAMS_SEED" not in text


def test_what_only_says_the_default_is_marked():
    assert "PARAMS_SEED=42 (the default)" in described(PARAMS_SEED="42")
    assert "PARAMS_SEED=43," in described(PARAMS_SEED="43") or "PARAMS_SEED=43." in described(PARAMS_SEED="43")


@pytest.mark.parametrize(
    ("variables", "secret"),
    [
        ({"HF_TOKEN": "hf_abcdefghijklmnop"}, "abcdefgh"),
        ({"WEBHOOK_URL": "https://example.com/hook/abcdefgh"}, "abcdefgh"),
        ({"DATASET_NAME": "https://me:" + "abcdefgh@example.com/a.zip?key=abcdefgh"}, "abcdefgh"),
        (
            {"DATASET_CONFIG": '{"datasets": [{"subsets": [{"image_dir": "https://x.y/a.zip?key=abcdefgh"}]}]}'},
            "abcdefgh",
        ),
    ],
)
def test_no_secret_is_in_it(variables, secret):
    text = described(**variables)
    assert next(iter(variables)) in text and secret not in text


def test_numbers_are_listed_as_they_are_written():
    assert "SAMPLE_STRENGTHS=0,0.5. The other" in described(SAMPLE_STRENGTHS="[0, 0.50]")


def test_a_long_value_is_cut():
    text = described(TRIGGER_WORD="x" * 200)
    assert "x" * 60 + "…" in text and "x" * 61 not in text
