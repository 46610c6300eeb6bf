"""What a block keeps for its backward pass, and what it computes again."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import trainer.engine.quantization.frozen_linear  # noqa: F401  (its operators)

_ATTENTION = ("flash", "cudnn", "efficient")
KEPT = {getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention").default for name in _ATTENTION}

PRODUCTS = KEPT | {
    torch.ops.kiln.fp8_product.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._int_mm.default,
    torch.ops.aten.convolution.default,
}

# No block draws random numbers, and their generator's state cannot be read while a step is recorded.
HOW: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}


def _keep(kept: set[Any], _: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE


def _forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward pass, with its weights where they must be (`trainer.engine.memory.weight_streaming`); what is
    compiled takes them saved."""
    if not torch.compiler.is_compiling() and "load" in self.__dict__:
        with _disable_current_modes():  # its copies are none of what is recomputed
            self.__dict__["load"]()
    return type(self).forward(self, *args, **kwargs)


def _checkpointed(self: torch.nn.Module, args: Any, kwargs: Any, contexts: Callable[[], Any] | None = None) -> Any:
    """The forward pass in a checkpoint, which is left where it fails as well.

    Before version 2.13 torch leaves its hooks and modes in place until the generator that holds them is collected: what
    comes next, as a step with less memory, would run inside; and if another thread collects it, all that follows.
    """
    how = {**HOW, "context_fn": contexts} if contexts else HOW
    if torch.compiler.is_compiling():
        return checkpoint(_forward, self, *args, **how, **kwargs)
    problems: list[RuntimeError] = []
    begun = False

    def attempt(*args: Any, **kwargs: Any) -> Any:
        nonlocal begun
        if begun:  # it is recomputed
            return _forward(self, *args, **kwargs)
        begun = True
        try:
            return _forward(self, *args, **kwargs)
        except RuntimeError as problem:
            problems.append(problem)
            return None

    found = checkpoint(attempt, *args, **how, **kwargs)
    if problems:
        raise problems.pop()
    return found


def _recompute_all(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return _checkpointed(self, args, kwargs)


def _recompute_but_attention(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    contexts = functools.partial(create_selective_checkpoint_contexts, functools.partial(_keep, KEPT))
    return _checkpointed(self, args, kwargs, contexts)


def _recompute_but_products(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    contexts = functools.partial(create_selective_checkpoint_contexts, functools.partial(_keep, PRODUCTS))
    return _checkpointed(self, args, kwargs, contexts)


# From least memory to most. Checkpoints are inside what is compiled: the compiler then plans both passes at once.
POLICIES: dict[str, Callable[..., Any] | None] = {
    "all": _recompute_all,
    "attention": _recompute_but_attention,
    "products": _recompute_but_products,
    "none": None,
}


def apply(regions: Iterable[torch.nn.Module], policies: Sequence[str], *, compiled: bool) -> None:
    """Give each region its policy; compile it: once for each kind of region and policy, and once more for other sizes.

    That second time makes sizes free, so that no third size needs another.
    """
    # The default, 8, is for one function called in one way; past it, what is called is not compiled at all.
    torch._dynamo.config.recompile_limit = 64
    for region, policy in zip(regions, policies, strict=True):
        region.__dict__.pop("forward", None)
        forward, can_recompute_rope = POLICIES[policy], getattr(region, "can_recompute_rope", None)
        # A block of ours keeps what a checkpoint of its products would, and need not run again to make the rest.
        itself = policy == "products" and not compiled and can_recompute_rope is not None and can_recompute_rope()
        if can_recompute_rope is not None:
            region.__dict__["recompute_rope"] = itself
        if forward is not None and not itself:
            region.forward = types.MethodType(forward, region)
        region._compiled_call_impl = None
        if compiled:
            region.compile()
