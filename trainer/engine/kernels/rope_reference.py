"""Queries and keys before attention, in plain torch: RMSNorm by head, then the rotary embedding (arXiv 2104.09864).

The reference of `trainer.engine.kernels.rope_triton`, and what runs without Triton. Elements 2i and 2i + 1 of a head
are rotated as a pair by an angle that depends on the token's position. Values are not changed.

Letters: B images, T tokens, H heads, D features of a head. `qkv` is (B, T, 3HD): all heads of q, then of k, then of v.
"""

from __future__ import annotations

import torch


def rotate(
    first: torch.Tensor,
    weight_q: torch.Tensor,
    weight_k: torch.Tensor,
    second: torch.Tensor | None,
    second_q: torch.Tensor | None,
    second_k: torch.Tensor | None,
    cos_TD: torch.Tensor,
    sin_TD: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values, (B, T, H, D), of the tokens of `first` followed by those of `second`.

    first, second: qkv of two sources (text and image), or of one. The weights, (D,), are those of the norms of q and k
    for each source. Values are an empty tensor if there is no second source: they are where they were.
    """
    head_dim = len(weight_q)
    q, k, v = first.unflatten(2, (3, -1, head_dim)).unbind(2)
    q = _rms_norm(q, weight_q, eps)
    k = _rms_norm(k, weight_k, eps)
    if second is not None and second_q is not None and second_k is not None:
        q2, k2, v2 = second.unflatten(2, (3, -1, head_dim)).unbind(2)
        q = torch.cat([q, _rms_norm(q2, second_q, eps)], 1)
        k = torch.cat([k, _rms_norm(k2, second_k, eps)], 1)
        v = torch.cat([v, v2], 1)
    else:
        v = first.new_empty(0)
    cos = cos_TD[:, None].float()
    sin = sin_TD[:, None].float()
    q, k = (x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin for x in (q, k))
    return q.to(first.dtype), k.to(first.dtype), v


def rotate_gradient(
    qkv: torch.Tensor,
    weight_q: torch.Tensor,
    weight_k: torch.Tensor,
    cos_TD: torch.Tensor,
    sin_TD: torch.Tensor,
    gq: torch.Tensor,
    gk: torch.Tensor,
    gv: torch.Tensor,
    offset: int,
    eps: float,
) -> torch.Tensor:
    """The gradient of one source's qkv. gq, gk, gv: (B, T, H, D) of all tokens; the source's begin at `offset`."""
    tokens = slice(offset, offset + qkv.shape[1])
    cos = cos_TD[tokens, None].float()
    sin = sin_TD[tokens, None].float()
    gradients = []
    q, k, _ = qkv.float().unflatten(2, (3, -1, len(weight_q))).unbind(2)
    for x, weight, g_all in ((q, weight_q, gq), (k, weight_k, gk)):
        g = g_all[:, tokens].float()
        times_sin = g * sin
        g = g * cos + torch.stack([times_sin[..., 1::2], -times_sin[..., ::2]], -1).flatten(-2)
        rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        g = g * weight.float()
        x_hat = x * rstd
        gradients.append(rstd * (g - x_hat * (g * x_hat).mean(-1, keepdim=True)))
    return torch.stack([*gradients, gv[:, tokens].float()], 2).flatten(2).to(qkv.dtype)


def _rms_norm(x_BTHD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    x = x_BTHD.float()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight_D.float()


def rotate_heads(x_BTF: torch.Tensor, weight_D: torch.Tensor, turns_BTR2: torch.Tensor, eps: float) -> torch.Tensor:
    """The queries or the keys of one projection, normalised by head and rotated: (B, T, H, D).

    For models whose q, k and v are separate layers, and whose angles differ from image to image. F = H D features.
    turns: cosine and sine for each of the R = D / 2 pairs of a token, in fp32; (1, T, R, 2) if all images share them,
    (1, 1, R, 2) if all tokens do.
    """
    x = _rms_norm(x_BTF.unflatten(2, (-1, len(weight_D))), weight_D, eps)
    return _turned(x, turns_BTR2).to(x_BTF.dtype)


def rotate_heads_gradient(
    x_BTF: torch.Tensor, weight_D: torch.Tensor, turns_BTR2: torch.Tensor, g_BTHD: torch.Tensor, eps: float
) -> torch.Tensor:
    """The gradient of x (B, T, F) from that of `rotate_heads`' result. The norm's weight is frozen and gets none."""
    cos, sin = turns_BTR2.unbind(-1)
    g = _turned(g_BTHD.float(), torch.stack([cos, -sin], -1)) * weight_D.float()
    x = x_BTF.float().unflatten(2, (-1, len(weight_D)))
    rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    x_hat = x * rstd
    g = rstd * (g - x_hat * (g * x_hat).mean(-1, keepdim=True))
    return g.flatten(2).to(x_BTF.dtype)


def _turned(x_BTHD: torch.Tensor, turns_BTR2: torch.Tensor) -> torch.Tensor:
    """Each pair of features as a point that is rotated: (a, b) -> (a cos - b sin, b cos + a sin)."""
    a, b = x_BTHD.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turns_BTR2[:, :, None].unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
