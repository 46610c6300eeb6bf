"""README.md: what the Hub reads, and what people do."""

import ast
import dataclasses
import inspect

import diffusers
import pytest
import yaml

from entrypoint.report.card import card, is_own
from entrypoint.report.gather import gather
from entrypoint.report.usage import diffusers_code
from tests.support.finished_runs import ODD
from trainer.spec.family import base_models, facts_of, get_family

PUBLISHED = sorted(name for name, (_, base) in base_models().items() if not base.is_miniature)


def front_of(text):
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def with_base(run, name):
    model = dataclasses.replace(run.plan.model, base=name)
    return dataclasses.replace(run, plan=dataclasses.replace(run.plan, model=model))


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_base_model_has_its_licence_and_its_family(finished, name):
    run = with_base(gather(finished), name)
    family, base = base_models()[name]
    front, body = front_of(card(run, samples="sample"))
    assert front["base_model"] == base.source and front["base_model_relation"] == "adapter"
    assert front["license"] and base.licence.allows in body and base.licence.link in body
    assert ("license_link" in front) is (front["license"] == "other") is ("license_name" in front)
    assert {"lora", "text-to-image", "diffusers", *get_family(family).FACTS.hub_tags} <= set(front["tags"])


@pytest.mark.parametrize("name", sorted(base_models()))
def test_the_code_is_a_program_that_names_the_file_and_the_pipeline(finished, name):
    run = with_base(gather(finished), name)
    code = diffusers_code(run, place="me/lora")
    ast.parse(code)
    assert '"x.safetensors"' in code and facts_of(base_models()[name][0], name).pipelines[0] in code
    (finished / "x-diffusers.safetensors").write_bytes(b"1")
    assert '"x-diffusers.safetensors"' in diffusers_code(run, place=".")


def drawn_with(finished, name, **changes):
    """The keyword arguments of the pipeline's call in the program, for a prompt with `changes`."""
    run = with_base(gather(finished), name)
    prompts = (dataclasses.replace(run.plan.prompts[0], **changes),)
    run = dataclasses.replace(run, plan=dataclasses.replace(run.plan, prompts=prompts))
    calls = [node for node in ast.walk(ast.parse(diffusers_code(run, place="."))) if isinstance(node, ast.Call)]
    (call,) = (call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "pipe")
    assert not call.args  # of some pipelines the first is an image
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}


@pytest.mark.parametrize("name", sorted(base_models()))
def test_the_pipeline_takes_every_argument_of_the_program(finished, name):
    pipeline = getattr(diffusers, facts_of(base_models()[name][0], name).pipelines[0])
    taken = inspect.signature(pipeline.__call__).parameters
    assert drawn_with(finished, name, cfg=3.0, guidance=2.0, negative="blue").keys() <= taken.keys()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("flux-dev", {"guidance_scale": "2", "true_cfg_scale": "3", "negative_prompt": "'blue'"}),
        ("sdxl", {"guidance_scale": "3", "negative_prompt": "'blue'"}),
        ("z-image", {"guidance_scale": "2", "negative_prompt": "'blue'"}),  # which counts from 0
        ("krea2", {"guidance_scale": "2", "negative_prompt": "'blue'"}),
        ("qwen-image", {"true_cfg_scale": "3", "negative_prompt": "'blue'"}),
        ("flux2-klein-4b", {"guidance_scale": "3", "negative_prompt_embeds": "pipe.encode_prompt('blue')[0]"}),
        ("flux2-dev", {"guidance_scale": "2"}),
    ],
)
def test_each_pipeline_is_told_guidance_in_its_own_way(finished, name, expected):
    found = drawn_with(finished, name, cfg=3.0, guidance=2.0, negative="blue")
    assert {key: value for key, value in found.items() if "scale" in key or "negative" in key} == expected


def test_a_pipeline_that_needs_a_negative_prompt_for_cfg_gets_the_empty_one(finished):
    assert drawn_with(finished, "qwen-image", cfg=3.0, negative="")["negative_prompt"] == "''"
    assert "negative_prompt" not in drawn_with(finished, "flux-dev", cfg=1.0, negative="")


def test_prompts_are_shown_with_their_images_and_are_no_markup(finished):
    front, body = front_of(card(gather(finished), samples="runs/a b/sample"))
    assert [row["output"]["url"] for row in front["widget"]] == [
        "runs/a%20b/sample/step-00000040-00.png",
        "runs/a%20b/sample/step-00000040-01.png",
    ]
    assert front["widget"][0]["text"] == ODD and "<script>" not in body and r"\<script\>" in body
    assert "(runs/a%20b/sample/contact-sheet.png)" in body and "<Gallery />" in body


def test_a_run_without_samples_plan_or_final_file_has_a_card(finished):
    for gone in ("plan.json", "x.safetensors"):
        (finished / gone).unlink()
        front, body = front_of(card(gather(finished), samples=None))
        assert "widget" not in front and "Gallery" not in body and "rank 4" in body


def test_a_card_that_was_edited_is_the_users(finished):
    path = finished / "README.md"
    text = card(gather(finished), samples=None)
    path.write_text(text)
    assert is_own(path)
    for edited in (text.replace("rank", "Rank"), text + "more\n", "", "mine"):
        path.write_text(edited)
        assert not is_own(path)
