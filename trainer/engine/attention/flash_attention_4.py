"""FlashAttention 4 in the place of torch's flash attention, where its package is installed.

Of Dao-AILab's flash-attn-4 these are the two entry points; on compute capability 9.0 it does what Shah et al. 2024
describe (arXiv:2407.08608), and both passes are faster than cuDNN's, which torch takes by itself: `pytest -m gpu -s
tests/gpu/test_attention.py` prints how much. torch has such a switch as well (`torch.nn.attention`), for a version of
that package whose functions return less, and without a way back to torch's own kernel for sizes that it does not take.
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

log = logging.getLogger(__name__)
MODULE = "flash_attn.cute.interface"
FORWARD = "_scaled_dot_product_flash_attention"
BACKWARD = f"{FORWARD}_backward"
DIMS, DTYPES = (64, 128), (torch.bfloat16, torch.float16)  # of heads: those of the published models
ALLOWED = 2e-2  # relative, to full precision: what bf16 loses is a fifth of it
# What the package raises where it cannot be loaded, cannot compile or cannot run, beside errors of its own.
PROBLEMS = (ImportError, OSError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, AssertionError)
INSTEAD = "torch's own attention is used."
_used: list[torch.library.Library] = []


def import_in_background() -> None:
    """Load the package beside whatever else a job begins with: it takes seconds."""
    threading.Thread(target=_module, name="flash", daemon=True).start()


def supports_model(denoiser: torch.nn.Module, dtype: torch.dtype, device: str) -> bool:
    """Whether a model has heads of a size that it takes, and computes right for them; if not right, the log says so."""
    parts: list[Any] = [m for m in denoiser.modules() if hasattr(m, "inner_dim") and hasattr(m, "heads")]
    sizes = {part.inner_dim // part.heads for part in parts}
    where = torch.empty(0, device=device).device  # with its number
    taken = sizes.intersection(DIMS) if dtype in DTYPES else ()
    return bool(taken) and _module() is not None and all(_is_right(dim, dtype, where, False) for dim in taken)


def set_enabled(wanted: bool) -> None:
    """Whether torch's flash attention is this one from now on, and is taken before cuDNN's. For the whole process."""
    if wanted == bool(_used):
        return
    if not wanted:
        _used.clear()  # torch's kernels are back when their library is gone
    elif _module() is not None:
        forward, backward = (torch.library.get_kernel(f"aten::{name}", "CUDA") for name in (FORWARD, BACKWARD))
        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that another kernel was there before
            library.impl(FORWARD, functools.partial(_forward, forward), "CUDA", with_keyset=True)
            library.impl(BACKWARD, functools.partial(_backward, backward), "CUDA", with_keyset=True)
        _used.append(library)
    torch.backends.cuda.enable_cudnn_sdp(not _used)


@functools.cache
def _module() -> Any:
    """The package, or None where it cannot be loaded."""
    warnings.filterwarnings("ignore", module=r"cutlass\.", category=UserWarning)  # of what it compiles
    try:
        return importlib.import_module(MODULE)
    except PROBLEMS as problem:
        log.warning("FlashAttention 4 cannot be loaded: torch's own attention is used. (%s)", problem)
        return None


def _forward(
    original: Any,
    keys: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """As torch's operator: q, k and v are (batch, heads, tokens, numbers), as is what is returned first."""
    if not _takes(q, k, v, causal=is_causal) or dropout_p or return_debug_mask:
        found: tuple[Any, ...] = original.call_boxed(
            keys, q, k, v, dropout_p, is_causal, return_debug_mask, scale=scale
        )
        return found
    out, lse_BHT = _attended(q, k, v, causal=is_causal, scale=scale)
    seeds = torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty((), dtype=torch.uint64, device=q.device)
    return out, lse_BHT, None, None, q.shape[2], k.shape[2], *seeds, q.new_empty(0)


def _backward(
    original: Any,
    keys: Any,
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse_BHT: torch.Tensor,
    *more: Any,
    scale: float | None = None,
) -> tuple[torch.Tensor, ...]:
    *_, dropout_p, is_causal, _seed, _offset = more
    if not _takes(q, k, v, causal=is_causal) or dropout_p:
        found: tuple[torch.Tensor, ...] = original.call_boxed(keys, g, q, k, v, out, lse_BHT, *more, scale=scale)
        return found
    return _gradients(g, q, k, v, out, lse_BHT, causal=is_causal, scale=scale)


def _takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> bool:
    same = q.shape[3] == k.shape[3] == v.shape[3] and q.shape[1] == k.shape[1] and min(q.numel(), k.numel()) > 0
    return same and q.shape[3] in DIMS and q.dtype in DTYPES and _is_right(q.shape[3], q.dtype, q.device, causal)


def _attended(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty_like(q)  # laid out as torch promises
    given = [t.transpose(1, 2) for t in (q, k, v)]
    how = {"softmax_scale": scale, "causal": causal}
    _, lse_BHT, *_ = _module()._flash_attn_fwd(*given, return_lse=True, out=out.transpose(1, 2), **how)
    return out, lse_BHT


def _gradients(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse_BHT: torch.Tensor,
    *,
    causal: bool,
    scale: float | None,
) -> tuple[torch.Tensor, ...]:
    found = tuple(torch.empty_like(t) for t in (q, k, v))
    given = [t.transpose(1, 2) for t in (q, k, v, out, g)]
    places = dict(zip(("dq", "dk", "dv"), (t.transpose(1, 2) for t in found), strict=True))
    how = {"softmax_scale": scale, "causal": causal, "deterministic": torch.are_deterministic_algorithms_enabled()}
    _module()._flash_attn_bwd(*given, lse_BHT.contiguous(), **how, **places)
    return found


@functools.cache
def _is_right(dim: int, dtype: torch.dtype, device: torch.device, causal: bool) -> bool:
    """Whether it computes here what plain torch does, with heads of `dim` numbers, for which it is compiled."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = (200, 200, 200, 200) if causal else (200, 328, 328, 200)
    q, k, v, g = (torch.randn(1, 2, n, dim, device=device, generator=generator).to(dtype) for n in sizes)
    try:
        out, lse = _attended(q, k, v, causal=causal, scale=None)
        found = out, *_gradients(g, q, k, v, out, lse, causal=causal, scale=None)
    except torch.OutOfMemoryError:  # says nothing about it, and whoever calls knows what to give up
        raise
    except _problems() as problem:
        log.warning("FlashAttention 4 does not run on this device: %s (%s)", INSTEAD, problem)
        return False
    wanted = reference_attention(q, k, v, g, causal=causal)
    off = max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True))
    if not off <= ALLOWED:
        log.warning("FlashAttention 4 is %.1e from what plain torch gives on this device: %s", off, INSTEAD)
    return off <= ALLOWED


def _problems() -> tuple[type[Exception], ...]:
    """Those, and its compiler's own, whose place another version may not have."""
    own = getattr(sys.modules.get("cutlass.base_dsl.common"), "DSLBaseError", None)
    return (own, *PROBLEMS) if own else PROBLEMS


def reference_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, *, causal: bool = False
) -> tuple[torch.Tensor, ...]:
    """Attention and the gradients of q, k and v for a gradient `g` of what it returns, in float64 and written out."""
    q, k, v, g = (t.double() for t in (q, k, v, g))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    weights = scores.softmax(-1)
    out = weights @ v
    by_score = weights * (g @ v.mT - (g * out).sum(-1, keepdim=True)) / math.sqrt(q.shape[-1])
    return out, by_score @ k, by_score.mT @ q, weights.mT @ g
