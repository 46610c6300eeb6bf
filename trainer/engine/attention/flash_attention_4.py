"""FlashAttention 4 in place of torch's flash attention, if its package is installed.

`set_enabled` registers kernels for torch's two operators, which call the package's two entry points (Dao-AILab's
flash-attn-4). On compute capability 9.0 these are the algorithm of Shah et al. 2024 (arXiv:2407.08608), and both passes
are faster than cuDNN's, torch's default: `pytest -m gpu -s tests/gpu/test_attention.py` prints both. torch has such a
switch as well (`torch.nn.attention`), but for a version of the package whose functions return less, and without a way
back to torch's own kernel for sizes that the package does not take.

Letters: B batch, H heads, T tokens of the queries, S tokens of keys and values, D numbers of a head. torch's operators
have (B, H, T, D), the package (B, T, H, D).
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
import sys
import threading
import warnings
from typing import Any

import torch
from torch.nn.attention import SDPBackend

log = logging.getLogger(__name__)
MODULE = "flash_attn.cute.interface"
FORWARD = "_scaled_dot_product_flash_attention"
BACKWARD = f"{FORWARD}_backward"
HEAD_DIMS = (64, 128)  # those of the published models
DTYPES = (torch.bfloat16, torch.float16)
MAX_ERROR = 2e-2  # relative to full precision; the rounding of bf16 is a fifth of it
# What the package raises if it cannot be loaded, compiled or run, besides the errors of its own compiler.
PROBLEMS = (ImportError, OSError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, AssertionError)
INSTEAD = "torch's own attention is used."
# While it is enabled, one library, whose kernels stay registered while it lives; and torch's own order of kernels.
_registered: list[tuple[torch.library.Library, list[int]]] = []


def import_in_background() -> None:
    """Import the package, which takes seconds, while the job does something else."""
    threading.Thread(target=_module, name="flash", daemon=True).start()


def supports_model(denoiser: torch.nn.Module, dtype: torch.dtype, device: str) -> bool:
    """Whether the model has heads of a supported size, and the results for these are right on this device."""
    if dtype not in DTYPES:
        return False
    head_dims: set[int] = set()
    for module in denoiser.modules():
        attention: Any = module
        if hasattr(attention, "inner_dim") and hasattr(attention, "heads"):  # diffusers' attention
            head_dims.add(attention.inner_dim // attention.heads)
        elif hasattr(attention, "num_heads") and hasattr(attention, "head_dim"):  # a class of one model's own
            head_dims.add(attention.head_dim)
    supported = head_dims.intersection(HEAD_DIMS)
    if not supported or _module() is None:
        return False
    indexed_device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", as tensors have it
    return all(_is_correct(dim, dtype, indexed_device, False) for dim in supported)


def set_enabled(wanted: bool) -> None:
    """Replace torch's flash attention by this one and prefer it to all others, or undo that. For the whole process.

    The others keep their order among themselves: what flash attention cannot compute, such as a mask, goes to the
    kernel that it goes to without this one.
    """
    if wanted == bool(_registered):
        return
    if not wanted:
        _library, order = _registered.pop()  # torch's own kernels are back when the library is gone
        torch._C._set_sdp_priority_order(order)
    elif _module() is not None:
        forward = torch.library.get_kernel(f"aten::{FORWARD}", "CUDA")
        backward = torch.library.get_kernel(f"aten::{BACKWARD}", "CUDA")
        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that another kernel was registered before
            library.impl(FORWARD, functools.partial(_forward, forward), "CUDA", with_keyset=True)
            library.impl(BACKWARD, functools.partial(_backward, backward), "CUDA", with_keyset=True)
        order = _order()
        _registered.append((library, order))
        flash = int(SDPBackend.FLASH_ATTENTION)  # type: ignore[call-overload]  # it is one, for its stubs not
        torch._C._set_sdp_priority_order([flash, *(kernel for kernel in order if kernel != flash)])


def _order() -> list[int]:
    """The kernels of attention, as numbers of `SDPBackend`, in the order in which torch asks whether they can compute.

    torch puts cuDNN's first on some cards, when it chooses for the first time: so it has to choose once before.
    """
    if torch.cuda.is_available():
        some = torch.empty(1, 1, 64, 64, device="cuda", dtype=torch.bfloat16)
        torch._fused_sdp_choice(some, some, some)
    order: list[int] = torch._C._get_sdp_priority_order()
    return order


@functools.cache
def _module() -> Any:
    """The package, or None if it cannot be loaded."""
    warnings.filterwarnings("ignore", module=r"cutlass\.", category=UserWarning)  # about the code that it compiles
    try:
        return importlib.import_module(MODULE)
    except PROBLEMS as problem:
        log.warning("FlashAttention 4 cannot be loaded: torch's own attention is used. (%s)", problem)
        return None


def _forward(
    original: Any,
    dispatch_keys: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """torch's operator. q: (B, H, T, D); k and v: (B, H, S, D); the first result is shaped like q.

    The others are what the backward operator and the compiler expect: log-sum-exp of the scores, (B, H, T), in fp32; no
    offsets of sequences; lengths; the state of random numbers, which only dropout uses; no debug mask.
    """
    if not _supports(q, k, v, causal=is_causal) or dropout_p or return_debug_mask:
        results: tuple[Any, ...] = original.call_boxed(
            dispatch_keys, q, k, v, dropout_p, is_causal, return_debug_mask, scale=scale
        )
        return results
    out, lse_BHT = _attention(q, k, v, causal=is_causal, scale=scale)
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)
    offset = torch.empty((), dtype=torch.uint64, device=q.device)
    return out, lse_BHT, None, None, q.shape[2], k.shape[2], seed, offset, q.new_empty(0)


def _backward(
    original: Any,
    dispatch_keys: Any,
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse_BHT: torch.Tensor,
    *others: Any,
    scale: float | None = None,
) -> tuple[torch.Tensor, ...]:
    """torch's operator: the gradients of q, k and v. `grad`: of `out`."""
    *_, dropout_p, is_causal, _seed, _offset = others
    if not _supports(q, k, v, causal=is_causal) or dropout_p:
        results: tuple[torch.Tensor, ...] = original.call_boxed(
            dispatch_keys, grad, q, k, v, out, lse_BHT, *others, scale=scale
        )
        return results
    return _gradients(grad, q, k, v, out, lse_BHT, causal=is_causal, scale=scale)


def _supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> bool:
    """Whether this call goes to FlashAttention 4; others go to torch's own kernel."""
    head_dim = q.shape[3]
    one_head_dim = head_dim == k.shape[3] == v.shape[3]
    as_many_heads = q.shape[1] == k.shape[1]
    is_empty = min(q.numel(), k.numel()) == 0
    if not one_head_dim or not as_many_heads or is_empty or head_dim not in HEAD_DIMS or q.dtype not in DTYPES:
        return False
    return _is_correct(head_dim, q.dtype, q.device, causal)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, laid out like q as torch's operator promises, and the log-sum-exp of the scores, (B, H, T)."""
    out = torch.empty_like(q)
    _, lse_BHT, *_ = _module()._flash_attn_fwd(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        return_lse=True,
        out=out.transpose(1, 2),
        softmax_scale=scale,
        causal=causal,
    )
    return out, lse_BHT


def _gradients(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse_BHT: torch.Tensor,
    *,
    causal: bool,
    scale: float | None,
) -> tuple[torch.Tensor, ...]:
    """The gradients of q, k and v, each laid out like what it belongs to."""
    dq = torch.empty_like(q)
    dk = torch.empty_like(k)
    dv = torch.empty_like(v)
    _module()._flash_attn_bwd(
        *(tensor.transpose(1, 2) for tensor in (q, k, v, out, grad)),
        lse_BHT.contiguous(),
        softmax_scale=scale,
        causal=causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        dq=dq.transpose(1, 2),
        dk=dk.transpose(1, 2),
        dv=dv.transpose(1, 2),
    )
    return dq, dk, dv


@functools.cache
def _is_correct(dim: int, dtype: torch.dtype, device: torch.device, causal: bool) -> bool:
    """Whether both passes give what plain torch gives, for heads of `dim` numbers. Compiles the kernels for them."""
    generator = torch.Generator(device).manual_seed(0)
    # Tokens of q, k, v and the gradient: no multiples of the blocks of 64 or 128 tokens that kernels work on.
    tokens = (200, 200, 200, 200) if causal else (200, 328, 328, 200)
    q, k, v, grad = (torch.randn(1, 2, n, dim, device=device, generator=generator).to(dtype) for n in tokens)
    try:
        out, lse = _attention(q, k, v, causal=causal, scale=None)
        results = (out, *_gradients(grad, q, k, v, out, lse, causal=causal, scale=None))
    except torch.OutOfMemoryError:  # says nothing about the kernels; the engine steps down and calls again
        raise
    except _problems() as problem:
        log.warning("FlashAttention 4 does not run on this device: %s (%s)", INSTEAD, problem)
        return False
    errors: list[float] = []
    for result, reference in zip(results, reference_attention(q, k, v, grad, causal=causal), strict=True):
        errors.append(((result.double() - reference).norm() / reference.norm()).item())
    error = max(errors)
    if not error <= MAX_ERROR:  # also if it is NaN
        log.warning("FlashAttention 4 is %.1e from what plain torch gives on this device: %s", error, INSTEAD)
    return error <= MAX_ERROR


def _problems() -> tuple[type[Exception], ...]:
    """PROBLEMS, and the base class of the package's compiler, which another version may have elsewhere."""
    compiler_error = getattr(sys.modules.get("cutlass.base_dsl.common"), "DSLBaseError", None)
    return (compiler_error, *PROBLEMS) if compiler_error else PROBLEMS


def reference_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor, *, causal: bool = False
) -> tuple[torch.Tensor, ...]:
    """Attention and the gradients of q, k and v for the output's gradient `grad`, written out in float64."""
    q, k, v, grad = (tensor.double() for tensor in (q, k, v, grad))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    weights = scores.softmax(-1)
    out = weights @ v
    grad_scores = weights * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) / math.sqrt(q.shape[-1])
    return out, grad_scores @ k, grad_scores.mT @ q, weights.mT @ grad
