"""Weight files of published size, as users have them: real names and shapes, sparse zeros, no room on the disk."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch

from bench import original_names
from bench.layouts import write_zeros
from trainer.base_model.loading import empty_model
from trainer.spec.family import base_models, facts_of, get_family

State = dict[str, torch.Tensor]


def state(model: torch.nn.Module) -> State:
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    return {name: tensor.half() for name, tensor in model.state_dict().items() if name not in tied}


@cache
def parts(base: str) -> dict[str, State]:
    """Every part of a published model on the device "meta", by diffusers' names."""
    import tempfile

    family, model = base_models()[base]
    assert model.published is not None
    states = {}
    with tempfile.TemporaryDirectory() as place:
        for name, config in model.published.configs.items():
            path = Path(place) / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(config))
        facts = facts_of(family, base)
        for part, folder in facts.parts.items():
            states[part] = state(empty_model(facts.kinds[folder], Path(place) / folder))
    return states


def denoiser(base: str) -> State:
    """Under its original names."""
    family, model = base_models()[base]
    assert model.published is not None
    folder = get_family(family).FACTS.parts["denoiser"]
    return original_names.denoiser(family, parts(base)["denoiser"], model.published.configs[f"{folder}/config.json"])


def write(path: Path, tensors: State) -> str:
    write_zeros(path, tensors)
    return str(path)


def four_files(folder: Path, base: str = "flux-dev") -> dict[str, str]:
    """The layout of the published tutorial: the denoiser, the VAE and two text encoders, each in a file of its own."""
    found = parts(base)
    return {
        "MODEL_PATH": write(folder / "flux1-dev.safetensors", denoiser(base)),
        "VAE_PATH": write(folder / "ae.safetensors", original_names.vae_original(found["vae"])),
        "CLIP_L_PATH": write(folder / "clip_l.safetensors", original_names.hugging_face(found["clip_l"])),
        "T5_PATH": write(folder / "t5xxl_fp16.safetensors", found["t5"]),
    }


def one_file(folder: Path, base: str, *, without: tuple[str, ...] = ()) -> dict[str, str]:
    """A whole model as one file."""
    family, model = base_models()[base]
    assert model.published is not None
    place = get_family(family).FACTS.parts["denoiser"]
    chosen = {part: found for part, found in parts(base).items() if part not in without}
    config = model.published.configs[f"{place}/config.json"]
    return {"MODEL_PATH": write(folder / f"{base}.safetensors", original_names.whole_file(family, chosen, config))}
