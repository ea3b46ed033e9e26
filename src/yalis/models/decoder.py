# SPDX-License-Identifier: Apache-2.0
"""The decoder that the families share, one rank's part of it.

Tokens of all sequences lie end to end: `[num_tokens, hidden]`. Attention and MLP each give this rank's share
of a sum. Summing over the ranks, adding the residual and normalising for what comes next are one operation,
which a backend can do in one launch; so a layer ends with the norm of the layer after it.

The attributes bear the checkpoint's names, so a module's path is its tensors' path.
"""

from __future__ import annotations

from torch import Tensor, nn

from yalis.attention import AttentionLayer, AttentionStep
from yalis.config import ModelConfig
from yalis.layers.linear import ColumnLinear, GatedLinear, Piece, RowLinear
from yalis.layers.norm import RMSNorm
from yalis.layers.rotary import Rotary
from yalis.layers.vocabulary import VocabularyEmbedding, VocabularyHead
from yalis.parallel.group import Placement
from yalis.parallel.split import even_split, kv_head_split


class Attention(nn.Module):
    """`[num_tokens, hidden]` to this rank's share of the same."""

    def __init__(self, config: ModelConfig, layer_idx: int, at: Placement) -> None:
        super().__init__()
        dim, hidden = config.head_dim, config.hidden_size
        num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        q = _head_rows(even_split(num_heads, at.tp.size, at.tp.rank), dim)
        kv = _head_rows(kv_head_split(num_kv_heads, at.tp.size, at.tp.rank), dim)
        self._head_dim = dim
        self._num_heads = [len(rows) // dim for rows in (q, kv, kv)]
        pieces = [
            Piece("q_proj", num_heads * dim, q),
            Piece("k_proj", num_kv_heads * dim, kv),
            Piece("v_proj", num_kv_heads * dim, kv),
        ]
        self.qkv_proj = ColumnLinear(hidden, pieces, config.traits.qkv_bias, at)
        self.o_proj = RowLinear(num_heads * dim, q, hidden, config.traits.o_bias, at)
        self.q_norm = self.k_norm = None
        if config.traits.has_qk_norm:
            self.q_norm = RMSNorm(dim, config.rms_norm_eps, at)
            self.k_norm = RMSNorm(dim, config.rms_norm_eps, at)
        self._layer = AttentionLayer(
            idx=layer_idx,
            window=config.traits.window(layer_idx),
            q_weight=self.q_norm.weight if self.q_norm else None,
            k_weight=self.k_norm.weight if self.k_norm else None,
            eps=config.rms_norm_eps,
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: AttentionStep) -> Tensor:
        heads = self.qkv_proj(x).view(x.shape[0], -1, self._head_dim)
        q, k, v = heads.split(self._num_heads, dim=1)
        out = attend(self._layer, q, k, v, cos, sin)
        y: Tensor = self.o_proj(out.view(x.shape[0], -1))
        return y


class MLP(nn.Module):
    """`[num_tokens, hidden]` to this rank's share of the same."""

    def __init__(self, config: ModelConfig, at: Placement) -> None:
        super().__init__()
        size, hidden = config.intermediate_size, config.hidden_size
        bias = config.traits.mlp_bias
        mine = even_split(size, at.tp.size, at.tp.rank)
        pieces = [Piece("gate_proj", size, mine), Piece("up_proj", size, mine)]
        self.gate_up_proj = GatedLinear(hidden, pieces, bias, at)
        self.down_proj = RowLinear(size, mine, hidden, bias, at)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.gate_up_proj(x))
        return y


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer_idx: int, at: Placement) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps, at)
        self.self_attn = Attention(config, layer_idx, at)
        self.post_attention_layernorm = RMSNorm(size, eps, at)
        self.mlp = MLP(config, at)

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        rotation: tuple[Tensor, Tensor],
        attend: AttentionStep,
        next_norm: RMSNorm,
    ) -> tuple[Tensor, Tensor]:
        """From the normed `x` and the `residual` to those of the next layer, whose norm it is. Collective."""
        x = self.self_attn(x, *rotation, attend)
        x, residual = self.post_attention_layernorm.of_sum(x, residual)
        return next_norm.of_sum(self.mlp(x), residual)


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, at: Placement) -> None:
        super().__init__()
        self.embed_tokens = VocabularyEmbedding(config.vocab_size, config.hidden_size, at)
        layers = [DecoderLayer(config, idx, at) for idx in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, at)
        self._norms = (*(layer.input_layernorm for layer in layers), self.norm)
        self._rotary = Rotary(config.rope, config.head_dim, config.max_position_embeddings, at)

    def forward(self, token_ids: Tensor, positions: Tensor, attend: AttentionStep) -> Tensor:
        residual = self.embed_tokens(token_ids)
        rotation = self._rotary(positions)
        x: Tensor = self._norms[0](residual)
        for layer, next_norm in zip(self.layers, self._norms[1:], strict=True):
            x, residual = layer(x, residual, rotation, attend, next_norm)
        return x


class CausalLM(nn.Module):
    """`forward`: `[num_tokens]` ids and positions to `[num_tokens, hidden]`. Collective.

    `lm_head` then turns some of those rows to logits.
    """

    def __init__(self, config: ModelConfig, at: Placement) -> None:
        super().__init__()
        self.model = Decoder(config, at)
        self.lm_head = VocabularyHead(config.vocab_size, config.hidden_size, at)
        if config.tie_word_embeddings:
            self.lm_head.tie(self.model.embed_tokens, "lm_head.weight")

    def forward(self, token_ids: Tensor, positions: Tensor, attend: AttentionStep) -> Tensor:
        hidden: Tensor = self.model(token_ids, positions, attend)
        return hidden


def _head_rows(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)
