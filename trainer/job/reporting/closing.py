"""The last lines of a job: where its LoRA is, and how to use it."""

from __future__ import annotations

from pathlib import Path

from trainer.job.reporting.status import clock
from trainer.spec.messages.usage import DIFFUSERS_SUFFIX, prompting
from trainer.spec.plan import Plan
from trainer.storage.atomic import human_size
from trainer.storage.own_files import SHEET_NAME


def closing_lines(final: Path, plan: Plan, *, steps: int, samples: Path, seconds: float) -> list[str]:
    """Lines for the log, after the LoRA `final` was written.

    `samples`: the folder of the samples. `seconds`: how long this start of the job took.
    """
    lines = [f"Done: {final} ({human_size(final.stat().st_size)}), {steps:,} steps; this start took {clock(seconds)}."]
    beside = final.with_name(f"{final.stem}{DIFFUSERS_SUFFIX}.safetensors")
    for_diffusers = beside if beside.is_file() else final
    lines.append(f"ComfyUI: copy {final.name} to models/loras. Forge and A1111: to models/Lora.")
    words = sorted({subset.trigger_word for subset in plan.data.subsets if subset.trigger_word})
    prompt = f"{words[0]}, a prompt" if words else "a prompt"
    lines.append(f'diffusers: pipe.load_lora_weights("{for_diffusers}"), then pipe(prompt={prompt!r}).')
    lines.append(
        f"Strength in a prompt of Forge and A1111: <lora:{final.stem}:1>; in ComfyUI: strength_model of LoraLoader."
    )
    lines.append(prompting(words))
    if (samples / SHEET_NAME).is_file():
        lines.append(f"Compare the steps on {samples / SHEET_NAME}: an earlier one may be better.")
    return lines
