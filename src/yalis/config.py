# SPDX-License-Identifier: Apache-2.0
"""What shape the model has: config.json and generation_config.json as one immutable value.

Two dialects are about: transformers 5 writes `dtype` and `rope_parameters` where earlier versions wrote
`torch_dtype`, and `rope_theta` with `rope_scaling`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yalis.errors import CheckpointError, ConfigError
from yalis.fields import Fields
from yalis.models import FAMILIES
from yalis.models.traits import Traits
from yalis.rope import RopeConfig, read_rope

DTYPES = ("float32", "bfloat16", "float16")
_MODEL_TYPES = {name.removesuffix("ForCausalLM").lower(): name for name in FAMILIES}


@dataclass(frozen=True)
class ModelConfig:
    """A checkpoint's shape, under the names that config.json gives its fields.

    `dtype` is empty where it does not say; then `yalis.runner.stored_dtype` does.
    """

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
    traits: Traits
    dtype: str
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Read `folder`/config.json. Raises CheckpointError (unreadable) or ConfigError (unsupported)."""
        path = Path(folder) / "config.json"
        if not Path(folder).is_dir():
            remedy = "give the path of a Hugging Face checkpoint"
            if re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(folder)):
                remedy = f"nothing is downloaded: run `hf download {folder} --local-dir DIR`, then give DIR"
            raise CheckpointError(f"{folder} is not a folder; {remedy}")
        raw = read_json(path)
        eos = read_generation_config(folder).get("eos_token_id")
        return cls.from_dict(raw, where=str(path), eos=eos)

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], *, where: str = "config.json", eos: object = None
    ) -> ModelConfig:
        """Read the content of a config.json. `eos` is generation_config.json's word, which comes first."""
        architecture = _architecture(raw, where)  # first: others name their fields differently
        family = FAMILIES[architecture]
        raw = {**family.defaults, **raw}
        fields = Fields(raw, where)
        hidden = fields.count("hidden_size")
        heads = fields.count("num_attention_heads")
        kv_heads = fields.count("num_key_value_heads", heads)
        positions = fields.count("max_position_embeddings")
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
        if raw.get("quantization_config") is not None:
            raise ConfigError(
                f"{where}: the checkpoint is quantised (quantization_config); use one in {', '.join(DTYPES)}"
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
        rope = read_rope(raw, where, positions, head_dim)
        # config.json may give the context from before the stretching. For linear it does not say which it is:
        # as in vLLM, rather too far than not far enough.
        if rope.kind == "yarn":
            positions = max(positions, int(rope.original_max_position_embeddings * rope.factor))
        elif rope.kind == "linear":
            positions = int(positions * rope.factor)
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
            rope=rope,
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            traits=family.traits(fields),
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


def read_generation_config(folder: str | Path) -> dict[str, Any]:
    """How a checkpoint's makers want it sampled; empty where they do not say."""
    path = Path(folder) / "generation_config.json"
    return read_json(path) if path.exists() else {}


def _architecture(raw: Mapping[str, Any], where: str) -> str:
    names, model_type = raw.get("architectures"), raw.get("model_type")
    known = names or [_MODEL_TYPES.get(str(model_type))]
    for name in known if isinstance(known, list) else []:
        if isinstance(name, str) and name in FAMILIES:
            return name
    raise ConfigError(
        f"{where}: architectures is {names!r} (model_type {model_type!r}); "
        f"supported: {', '.join(FAMILIES)}"
    )


def _dtype(raw: Mapping[str, Any], where: str) -> str:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "").removeprefix("torch.")
    if name and name not in DTYPES:
        raise ConfigError(f"{where}: dtype is {name!r}; supported: {', '.join(DTYPES)}")
    return name


def _eos(value: object, where: str) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ConfigError(
            f"{where}: eos_token_id is {value!r}; it must be an integer or a list of them"
        )
    return tuple(ids)
