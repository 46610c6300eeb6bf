"""Every subset of a family's layers trains, in every weight format, and as diffusers with peft trains it."""

import copy
import functools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import save_file

from tests.support.variants import CLASSES, config
from trainer.engine import adapters
from trainer.engine.load import place_denoiser
from trainer.job.verify import verify
from trainer.lora_files import convert, peft_bridge
from trainer.sample import apply_loras
from trainer.spec.family import get_family
from trainer.spec.plan import LoraPlan

RANK, ALPHA = 3, 2.0
WIDE = {  # sides that are multiples of 16, as FP8 needs, where variants.NARROW has smaller ones
    "flux-dev": {"attention_head_dim": 16, "axes_dims_rope": (4, 4, 8), "num_layers": 2, "num_single_layers": 2},
    "sd3-medium": {"num_layers": 3},
    "sd3.5-medium": {"num_layers": 3, "dual_attention_layers": (0, 1)},
    "sdxl-base": {
        "block_out_channels": (16, 32, 64),
        "transformer_layers_per_block": (1, 1, 1),
        "cross_attention_dim": 32,
    },
}
# Weight format → type of activations, and the least cosine of the median gradient with that of full precision.
FORMATS = {
    "fp32": (torch.float32, 1.0),
    "bf16": (torch.bfloat16, 0.99),
    "fp16": (torch.float16, 0.99),
    "fp8": (torch.bfloat16, 0.97),
    "fp8-storage": (torch.bfloat16, 0.97),
    "int8": (torch.bfloat16, 0.97),
    "nf4": (torch.bfloat16, 0.8),
    "torchao": (torch.bfloat16, 0.97),
}
PUBLISHED = ("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0")  # by the most usual recipe for Flux.1


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """`loaded(base)`: a small model of random weights, as the product loads it."""

    @functools.cache
    def saved(base):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("model")
        place = folder / get_family(base.split("-")[0].split(".")[0]).FACTS.parts["denoiser"]
        CLASSES[base.split("-")[0].split(".")[0]](**{**config(base, narrow=True), **WIDE[base]}).save_pretrained(place)
        return folder

    def load(base):
        family = get_family(base.split("-")[0].split(".")[0])
        return family, family.load_denoiser(saved(base), device="cpu", dtype=torch.float32)

    return load


def gradients(family, denoiser, dtype):
    """The model's output for one batch, and a loss's gradients of what trains."""
    torch.manual_seed(3)
    options = denoiser.config
    width = options.get("joint_attention_dim") or options["cross_attention_dim"]
    pooled = options.get("pooled_projection_dim") or 20
    text = {"tokens": torch.randn(2, 6, width).to(dtype), "pooled": torch.randn(2, pooled).to(dtype)}
    channels = options["in_channels"] // (4 if family.FACTS.name == "flux" else 1)
    noisy, geometry = torch.randn(2, channels, 8, 8), torch.full((2, 6), 64.0)
    out = family.predict(denoiser, noisy, torch.tensor([0.6, 0.3]), text=text, guidance=1.0, geometry_B6=geometry)
    if torch.is_grad_enabled():
        (out.float().square().mean() * 64).backward()
    return out.detach(), {n: p.grad for n, p in denoiser.named_parameters() if p.grad is not None}


def adapted(loaded, base, *, targets, joined, kind, precision):
    """A model with adapters that are not zero, as a job places it."""
    family, denoiser = loaded(base)
    dtype = FORMATS[precision][0]
    options = {"fused": family.FACTS.fused_targets if joined else {}, "targets": targets}
    forwards = family.fused_forwards() if precision in ("fp8", "int8") else None
    columns = 0 if kind == "dora" or forwards is None else RANK
    blocks = family.blocks(denoiser)
    place_denoiser(
        denoiser, blocks, precision=precision, dtype=dtype, device="cpu", rank=columns, forwards=forwards, **options
    )
    adapters.add_adapters(denoiser, blocks, rank=RANK, alpha=ALPHA, seed=0, kind=kind, **options)
    torch.manual_seed(2)
    for name, p in denoiser.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    return family, denoiser


def by_parts(tensors, fused, *, summed):
    """Tensors of the adapters (peft's names) of layers that train as one → of those that they fuse.

    `summed`: parts share A, so the gradients of their As add up to that of A; these stay together.
    """
    split = {}
    for name, tensor in tensors.items():
        module, _, rest = name.partition(".lora_")
        names = peft_bridge.unfused_names(module, fused)
        pieces = [tensor] * len(names) if rest.startswith("A") else tensor.chunk(len(names))
        if summed and rest.startswith("A"):
            split[f"{names[0]}.lora_{rest}"] = tensor
            continue
        split.update({f"{n}.lora_{rest}": piece for n, piece in zip(names, pieces, strict=True)})
    return split


def reference(loaded, base, trained, *, fused, kind):
    """diffusers' own model with peft's own adapters of the same weights: its output and gradients."""
    family, denoiser = loaded(base)
    state = by_parts(adapters.state(trained), fused, summed=False)
    names = sorted({name.partition(".lora_")[0] for name in state})
    denoiser.add_adapter(
        LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=names, use_rslora=kind == "rslora", use_dora=kind == "dora"
        ),
        adapter_name="default",
    )
    adapters.load(denoiser, {name: tensor.clone() for name, tensor in state.items()})
    out, found = gradients(family, denoiser, torch.float32)
    joint = {}
    for name, gradient in found.items():
        module, _, rest = name.partition(".lora_")
        for fused_suffix, parts in fused.items():
            part = next((p for p in parts if f".{module}".endswith(f".{p}")), None)
            if part and rest.startswith("A") and f"{module.removesuffix(part)}{fused_suffix}" in modules_of(trained):
                name = f"{module.removesuffix(part)}{parts[0]}.lora_{rest}"
        joint[name] = joint[name] + gradient if name in joint else gradient
    return out, joint


def modules_of(trained):
    return {name.partition(".lora_")[0] for name in adapters.state(trained)}


def error(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(1e-30)).item()


def all_layers(family, denoiser):
    """The names of all linear layers of a model's blocks."""
    names = []
    for prefix, block in family.blocks(denoiser):
        names += [f"{prefix}.{n}" for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)]
    return names


@st.composite
def wishes(draw, of_base):
    """Targets of a model: whole names, ends of them, one kind of block, or the family's own, a few or many."""
    base = draw(st.sampled_from(sorted(WIDE)))
    names, suffixes = of_base(base)
    wild = sorted({".".join("*" if part.isdecimal() else part for part in name.split(".")) for name in names})
    choice = st.one_of(
        st.lists(st.sampled_from(suffixes), min_size=1, unique=True),
        st.lists(st.sampled_from(sorted(names)), min_size=1, max_size=4, unique=True),
        st.lists(st.sampled_from(wild), min_size=1, max_size=6, unique=True),
        st.lists(st.sampled_from(sorted({s.rpartition(".")[2] for s in suffixes})), min_size=1, max_size=2),
    )
    return base, tuple(draw(choice))


def check(loaded, tmp_path, base, targets, *, joined, kind, precision):
    family, trained = adapted(loaded, base, targets=targets, joined=joined, kind=kind, precision=precision)
    fused = family.FACTS.fused_targets if joined else {}
    dtype, least = FORMATS[precision]
    out, found = gradients(family, trained, dtype)
    found = by_parts({n.replace(".default", ""): g for n, g in found.items()}, fused, summed=True)
    wanted_out, wanted = reference(loaded, base, trained, fused=fused, kind=kind)
    wanted = {n.replace(".default", ""): g for n, g in wanted.items()}
    assert found.keys() == wanted.keys()
    if precision == "fp32":
        assert error(out, wanted_out) < 1e-5
        assert max(error(found[n], g) for n, g in wanted.items() if g.norm() > 1e-7) < 1e-3
    else:
        cosines = [torch.cosine_similarity(found[n].flatten().float(), g.flatten(), dim=0) for n, g in wanted.items()]
        assert sorted(cosines)[len(cosines) // 2] > least
    # The file has these layers and no others, and gives the trained model here and in diffusers.
    scale = LoraPlan(kind=kind, rank=RANK, alpha=ALPHA).scale
    prefix = family.FACTS.lora_prefix
    modules = peft_bridge.from_peft_state(adapters.state(trained), prefix=prefix, fused=fused, scale=scale)
    layers = {f"{prefix}.{n}" for n in all_layers(*loaded(base)) if adapters.is_target(n, targets)}
    assert modules.keys() == layers
    return family, trained, modules, wanted_out
