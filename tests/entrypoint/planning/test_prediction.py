"""PARAMS_PREDICTION_TYPE=auto takes what a single file says; what contradicts it is a warning. Lengths of captions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from trainer.spec.errors import SettingsError
from trainer.spec.prediction_marks import HEADER_VALUES, MARKS, prediction_marks
from trainer.spec.rules.resume_rules import Changes, changes


@pytest.fixture
def planned(tmp_path, job_plan):
    """`planned(tensors, metadata, **variables)`: the plan of a job on a file of SDXL with these."""

    def plan(tensors, metadata, family="sdxl", **variables):
        names = ("input_blocks.0.0.weight",) if family == "sdxl" else ("single_blocks.0.modulation.lin.weight",)
        state = {name: torch.zeros(1) for name in (*names, *tensors)}
        save_file(state, tmp_path / "x.safetensors", metadata)
        return job_plan(family, MODEL_PATH=str(tmp_path / "x.safetensors"), **variables)

    return plan


V, EPSILON = {"modelspec.prediction_type": "v"}, {"modelspec.prediction_type": "epsilon"}
CHOSEN = [
    ([], V, "PARAMS_PREDICTION_TYPE: v_prediction (modelspec.prediction_type=v in its header says so)"),
    ([], EPSILON, "PARAMS_PREDICTION_TYPE: epsilon (modelspec.prediction_type=epsilon in its header says so)"),
    (["v_pred"], {}, "PARAMS_PREDICTION_TYPE: v_prediction (its tensor v_pred says so)"),
    (["v_pred", "ztsnr"], EPSILON, "PARAMS_ZERO_TERMINAL_SNR: true (its tensor ztsnr says so)"),
    (["ztsnr"], V, "PARAMS_ZERO_TERMINAL_SNR: true (its tensor ztsnr says so)"),
]


@pytest.mark.parametrize(("tensors", "metadata", "reason"), CHOSEN)
def test_auto_takes_what_the_file_says_and_says_so(planned, tensors, metadata, reason):
    plan = planned(tensors, metadata)
    assert reason in plan.reasons and not plan.warnings


WARNED = [
    ([], V, {"PARAMS_PREDICTION_TYPE": "epsilon"}, "PARAMS_PREDICTION_TYPE=epsilon, but"),
    (["v_pred"], {}, {"PARAMS_PREDICTION_TYPE": "epsilon"}, "predicts v_prediction, by its tensor v_pred"),
    ([], EPSILON, {"PARAMS_PREDICTION_TYPE": "v_prediction"}, "predicts epsilon"),
    (["v_pred", "ztsnr"], {}, {"PARAMS_ZERO_TERMINAL_SNR": "false"}, "PARAMS_ZERO_TERMINAL_SNR=false, but"),
    (["ztsnr"], {}, {}, "is marked ztsnr but not v-prediction"),
    ([], {"modelspec.prediction_type": "sample"}, {}, "'sample' in its header is not one of epsilon and v"),
]


@pytest.mark.parametrize(("tensors", "metadata", "variables", "warning"), WARNED)
def test_what_contradicts_the_file_is_a_warning(planned, tensors, metadata, variables, warning):
    assert [text for text in planned(tensors, metadata, **variables).warnings if warning in text]


@pytest.mark.parametrize("variables", [{"PARAMS_PREDICTION_TYPE": "v_prediction"}, {}])
def test_what_agrees_with_the_file_is_none(planned, variables):
    assert not planned(["v_pred"], V, **variables).warnings


def test_noise_levels_of_edm_are_refused_in_the_plan(planned):
    with pytest.raises(SettingsError, match="EDM"):
        planned(["edm_vpred.sigma_max"], {})


def test_models_of_flow_matching_do_not_ask(planned):
    plan = planned(["v_pred"], V, family="flux")
    assert not plan.warnings and not any("PREDICTION" in reason for reason in plan.reasons)


@given(
    st.lists(st.sampled_from([*MARKS, "model.diffusion_model.v_pred", "x"])),
    st.dictionaries(
        st.sampled_from(["modelspec.prediction_type", "a"]),
        st.one_of(st.text(), st.none(), st.integers(), st.sampled_from(sorted(HEADER_VALUES))),
    ),
)
def test_any_header_is_read(names, metadata):
    marks = prediction_marks(names, metadata)
    assert marks.prediction in (None, "epsilon", "v_prediction") and bool(marks.said_by) == bool(marks.prediction)


@pytest.mark.parametrize("length", ["77", "150", "225"])
def test_clip_reads_long_captions_where_nothing_else_does(job_plan, length):
    assert job_plan("sdxl", PARAMS_MAX_TOKEN_LENGTH=length).train.max_token_length == int(length)
    for family in ("flux", "sd3"):
        if length == "77":
            assert job_plan(family, PARAMS_MAX_TOKEN_LENGTH=length).train.max_token_length == 77
            continue
        with pytest.raises(SettingsError, match=rf"PARAMS_MAX_TOKEN_LENGTH={length}: .* T5 reads (512|256) tokens"):
            job_plan(family, PARAMS_MAX_TOKEN_LENGTH=length)


def test_a_state_from_before_there_was_a_length_resumes_with_77_tokens(job_plan):
    plan = job_plan("sdxl")
    older = {key: value for key, value in plan.essence().items() if key != "train.max_token_length"}
    assert changes(older, plan) == Changes()
    assert changes(older, job_plan("sdxl", PARAMS_MAX_TOKEN_LENGTH="150")).settings == (
        "PARAMS_MAX_TOKEN_LENGTH: 77 → 150",
    )
