# SPDX-License-Identifier: Apache-2.0
"""Llama 2, 3 and 3.x, one rank's part of it. Tokens of all sequences lie end to end: `[num_tokens, hidden]`.

The attributes bear the checkpoint's names, so a module's path is its tensors' path.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from yalis.attention import AttentionStep
from yalis.config import ModelConfig
from yalis.layers.linear import ColumnLinear, Piece, RowLinear
from yalis.layers.norm import RMSNorm
from yalis.layers.rotary import Rotary, rotate
from yalis.layers.vocabulary import VocabularyEmbedding, VocabularyHead
from yalis.parallel.group import Placement
from yalis.parallel.split import even_split, kv_head_split


class LlamaAttention(nn.Module):
    def __init__(self, config: ModelConfig, layer_idx: int, at: Placement) -> None:
        super().__init__()
        dim, bias = config.head_dim, config.attention_bias
        num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        q = _head_rows(even_split(num_heads, at.tp.size, at.tp.rank), dim)
        kv = _head_rows(kv_head_split(num_kv_heads, at.tp.size, at.tp.rank), dim)
        self._layer_idx, self._head_dim = layer_idx, dim
        self.qkv_proj = ColumnLinear(
            config.hidden_size,
            [
                Piece("q_proj", num_heads * dim, q),
                Piece("k_proj", num_kv_heads * dim, kv),
                Piece("v_proj", num_kv_heads * dim, kv),
            ],
            bias,
            at,
        )
        self.o_proj = RowLinear(num_heads * dim, q, config.hidden_size, bias, at)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: AttentionStep) -> Tensor:
        num_tokens = x.shape[0]
        heads = self.qkv_proj(x).view(num_tokens, -1, self._head_dim)
        q, k, v = heads.split([size // self._head_dim for size in self.qkv_proj.sizes], dim=1)
        out = attend(self._layer_idx, rotate(q, cos, sin), rotate(k, cos, sin), v)
        y: Tensor = self.o_proj(out.view(num_tokens, -1))
        return y


class LlamaMLP(nn.Module):
    def __init__(self, config: ModelConfig, at: Placement) -> None:
        super().__init__()
        size, hidden, bias = config.intermediate_size, config.hidden_size, config.mlp_bias
        mine = even_split(size, at.tp.size, at.tp.rank)
        pieces = [Piece("gate_proj", size, mine), Piece("up_proj", size, mine)]
        self.gate_up_proj = ColumnLinear(hidden, pieces, bias, at)
        self.down_proj = RowLinear(size, mine, hidden, bias, at)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        y: Tensor = self.down_proj(F.silu(gate) * up)
        return y


class LlamaLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer_idx: int, at: Placement) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps, at)
        self.self_attn = LlamaAttention(config, layer_idx, at)
        self.post_attention_layernorm = RMSNorm(size, eps, at)
        self.mlp = LlamaMLP(config, at)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: AttentionStep) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        y: Tensor = self.mlp(self.post_attention_layernorm(x))
        return x + y


class LlamaModel(nn.Module):
    def __init__(self, config: ModelConfig, at: Placement) -> None:
        super().__init__()
        self.embed_tokens = VocabularyEmbedding(config.vocab_size, config.hidden_size, at)
        self.layers = nn.ModuleList(
            LlamaLayer(config, idx, at) for idx in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, at)
        self._rotary = Rotary(config.rope, config.head_dim, at.device)

    def forward(self, token_ids: Tensor, positions: Tensor, attend: AttentionStep) -> Tensor:
        x = self.embed_tokens(token_ids)
        cos, sin = self._rotary(positions, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, attend)
        y: Tensor = self.norm(x)
        return y


class LlamaForCausalLM(nn.Module):
    """`forward`: `[num_tokens]` ids and positions to `[num_tokens, hidden]`; `compute_logits`: some of
    those rows to `[n, vocab_size]`, on rank 0. Both collective.
    """

    def __init__(self, config: ModelConfig, at: Placement) -> None:
        super().__init__()
        self.model = LlamaModel(config, at)
        self.lm_head = VocabularyHead(config.vocab_size, config.hidden_size, at)
        if config.tie_word_embeddings:
            self.lm_head.tie(self.model.embed_tokens)

    def forward(self, token_ids: Tensor, positions: Tensor, attend: AttentionStep) -> Tensor:
        hidden: Tensor = self.model(token_ids, positions, attend)
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor | None:
        logits: Tensor | None = self.lm_head(hidden)
        return logits


def _head_rows(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)
