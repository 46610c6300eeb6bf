"""Activation checkpointing: what a region keeps for its backward pass, and what it recomputes (arXiv:1604.06174).

`POLICIES` maps each policy of `trainer.spec.strategies` to a forward pass, and `apply` installs it on each region. The
selective policies keep the outputs of some operators and recompute everything else, as torch's
`create_selective_checkpoint_contexts` does. Checkpoints are inside of what is compiled, so that the compiler plans both
passes at once.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import trainer.engine.quantization.frozen_linear  # noqa: F401  (registers torch.ops.kiln)
from trainer.spec import strategies

_ATTENTION_KERNELS = ("flash", "cudnn", "efficient")
ATTENTION_OPERATORS = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention").default for name in _ATTENTION_KERNELS
}
# Attention and matrix products: nearly all the time of a forward pass, and about half of its saved memory.
PRODUCT_OPERATORS = ATTENTION_OPERATORS | {
    torch.ops.kiln.fp8_product.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._int_mm.default,
    torch.ops.aten.convolution.default,
}

# No region draws random numbers, and the generator's state cannot be read during a CUDA graph capture.
CHECKPOINT_OPTIONS: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
# How often Dynamo may compile one function. All regions share their class's forward pass, with several sizes and
# policies each; after the default of 8, Dynamo would run them uncompiled.
RECOMPILE_LIMIT = 64


def _keep(kept: set[Any], _: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    """The policy function of a selective checkpoint: `kept` operators keep their outputs."""
    return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE


def _forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The region's own forward pass, after its streamed weights are on the device.

    `load_weights` is set by `trainer.engine.memory.weight_streaming`. It is called here as well because the backward
    pass recomputes through this function. Compiled code does not need it: it saves the weights as inputs, and
    `saved_tensors_hooks` bring them back.
    """
    if not torch.compiler.is_compiling() and "load_weights" in self.__dict__:
        with _disable_current_modes():  # a selective checkpoint would count these copies as part of the region
            self.__dict__["load_weights"]()
    return type(self).forward(self, *args, **kwargs)


def _checkpointed(self: torch.nn.Module, args: Any, kwargs: Any, contexts: Callable[[], Any] | None = None) -> Any:
    """The forward pass in a checkpoint that is left properly when the pass fails.

    Before version 2.13, torch leaves a checkpoint's hooks and modes in place until the generator that holds them is
    collected: what runs next, such as a step with less memory, would run inside of them. If another thread collects
    the generator, they stay for ever. So an error is caught inside of the checkpoint and raised again outside of it.
    """
    options = {**CHECKPOINT_OPTIONS, "context_fn": contexts} if contexts else CHECKPOINT_OPTIONS
    if torch.compiler.is_compiling():
        return checkpoint(_forward, self, *args, **options, **kwargs)
    problems: list[RuntimeError] = []
    begun = False

    def attempt(*args: Any, **kwargs: Any) -> Any:
        nonlocal begun
        if begun:  # this is the recomputation, whose errors the backward pass raises
            return _forward(self, *args, **kwargs)
        begun = True
        try:
            return _forward(self, *args, **kwargs)
        except RuntimeError as problem:
            problems.append(problem)
            return None

    output = checkpoint(attempt, *args, **options, **kwargs)
    if problems:
        raise problems.pop()
    return output


def _recompute_all(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return _checkpointed(self, args, kwargs)


def _recompute_all_but_attention(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    contexts = functools.partial(create_selective_checkpoint_contexts, functools.partial(_keep, ATTENTION_OPERATORS))
    return _checkpointed(self, args, kwargs, contexts)


def _recompute_all_but_products(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    contexts = functools.partial(create_selective_checkpoint_contexts, functools.partial(_keep, PRODUCT_OPERATORS))
    return _checkpointed(self, args, kwargs, contexts)


_FORWARDS: dict[str, Callable[..., Any] | None] = {
    "all": _recompute_all,
    "attention": _recompute_all_but_attention,
    "products": _recompute_all_but_products,
    "none": None,
}
# In the order of the table, from the least memory to the most. None: the region's own forward pass.
POLICIES = {policy: _FORWARDS[policy] for policy in strategies.POLICIES}


def apply(regions: Iterable[torch.nn.Module], policies: Sequence[str], *, compiled: bool) -> None:
    """Give each region its policy, and mark it for compilation if `compiled`.

    Each kind of region is compiled once for each policy, and once more when a second size comes: from then on sizes
    are dynamic, and a third size needs no compilation.
    """
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    for region, policy in zip(regions, policies, strict=True):
        region.__dict__.pop("forward", None)
        forward = POLICIES[policy]
        can_recompute_rope = getattr(region, "can_recompute_rope", None)
        # An uncompiled fused block keeps the inputs of its kernels, which is what a checkpoint of its products would
        # keep, and recomputes only the rotated queries and keys. It needs no checkpoint (docs/engine.md).
        recomputes_alone = (
            policy == "products" and not compiled and can_recompute_rope is not None and can_recompute_rope()
        )
        if can_recompute_rope is not None:
            region.__dict__["recompute_rope"] = recomputes_alone
        if forward is not None and not recomputes_alone:
            region.forward = types.MethodType(forward, region)
        region._compiled_call_impl = None
        if compiled:
            region.compile()
