"""Attention of one sequence without a cache, by the definition: for tests of the models alone."""

from __future__ import annotations

import torch
from torch import Tensor

from yalis.attention import AttentionLayer
from yalis.layers.functional import prepare_heads


def attend(
    layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """An AttentionStep. In float32 but for what goes in and out."""
    q, k = prepare_heads(q, k, cos, sin, layer.q_weight, layer.k_weight, layer.eps)
    k, v = (x.float().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) / q.shape[-1] ** 0.5
    places = torch.arange(len(q), device=q.device)
    distance = places.unsqueeze(1) - places
    is_hidden = (distance < 0) | (distance >= (layer.window or len(q)))
    weights = scores.masked_fill(is_hidden, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype).contiguous()
