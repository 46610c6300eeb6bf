"""How to use the LoRA of a run: code for diffusers that works for its very file, and what to do in other programs."""

from __future__ import annotations

import json

from entrypoint.report.gather import Gathered
from entrypoint.system.environment import REPOSITORY
from trainer.spec.messages.usage import DIFFUSERS_SUFFIX
from trainer.spec.plan import Prompt

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
        *[f"    {argument}," for argument in _arguments(run, has_guidance=bool(facts.prompt_guidance))],
        ").images[0]",
        'image.save("image.png")',
    ]
    return "\n".join(lines)


def _inside(folder: str) -> str:
    """A folder of this program, as it is called from the program's own."""
    return folder.removeprefix(f"{REPOSITORY}/")


def _arguments(run: Gathered, *, has_guidance: bool) -> list[str]:
    prompt = run.plan.prompts[0] if run.plan and run.plan.prompts else None
    if prompt is None:
        words = f"{run.triggers[0]}, " if run.triggers else ""
        return [json.dumps(f"{words}what you want to see", ensure_ascii=False)]
    return [json.dumps(prompt.text, ensure_ascii=False), *_numbers(prompt, has_guidance=has_guidance)]


def _numbers(prompt: Prompt, *, has_guidance: bool) -> list[str]:
    found = []
    if prompt.negative:
        found.append(f"negative_prompt={json.dumps(prompt.negative, ensure_ascii=False)}")
    if has_guidance:  # embedded; CFG has a name of its own there
        found.append(f"guidance_scale={prompt.guidance:g}")
        if prompt.cfg > 1:
            found.append(f"true_cfg_scale={prompt.cfg:g}")
    else:
        found.append(f"guidance_scale={prompt.cfg:g}")
    found += [f"num_inference_steps={prompt.steps}", f"width={prompt.width}", f"height={prompt.height}"]
    found.append(f'generator=torch.Generator("cpu").manual_seed({prompt.seed})')
    return found
