"""How to use the LoRA of a run: code for diffusers that works for its very file, and what to do in other programs."""

from __future__ import annotations

import json

from entrypoint.report.gather import Gathered
from entrypoint.system.environment import REPOSITORY
from trainer.spec.family import BaseModel, Facts
from trainer.spec.messages.usage import DIFFUSERS_SUFFIX
from trainer.spec.plan import Prompt
from trainer.spec.prompts import has_embedded_guidance

LOCAL_BASE = "FOLDER_OF_THE_BASE_MODEL"


def diffusers_file(run: Gathered) -> str:
    """The name of the file that diffusers loads; "" where there is no finished LoRA."""
    if run.final is None:
        return ""
    beside = run.final.path.with_name(f"{run.final.path.stem}{DIFFUSERS_SUFFIX}.safetensors")
    return beside.name if beside.is_file() else run.final.path.name


def diffusers_code(run: Gathered, *, place: str) -> str:
    """A program that draws the first sample again; "" where no LoRA or no base model is known.

    `place`: the folder or the repository with the file.
    """
    facts, file = run.facts, diffusers_file(run)
    if facts is None or run.base is None or not file:
        return ""
    pipeline = facts.pipelines[0]
    is_small = run.base.is_miniature
    base = LOCAL_BASE if run.plan and run.plan.model.parts else run.base_repository
    if is_small:
        base = _inside(run.base.source)
    dtype, device = ("torch.float32", "cpu") if is_small else ("torch.bfloat16", "cuda")
    lines = [
        "import torch",
        f"from diffusers import {pipeline}",
        "",
        f"pipe = {pipeline}.from_pretrained({json.dumps(base)}, torch_dtype={dtype}).to({json.dumps(device)})",
        f"pipe.load_lora_weights({json.dumps(place)}, weight_name={json.dumps(file, ensure_ascii=False)})",
        "image = pipe(",
        *[f"    {argument}," for argument in _arguments(run, facts, run.base)],
        ").images[0]",
        'image.save("image.png")',
    ]
    return "\n".join(lines)


def _inside(folder: str) -> str:
    """A folder of this program, as it is called from the program's own."""
    return folder.removeprefix(f"{REPOSITORY}/")


def _arguments(run: Gathered, facts: Facts, base: BaseModel) -> list[str]:
    prompt = run.plan.prompts[0] if run.plan and run.plan.prompts else None
    if prompt is None:
        words = f"{run.triggers[0]}, " if run.triggers else ""
        return [f"prompt={_quoted(f'{words}what you want to see')}"]
    numbers = [f"num_inference_steps={prompt.steps}", f"width={prompt.width}", f"height={prompt.height}"]
    numbers.append(f'generator=torch.Generator("cpu").manual_seed({prompt.seed})')
    return [f"prompt={_quoted(prompt.text)}", *_guidance(prompt, facts, base), *numbers]


def _guidance(prompt: Prompt, facts: Facts, base: BaseModel) -> list[str]:
    """The pipeline's arguments for both kinds of guidance, embedded and classifier-free."""
    found = []
    if has_embedded_guidance(facts, base):
        found.append(f"guidance_scale={prompt.guidance:g}")
    if not facts.draws_with_cfg:
        return found
    goes_by_negative = facts.pipeline_cfg == "true_cfg_scale"  # such a pipeline draws once where it is given none
    if prompt.negative or (goes_by_negative and prompt.cfg > 1):
        found.append(facts.pipeline_negative.format(_quoted(prompt.negative)))
    if prompt.cfg > 1 or not goes_by_negative:
        found.append(f"{facts.pipeline_cfg}={prompt.cfg - 1 + facts.pipeline_cfg_none:g}")
    return found


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
