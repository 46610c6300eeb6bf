"""What libraries say about themselves appears neither in a job's log nor in a tool's output."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# Everything of which a library has been heard to speak, after a program's own start.
NOISE = """
import logging, sys, warnings
from trainer import __main__ as job
from trainer.lora_files import arguments


def noise():
    import torch
    import torchao
    from diffusers import UNet2DConditionModel
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    class Model(UNet2DConditionModel):
        _keep_in_fp32_modules = []

    sizes = {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    Model(**sizes).to(torch.float16)
    logging.getLogger("torchao").warning("NOISE of torchao")
    diffusers_logging.get_logger("diffusers.models").warning("NOISE of diffusers")
    transformers_logging.get_logger("transformers.models").warning("NOISE of transformers")
    warnings.warn("NOISE of a library")
    print("done", file=sys.stderr)


if sys.argv[1] == "tool":
    arguments.run_command(noise)
else:
    job._configure_logging(0)
    noise()
"""


@pytest.mark.parametrize("program", ["tool", "job"])
def test_libraries_are_silent(program):
    done = subprocess.run([sys.executable, "-c", NOISE, program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "done\n"
