"""What a job wrote, a job with the same settings goes on from: the same adapters, and the same output at step 0."""

from __future__ import annotations

import copy
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entrypoint.dataset_config.manifest import read_manifest
from entrypoint.planning.plan import make_plan
from entrypoint.settings.read import read_settings
from entrypoint.system.hardware import Hardware
from trainer.engine import adapters
from trainer.job.build import untrained_norms
from trainer.lora_files import convert, key_names, peft_bridge
from trainer.lora_files.weights import LoraWeights
from trainer.lora_files.write import write_lora
from trainer.spec.family import get_family

CPU = Hardware("cpu", "x86_64", 32.0, 0, "", 32.0, 8)
NOW = datetime(2026, 1, 2, tzinfo=UTC)
FAMILIES = ("flux", "sdxl", "sd3")


def make(base: str, folder: str, **variables: str):
    asked = {"BASE_MODEL": base, "DATASET_NAME": "org/pictures", "OUTPUT_PATH": folder, **variables}
    return make_plan(read_settings(asked), read_manifest(None, None), CPU, now=NOW)


def adapted(denoiser, family, lora):
    """The model with the adapters that the plan wants, as `trainer.job.build` makes them."""
    model = copy.deepcopy(denoiser)
    fused = {} if lora.split_qkv else family.FACTS.fused_targets
    adapters.fuse_projections(family.blocks(model), fused=fused, targets=lora.targets)
    blocks = family.blocks(model)
    adapters.add_adapters(
        model, blocks, targets=lora.targets, fused=fused, rank=lora.rank, alpha=lora.alpha, seed=7, kind=lora.kind
    )
    return model


def modules_of(model, family, lora):
    """The modules of a file, as `trainer.job.saving` makes them."""
    facts = family.FACTS
    found = peft_bridge.from_peft_state(
        adapters.state(model), prefix=facts.lora_prefix, fused=facts.fused_targets, scale=lora.scale
    )
    if lora.kind == "dora":
        for name, norms in untrained_norms(model, family).items():
            empty = LoraWeights(norms.new_zeros(0, 1), norms.new_zeros(len(norms), 0), lora.scale, norms)
            found[f"{facts.lora_prefix}.{name}"] = empty
    return found


def header(lora, file, modules):
    """The lines of `metadata.lora_metadata` that a job goes on by."""
    return {
        "kiln_rank": json.dumps(lora.rank),
        "kiln_split_qkv": json.dumps(lora.split_qkv),
        "kiln_targets": json.dumps(lora.targets),
        "ss_network_dim": str(file.rank),
        key_names.UNTRAINED: json.dumps([name for name, weights in modules.items() if not weights.rank]),
    }


@pytest.fixture(scope="module")
def miniature():
    """The miniature of each family, loaded once."""
    loaded = {}

    def load(name):
        if name not in loaded:
            family = get_family(name)
            folder = Path(family.FACTS.models[f"mini-{name}"].source)
            loaded[name] = family.load_denoiser(folder, device="cpu", dtype=torch.float32)
        return loaded[name]

    return load


def output(model, family):
    """The denoiser's output for a fixed input."""
    torch.manual_seed(4)
    config = model.config
    width = config.get("joint_attention_dim") or config.cross_attention_dim
    pooled = config.get("pooled_projection_dim")
    if pooled is None:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    latents = torch.randn(1, 4 if config.in_channels == 4 else 16, 8, 8)
    text = {"tokens": torch.randn(1, 7, width), "pooled": torch.randn(1, pooled)}
    geometry = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])
    with torch.no_grad():
        return family.predict(model, latents, torch.tensor([0.5]), text=text, guidance=1.0, geometry_B6=geometry)


@st.composite
def requests(draw):
    """A family, and the settings of a job: any of its targets, of which some never learn anything."""
    name = draw(st.sampled_from(FAMILIES))
    known = [target for target in get_family(name).FACTS.targets if not target.startswith("attn2.") or name != "sd3"]
    targets = draw(st.lists(st.sampled_from(known), min_size=1, unique=True))
    idle = draw(st.lists(st.sampled_from(targets), unique=True))
    kind = draw(st.sampled_from(["lora", "rslora", "dora"]))
    variables = {
        "PARAMS_TARGET_MODULES": ",".join(targets),
        "PARAMS_NETWORK_DIM": str(draw(st.integers(1, 4))),
        "PARAMS_LORA_TYPE": kind,
    }
    if kind != "dora" or draw(st.booleans()):
        variables["PARAMS_SPLIT_QKV"] = draw(st.sampled_from(["true", "false"]))
    file_format = draw(st.sampled_from(["kohya", "peft"])), draw(st.sampled_from(["fp16", "bf16", "fp32"]))
    return name, variables, idle, file_format, draw(st.booleans())


@settings(max_examples=30)
@given(request_=requests())
def test_a_job_goes_on_from_its_own_file(miniature, request_):
    name, variables, idle, (key_format, save_precision), all_set = request_
    family = get_family(name)
    with tempfile.TemporaryDirectory() as folder:
        first = make(f"mini-{name}", folder, **variables).lora
        model = adapted(miniature(name), family, first)
        torch.manual_seed(3)
        for key, tensor in adapters.state(model).items():
            if ".lora_B." in key and not any(key.partition(".lora_B")[0].endswith(end) for end in idle):
                torch.nn.init.normal_(tensor, std=0.1)
        modules = modules_of(model, family, first)
        file = convert.to_file(modules, key_format, name, save_precision)
        path = Path(folder) / "x.safetensors"
        write_lora(path, file.tensors, header(first, file, modules) | file.header)

        again = variables if all_set else {"PARAMS_LORA_TYPE": variables["PARAMS_LORA_TYPE"]}
        second = make(f"mini-{name}", folder, PARAMS_RESUME_FROM=str(path), **again).lora
        assert (second.rank, set(second.targets)) == (first.rank, set(first.targets))
        resumed = adapted(miniature(name), family, second)
        state = peft_bridge.to_peft_state(
            convert.load(path, name),
            adapters.state(resumed),
            prefix=family.FACTS.lora_prefix,
            fused=family.FACTS.fused_targets,
            scale=second.scale,
        )
        adapters.load(resumed, state)
    before, after = adapters.state(model), adapters.state(resumed)
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    if save_precision == "fp32":
        torch.testing.assert_close(output(resumed, family), output(model, family), rtol=1e-4, atol=1e-5)
    else:  # and no larger or smaller than they were, which would change how fast they go on learning
        for key, tensor in before.items():
            torch.testing.assert_close(after[key], tensor, rtol=2**-7, atol=1e-2 * tensor.abs().max().item())


def test_layers_that_a_file_has_as_zeros_alone_get_no_adapter(miniature, tmp_path):
    """Of kohya's linear1, an attention-only file has zeros for the MLP; before the first step it is all zeros."""
    first = make("mini-flux", str(tmp_path), PARAMS_TARGET_MODULES="attn.to_q,attn.to_k,attn.to_v").lora
    family = get_family("flux")
    model = adapted(miniature("flux"), family, first)
    modules = modules_of(model, family, first)
    file = convert.to_file(modules, "kohya", "flux")
    for metadata in ({}, header(first, file, modules)):
        write_lora(tmp_path / "x.safetensors", file.tensors, metadata)
        asked = {
            "PARAMS_RESUME_FROM": str(tmp_path / "x.safetensors"),
            "PARAMS_TARGET_MODULES": ",".join(first.targets),
        }
        second = make("mini-flux", str(tmp_path), **asked).lora
        assert (second.rank, second.targets) == (32, first.targets)
    del asked["PARAMS_TARGET_MODULES"]
    assert make("mini-flux", str(tmp_path), **asked).lora == second


def test_a_file_that_another_tool_has_resized_is_read_by_its_tensors(miniature, tmp_path):
    """Such tools keep our lines of the header."""
    first = make("mini-sd3", str(tmp_path), PARAMS_NETWORK_DIM="4").lora
    family = get_family("sd3")
    model = adapted(miniature("sd3"), family, first)
    for key, tensor in adapters.state(model).items():
        if ".lora_B." in key:
            torch.nn.init.normal_(tensor)
    modules = modules_of(model, family, first)
    smaller = {}
    for name, weights in modules.items():
        smaller[name] = LoraWeights(weights.down[:2], weights.up[:, :2], weights.scale)
    file = convert.to_file(smaller, "kohya", "sd3")
    write_lora(tmp_path / "x.safetensors", file.tensors, header(first, file, modules))
    assert make("mini-sd3", str(tmp_path), PARAMS_RESUME_FROM=str(tmp_path / "x.safetensors")).lora.rank == 2
