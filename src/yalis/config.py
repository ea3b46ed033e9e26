# SPDX-License-Identifier: Apache-2.0
"""What shape the model has: config.json and generation_config.json as one immutable value.

Two dialects are about: transformers 5 writes `rope_parameters` and `dtype` where earlier versions wrote
`rope_theta` with `rope_scaling`, and `torch_dtype`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yalis.errors import CheckpointError, ConfigError

DTYPES = ("float32", "bfloat16", "float16")
ARCHITECTURES = ("LlamaForCausalLM",)


@dataclass(frozen=True)
class RopeConfig:
    """How positions turn into angles. `kind` is "default", "linear" or "llama3"."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """A checkpoint's shape, under the names that config.json gives its fields."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    dtype: str
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Read `folder`/config.json. Raises CheckpointError (unreadable) or ConfigError (unsupported)."""
        path = Path(folder) / "config.json"
        if not Path(folder).is_dir():
            raise CheckpointError(
                f"{folder} is not a folder; give the path of a Hugging Face checkpoint"
            )
        raw = read_json(path)
        generation = Path(folder) / "generation_config.json"
        eos = read_json(generation).get("eos_token_id") if generation.exists() else None
        return cls.from_dict(raw, where=str(path), eos=eos)

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], *, where: str = "config.json", eos: object = None
    ) -> ModelConfig:
        """Read the content of a config.json. `eos` is generation_config.json's word, which comes first."""
        architecture = _architecture(raw, where)  # first: others name their fields differently
        fields = _Fields(raw, where)
        hidden = fields.count("hidden_size")
        heads = fields.count("num_attention_heads")
        kv_heads = fields.count("num_key_value_heads", heads)
        positions = fields.count("max_position_embeddings", 2048)
        if heads % kv_heads:
            raise ConfigError(
                f"{where}: num_attention_heads is {heads}, which num_key_value_heads = {kv_heads} does not "
                "divide; grouped-query attention needs groups of equal size"
            )
        if raw.get("head_dim") is None and hidden % heads:
            raise ConfigError(
                f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads} and no "
                "head_dim is given; add head_dim"
            )
        if raw.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
            raise ConfigError(
                f"{where}: hidden_act is {raw['hidden_act']!r}; only 'silu' is supported"
            )
        head_dim = fields.count("head_dim", hidden // heads)
        if head_dim % 2:
            raise ConfigError(
                f"{where}: head_dim is {head_dim}; rotary embedding needs an even one"
            )
        return cls(
            architecture=architecture,
            vocab_size=fields.count("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.count("intermediate_size"),
            num_hidden_layers=fields.count("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            max_position_embeddings=positions,
            rope=_rope(raw, where, positions),
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            attention_bias=fields.flag("attention_bias"),
            mlp_bias=fields.flag("mlp_bias"),
            dtype=_dtype(raw, where),
            eos_token_ids=_eos(eos if eos is not None else raw.get("eos_token_id"), where),
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError naming the file when it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing; a checkpoint in the Hugging Face layout has one"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds a {type(value).__name__}, not a JSON object; fetch it again"
        )
    return value


@dataclass(frozen=True)
class _Fields:
    raw: Mapping[str, Any]
    where: str

    def count(self, name: str, default: int | None = None) -> int:
        value = self.raw.get(name)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{self.where}: {name} is missing; it gives the model its shape")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(
                f"{self.where}: {name} is {value!r}; it must be an integer of at least 1"
            )
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.raw.get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"{self.where}: {name} is {value!r}; it must be a number above 0")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.raw.get(name)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{self.where}: {name} is {value!r}; it must be true or false")
        return bool(value)


def _architecture(raw: Mapping[str, Any], where: str) -> str:
    names = raw.get("architectures")
    if names is None and raw.get("model_type") == "llama":
        return "LlamaForCausalLM"
    for name in names or ():
        if name in ARCHITECTURES:
            return str(name)
    raise ConfigError(
        f"{where}: architectures is {names!r} (model_type {raw.get('model_type')!r}); "
        f"supported: {', '.join(ARCHITECTURES)}"
    )


def _rope(raw: Mapping[str, Any], where: str, max_positions: int) -> RopeConfig:
    # Two dialects: one dict with everything, or the theta beside an optional dict with the scaling.
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"{where}: rope scaling is {scaling!r}; it must be an object or null")
    theta = scaling.get("rope_theta") or raw.get("rope_theta") or 10000.0
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    fields = _Fields({**scaling, "rope_theta": theta}, f"{where} (rope)")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"{where}: partial_rotary_factor is not 1, which no Llama uses; unsupported"
        )
    if kind == "default":
        return RopeConfig(fields.number("rope_theta"))
    if kind == "linear":
        return RopeConfig(fields.number("rope_theta"), kind, fields.number("factor"))
    if kind == "llama3":
        low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
        if low >= high:
            raise ConfigError(
                f"{where}: low_freq_factor {low} must be below high_freq_factor {high} in llama3 scaling"
            )
        original = fields.count("original_max_position_embeddings", max_positions)
        return RopeConfig(
            fields.number("rope_theta"), kind, fields.number("factor"), low, high, original
        )
    raise ConfigError(f"{where}: rope type is {kind!r}; supported: default, linear, llama3")


def _dtype(raw: Mapping[str, Any], where: str) -> str:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"{where}: dtype is {name!r}; supported: {', '.join(DTYPES)}")
    return name


def _eos(value: object, where: str) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ConfigError(
            f"{where}: eos_token_id is {value!r}; it must be an integer or a list of them"
        )
    return tuple(ids)
