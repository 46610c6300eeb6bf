"""What is done to queries and keys before attention, in plain torch: the reference of
`trainer.engine.kernels.rope_triton`.

Each head's RMSNorm, and then each pair of its numbers turned by an angle of its token's place. `qkv`: (B, T, 3HD).
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
    """Queries and keys, (B, T, H, D), of the tokens of `first` and then `second`; and values, if there is a second."""
    q, k, v = first.unflatten(2, (3, -1, len(weight_q))).unbind(2)
    q, k = _normed(q, weight_q, eps), _normed(k, weight_k, eps)
    if second is not None and second_q is not None and second_k is not None:
        more_q, more_k, more_v = second.unflatten(2, (3, -1, len(weight_q))).unbind(2)
        q, k = torch.cat([q, _normed(more_q, second_q, eps)], 1), torch.cat([k, _normed(more_k, second_k, eps)], 1)
        v = torch.cat([v, more_v], 1)
    else:
        v = first.new_empty(0)
    cos, sin = cos_TD[:, None].float(), sin_TD[:, None].float()
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
    """The gradient of one of the sources, which begins at the token `offset`."""
    length = qkv.shape[1]
    cos, sin = (t[offset : offset + length, None].float() for t in (cos_TD, sin_TD))
    found = []
    q, k, _ = qkv.float().unflatten(2, (3, -1, len(weight_q))).unbind(2)
    for x, weight, g_joined in ((q, weight_q, gq), (k, weight_k, gk)):
        g = g_joined[:, offset : offset + length].float()
        turned = g * sin
        g = g * cos + torch.stack([turned[..., 1::2], -turned[..., ::2]], -1).flatten(-2)
        rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        g, hat = g * weight.float(), x * rstd
        found.append(rstd * (g - hat * (g * hat).mean(-1, keepdim=True)))
    return torch.stack([*found, gv[:, offset : offset + length].float()], 2).flatten(2).to(qkv.dtype)


def _normed(x_BTHD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    x = x_BTHD.float()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight_D.float()
