"""config.json as the families' checkpoints write it."""

from __future__ import annotations

from typing import Any

import pytest

from yalis import ConfigError
from yalis.config import ModelConfig
from yalis.models.traits import Traits
from yalis.rope import RopeConfig
from yalis.testing import config_json


def read(**fields: Any) -> ModelConfig:
    raw = config_json(num_hidden_layers=4, **fields)
    return ModelConfig.from_dict({key: value for key, value in raw.items() if value != "REMOVE"})


MISTRAL = {"architectures": ["MistralForCausalLM"]}
SOME_SLIDE = ["full_attention", "sliding_attention"] * 2
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "attention_bias": "REMOVE"}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"]}
TRAITS: list[tuple[dict[str, Any], Traits]] = [
    ({}, Traits()),
    ({"attention_bias": True}, Traits(qkv_bias=True, o_bias=True)),
    ({"mlp_bias": True, "sliding_window": 7}, Traits(mlp_bias=True)),
    (MISTRAL | {"sliding_window": None}, Traits()),
    (MISTRAL | {"sliding_window": 4096}, Traits(windows=(4096,) * 4)),
    (MISTRAL, Traits(windows=(4096,) * 4)),  # v0.1's default
    (MISTRAL | {"layer_types": SOME_SLIDE}, Traits(windows=(None, 4096, None, 4096))),  # Ministral's
    (QWEN2, Traits(qkv_bias=True)),
    (QWEN2 | {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 2},
     Traits(qkv_bias=True)),
    (QWEN2 | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
     Traits(qkv_bias=True, windows=(None, None, None, 8))),
    (QWEN2 | {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
     Traits(qkv_bias=True)),
    (QWEN3 | {"sliding_window": None, "max_window_layers": 36, "use_sliding_window": False},
     Traits(has_qk_norm=True)),
    (QWEN3 | {"use_sliding_window": True, "layer_types": SOME_SLIDE},
     Traits(has_qk_norm=True, windows=(None, 4096, None, 4096))),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "traits"), TRAITS)
def test_traits(fields: dict[str, Any], traits: Traits) -> None:
    config = read(**fields)
    assert config.traits == traits
    assert [config.traits.window(idx) for idx in range(4)] == list(traits.windows or (None,) * 4)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Ministral", "Qwen2", "Qwen3"])
def test_the_model_type_will_do_where_no_architecture_is_named(family: str) -> None:
    config = read(architectures="REMOVE", model_type=family.lower())
    assert config.architecture == f"{family}ForCausalLM"


@pytest.mark.parametrize(
    ("family", "num_key_value_heads", "head_dim", "positions"),
    [
        ("Llama", 32, 2, 2048),
        ("Mistral", 8, 2, 131072),
        ("Qwen2", 32, 2, 32768),
        ("Qwen3", 32, 128, 32768),
    ],
)
def test_where_config_json_is_silent_the_families_differ(
    family: str, num_key_value_heads: int, head_dim: int, positions: int
) -> None:
    silent = dict.fromkeys(("num_key_value_heads", "max_position_embeddings"), "REMOVE")
    config = read(
        architectures=[f"{family}ForCausalLM"], hidden_size=64, num_attention_heads=32, **silent
    )
    assert config.num_key_value_heads == num_key_value_heads
    assert config.head_dim == head_dim
    assert config.max_position_embeddings == positions
    null = read(
        architectures=[f"{family}ForCausalLM"], num_attention_heads=16, num_key_value_heads=None
    )
    assert null.num_key_value_heads == 16


def test_both_dialects_of_rotary_settings() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    want = RopeConfig(5e5, "llama3", 8.0, 8192, 1.0, 4.0)
    old = read(rope_theta=5e5, rope_scaling=scaling | {"type": "llama3"})
    new = {"rope_theta": "REMOVE", "rope_scaling": "REMOVE"}
    new |= {"rope_parameters": scaling | {"rope_type": "llama3", "rope_theta": 5e5}}
    assert old.rope == read(**new).rope == want


LLAMA3 = {"type": "llama3", "low_freq_factor": 1, "high_freq_factor": 4}


@pytest.mark.parametrize("kind", [{"type": "yarn"}, LLAMA3])
def test_the_original_context_may_stand_beside_the_rotary_settings(kind: dict[str, Any]) -> None:
    scaling = kind | {"factor": 4.0}
    want = read(rope_scaling=scaling | {"original_max_position_embeddings": 512}).rope
    for inner in ({}, {"original_max_position_embeddings": 1024}):
        got = read(rope_scaling=scaling | inner, original_max_position_embeddings=512)
        assert got.rope == want


def test_rotary_settings_in_both_dialects_must_agree() -> None:
    linear = {"rope_type": "linear", "factor": 2.0}
    for theta in (10000.0, 5e5):
        both = {"rope_parameters": linear | {"rope_theta": theta}, "rope_scaling": linear}
        assert read(**both, rope_theta=theta).rope == RopeConfig(theta, "linear", 2.0)
        with pytest.raises(ConfigError, match=r"theta .*, linear; theta .*, default\); keep"):
            read(**both | {"rope_scaling": {"type": "default"}}, rope_theta=theta)
    with pytest.raises(ConfigError, match="keep rope_parameters alone"):  # its theta would be lost
        read(rope_parameters={"rope_theta": 1e6}, rope_scaling=linear, rope_theta="REMOVE")


def test_yarn_reaches_as_far_as_it_stretches() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = read(max_position_embeddings=32768, rope_scaling=yarn)
    assert config.max_position_embeddings == 131072
    assert config.rope.attention_factor == pytest.approx(1.1386, abs=1e-4)  # 0.1 ln 4 + 1


def test_linear_scaling_reaches_as_far_as_it_stretches() -> None:
    config = read(max_position_embeddings=4096, rope_scaling={"type": "linear", "factor": 2.5})
    assert config.max_position_embeddings == 10240


@pytest.mark.parametrize("window", [0, -1, "x", 1.5])
def test_a_window_that_is_none(window: object) -> None:
    with pytest.raises(ConfigError, match=r"sliding_window is .*; it must be an integer"):
        read(**MISTRAL, sliding_window=window)


@pytest.mark.parametrize("damage", [{"layer_types": 5}, {"layer_types": ["x"] * 4},
                                    {"max_window_layers": -1}, {"max_window_layers": "x"}])  # fmt: skip
def test_layers_whose_window_is_unclear(damage: dict[str, Any]) -> None:
    [name] = damage
    with pytest.raises(ConfigError, match=rf"{name} is .*; it must"):
        read(**QWEN3, use_sliding_window=True, **damage)
