"""Every subset of a family's layers trains, in every weight format, and as diffusers with peft trains it."""

import dataclasses
import functools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file

from tests.support.miniatures import PIPELINES
from tests.support.variants import CLASSES, VARIANTS, config
from trainer.engine import adapters
from trainer.engine.load import place_denoiser
from trainer.job.build import untrained_norms
from trainer.job.run import run
from trainer.lora_files import convert, key_names, peft_bridge
from trainer.lora_files.weights import LoraWeights
from trainer.sample import apply_loras
from trainer.spec.errors import SettingsError
from trainer.spec.family import get_family
from trainer.spec.plan import LoraPlan
from trainer.spec.targets import is_target
from trainer.training.stop_flag import StopFlag

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
FLUX2 = {"attention_head_dim": 16, "axes_dims_rope": (4, 4, 4, 4), "num_layers": 2, "num_single_layers": 2}
SMALL = {**WIDE, "flux2-klein-4b": FLUX2}
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
_PAIR = ("lora_A.weight", "lora_B.weight")
TENSORS = {"lora": _PAIR, "rslora": _PAIR, "dora": (*_PAIR, "lora_magnitude_vector")}  # of a layer, by peft's names
PUBLISHED = ("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0")  # by the most usual recipe for Flux.1


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """`loaded(base)`: a small model of random weights, as the product loads it."""

    @functools.cache
    def saved(base):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("model")
        place = folder / get_family(VARIANTS[base][0]).FACTS.parts["denoiser"]
        CLASSES[VARIANTS[base][0]](**{**config(base, narrow=True), **SMALL[base]}).save_pretrained(place)
        return folder

    def load(base):
        family = get_family(VARIANTS[base][0])
        return family, family.load_denoiser(saved(base), device="cpu", dtype=torch.float32)

    return load


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module", autouse=True)
def roomy_weights():
    """These narrow layers get adapter columns as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.spec.adapter_columns.MIN_SIDE_PER_COLUMN", 0)
        yield


def gradients(family, denoiser, dtype):
    """The model's output for one batch, and a loss's gradients of what trains."""
    torch.manual_seed(3)
    options = denoiser.config
    width = options.get("joint_attention_dim") or options["cross_attention_dim"]
    pooled = options.get("pooled_projection_dim") or 20
    text = {"tokens": torch.randn(2, 6, width).to(dtype), "pooled": torch.randn(2, pooled).to(dtype)}
    channels = options["in_channels"] // (4 if family.FACTS.name in ("flux", "flux2") else 1)
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
def wishes(draw):
    """A base, and the numbers that choose targets among its layers: how they are named, and which of them."""
    return (
        draw(st.sampled_from(sorted(WIDE))),
        draw(st.sampled_from(["suffixes", "names", "blocks", "leaves"])),
        draw(st.lists(st.integers(0, 10_000), min_size=1, max_size=6)),
    )


def targets_of(family, denoiser, way, numbers):
    """Ends of names, whole names, one kind of block (`blocks.*.attn.to_q`), or last parts alone."""
    names = all_layers(family, denoiser)
    pools = {
        "suffixes": [*family.FACTS.targets, *(t for t in ("norm1.linear", "norm.linear") if is_any(names, t))],
        "names": names,
        "blocks": sorted({".".join("*" if part.isdecimal() else part for part in name.split(".")) for name in names}),
        "leaves": sorted({name.rpartition(".")[2] for name in names}),
    }
    pool = [target for target in pools[way] if is_any(names, target)]
    return tuple(dict.fromkeys(pool[number % len(pool)] for number in numbers))


def is_any(names, target):
    return any(is_target(name, (target,)) for name in names)


def check_gradients(loaded, base, targets, *, joined, kind, precision):
    """Output and gradients are those of diffusers and peft, on exactly the layers that were asked for."""
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
        # In SD3's last block, the text's queries change nothing: their gradients are zero.
        assert all(error(found[n], g) < 1e-3 for n, g in wanted.items() if g.norm() > 1e-6)
    else:
        pairs = [(found[n].flatten().float(), g.flatten()) for n, g in wanted.items() if g.norm() > 1e-6]
        cosines = sorted(torch.cosine_similarity(*pair, dim=0).item() for pair in pairs)
        assert not cosines or cosines[len(cosines) // 2] > least
    layers = {name for name in all_layers(*loaded(base)) if is_target(name, targets)}
    assert set(by_parts(adapters.state(trained), fused, summed=False)) == {
        f"{name}.{tensor}" for name in layers for tensor in TENSORS[kind]
    }
    return family, trained, fused


def check_files(loaded, folder, base, trained, *, fused, kind):
    """The files have these layers and no others, and are the trained model in our own reader and in diffusers."""
    family, ours = loaded(base)
    facts, prefix = family.FACTS, family.FACTS.lora_prefix
    scale = LoraPlan(kind=kind, rank=RANK, alpha=ALPHA).scale
    modules = peft_bridge.from_peft_state(adapters.state(trained), prefix=prefix, fused=fused, scale=scale)
    layers = set(modules)
    header = {}
    if kind == "dora":
        for name, norms in untrained_norms(trained, family).items():
            modules[f"{prefix}.{name}"] = LoraWeights(torch.zeros(0, 1), torch.zeros(len(norms), 0), scale, norms)
        header = {key_names.UNTRAINED: json.dumps([n for n, w in modules.items() if not w.rank])}
    with torch.no_grad():
        wanted, _ = gradients(family, trained, torch.float32)
    for key_format in ("kohya", "peft"):
        save_file(
            convert.to_file(modules, key_format, facts.name).tensors, folder / f"{key_format}.safetensors", header
        )
    kohya = convert.load(folder / "kohya.safetensors", facts.name)
    assert kohya.keys() == layers
    apply_loras(ours, [(kohya, 1.0)], component=prefix)
    pipe = PIPELINES[facts.name](
        **dict.fromkeys(PIPELINES[facts.name]._get_signature_keys(PIPELINES[facts.name])[0]) | {prefix: loaded(base)[1]}
    )
    pipe.load_lora_weights(folder / "peft.safetensors")
    theirs = getattr(pipe, prefix)
    with torch.no_grad():
        assert error(gradients(family, ours, torch.float32)[0], wanted) < 1e-4
        assert error(gradients(family, theirs, torch.float32)[0], wanted) < 1e-4
    in_diffusers = {n for n, m in theirs.named_modules() if isinstance(m, BaseTunerLayer)}
    assert {f"{prefix}.{n}" for n in in_diffusers} == layers


def check(loaded, folder, wish, **options):
    base, way, numbers = wish
    targets = targets_of(*loaded(base), way, numbers)
    _, trained, fused = check_gradients(loaded, base, targets, **options)
    if options["precision"] == "fp32":
        check_files(loaded, folder, base, trained, fused=fused, kind=options["kind"])


OPTIONS = {
    "wish": wishes(),
    "joined": st.booleans(),
    "kind": st.sampled_from(["lora", "rslora", "dora"]),
    "precision": st.sampled_from(["fp32", "fp32", *FORMATS]),
}


@settings(max_examples=30)
@given(**OPTIONS)
def test_any_subset_trains_as_diffusers_with_peft_trains_it(loaded, folder, wish, joined, kind, precision):
    check(loaded, folder, wish, joined=joined, kind=kind, precision=precision)


@pytest.mark.slow
@settings(max_examples=400)
@given(**OPTIONS)
def test_any_of_many_subsets_trains_as_diffusers_with_peft_trains_it(loaded, folder, wish, joined, kind, precision):
    check(loaded, folder, wish, joined=joined, kind=kind, precision=precision)


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("targets", [PUBLISHED, ("attn.add_q_proj", "add_k_proj", "add_v_proj"), ("attn.to_q",)])
@pytest.mark.parametrize("base", ["flux-dev", "flux2-klein-4b"])
def test_image_or_text_alone_may_have_joined_projections(base, targets, precision, loaded):
    check_gradients(loaded, base, targets, joined=True, kind="lora", precision=precision)


def test_the_default_targets_run_diffusers_own_attention(loaded, monkeypatch):
    family, trained = adapted(
        loaded, "flux-dev", targets=get_family("flux").FACTS.targets, joined=True, kind="lora", precision="fp32"
    )
    monkeypatch.setattr("trainer.families.fused_blocks.flux.joint_attention", None)
    gradients(family, trained, torch.float32)


def test_a_block_that_a_model_lacks_is_refused_before_anything_is_encoded(job_plan, tmp_path):
    plan = job_plan("flux")
    lora = dataclasses.replace(plan.lora, targets=("attn.to_q", "transformer_blocks.7.attn.to_q"))
    with pytest.raises(SettingsError, match=r"transformer_blocks\.7\.attn\.to_q matches no layer .* similar are"):
        run(dataclasses.replace(plan, lora=lora), StopFlag())
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
