"""What each recompute policy keeps between forward and backward pass, in bytes and in operators, on the miniatures."""

import gc
from collections import Counter

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.miniatures import PIPELINES, family_of, folder, random_text
from trainer.engine import adapters
from trainer.engine.memory import checkpointing
from trainer.spec.strategies import POLICIES

# What attention is on a CPU. On an accelerator it is one of three others.
OF_A_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
PRODUCTS = ("addmm", "convolution", ATTENTION)
# Layers of FLUX.2 and Krea 2 have no bias. In 16 bits their products are `mm`, as an adapter's are, and no policy keeps
# them; FP8's are `fp8_product`, which the policy `products` keeps.
WITHOUT_BIAS = ("flux2", "flux2_dev", "krea2")
NORMS = ("native_layer_norm", "native_group_norm", "rsqrt")


class Watch(TorchDispatchMode):
    """Counts operators, and remembers every storage that they make without keeping it alive."""

    def __init__(self):
        super().__init__()
        self.count, self.made, self.sizes = Counter(), [], Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2].partition(".")[0]
        self.count[name] += 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made.append((StorageWeakRef(storage), storage.nbytes()))
                self.sizes[name] += storage.nbytes()
        return out

    def alive(self):
        gc.collect()
        return sum({ref.cdata: size for ref, size in self.made if not ref.expired()}.values())


def step(name, policy):
    """The bytes that are kept after a forward pass; the operators of it; those of the backward pass."""
    family = family_of(name)
    denoiser = family.load_denoiser(folder(name), device="cpu", dtype=torch.float32).requires_grad_(False)
    targets = family.FACTS.targets
    adapters.add_adapters(denoiser, family.blocks(denoiser), targets=targets, fused={}, rank=2, alpha=1.0, seed=1)
    regions = family.regions(denoiser)
    checkpointing.apply(regions, [policy] * len(regions), compiled=False)
    packed = ("flux", "flux2", "flux2_dev", "qwen_image", "krea2")
    width = 16 if name in packed else denoiser.config.in_channels
    torch.manual_seed(0)
    text = random_text(name, denoiser, 7)
    geometry = torch.tensor([[128.0, 128, 0, 0, 128, 128]])
    forward, backward = Watch(), Watch()
    with forward:
        noisy, t = torch.randn(1, width, 16, 16), torch.full((1,), 0.5)
        out = family.predict(denoiser, noisy, t, text=text, guidance=1.0, geometry_B6=geometry).square().mean()
    kept = forward.alive()
    with backward:
        out.backward()
    return kept, forward, backward.count


@pytest.fixture(scope="module")
def steps():
    with pytest.MonkeyPatch.context() as patch:
        for names in ("ATTENTION_OPERATORS", "PRODUCT_OPERATORS"):
            patch.setattr(checkpointing, names, getattr(checkpointing, names) | {OF_A_CPU})
        yield {(name, policy): step(name, policy) for name in PIPELINES for policy in POLICIES}


def test_attention_is_kept_whatever_computes_it_on_an_accelerator():
    kept = {operator.name() for operator in checkpointing.ATTENTION_OPERATORS}
    assert kept == {f"aten::_scaled_dot_product_{kind}_attention" for kind in ("flash", "efficient", "cudnn")}
    products = {operator.name() for operator in checkpointing.PRODUCT_OPERATORS} - kept
    assert products == {"kiln::fp8_product", "aten::addmm", "aten::_int_mm", "aten::convolution"}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_policy_computes_again_what_it_does_not_keep_and_nothing_else(name, steps):
    once = steps[name, "none"][1].count
    again = {policy: steps[name, policy][2] - steps[name, "none"][2] for policy in POLICIES}
    assert not any(again["none"].values()) and once[ATTENTION] > 0
    assert again["products"][ATTENTION] == again["attention"][ATTENTION] == 0
    assert again["products"]["addmm"] == again["products"]["convolution"] == 0
    assert again["attention"]["addmm"] == again["all"]["addmm"]
    assert (again["all"]["addmm"] > 0) == (name not in WITHOUT_BIAS)
    assert 0 < again["all"][ATTENTION] <= once[ATTENTION]
    for policy in ("products", "attention", "all"):
        assert sum(again[policy][norm] for norm in NORMS) > 0


@pytest.mark.parametrize("name", PIPELINES)
def test_a_policy_keeps_the_bytes_of_its_operators(name, steps):
    kept = {policy: steps[name, policy][0] for policy in POLICIES}
    assert kept["all"] < kept["attention"] <= kept["products"] < kept["none"]
    made = steps[name, "all"][1].sizes
    # The refiners of Z-Image, before its main blocks, run without gradients, and keep nothing.
    assert kept["attention"] - kept["all"] == pytest.approx(made[ATTENTION], rel=0.2 if name == "z_image" else 0.1)
    if name in WITHOUT_BIAS:
        assert kept["products"] == kept["attention"]
        return
    of_products = sum(made[product] for product in PRODUCTS)
    assert 0.5 * of_products < kept["products"] - kept["all"] <= of_products


@pytest.mark.parametrize("name", PIPELINES)
def test_the_model_of_memory_has_the_same_order_and_no_larger_steps(name, steps):
    """The published widths keep more in each policy relative to the inputs alone; the order is the same."""
    models = family_of(name).FACTS.models
    published = name.replace("_", "-")  # of a family with several, its first
    if published not in models:
        published = next(iter(models))
    saved = models[published].footprint.saved_gib
    order = sorted(POLICIES, key=lambda policy: steps[name, policy][0])
    assert sorted(POLICIES, key=lambda policy: saved[policy]) == order
