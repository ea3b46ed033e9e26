# SPDX-License-Identifier: Apache-2.0
"""What the user asked of the engine, checked against the model before any process starts."""

from __future__ import annotations

from dataclasses import dataclass

import nvrar
from yalis.config import DTYPES, ModelConfig
from yalis.device import device_type
from yalis.errors import ConfigError
from yalis.parallel.all_reduce import ALL_REDUCES, SYMM_MEM_ALL_REDUCES
from yalis.parallel.symm_mem import require_symm_mem

LOAD_FORMATS = ("auto", "safetensors", "dummy")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class EngineOptions:
    """The options of `LLM`, as given; equal on every rank. See `LLM` for their meaning."""

    model: str
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    num_nodes: int = 1
    all_reduce: str = "nvrar"
    all_reduce_plan: str = "auto"
    dtype: str = "auto"
    load_format: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    block_size: int = 16
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    async_scheduling: bool | None = None
    enforce_eager: bool = False
    batch_invariant: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "num_nodes",
            "max_num_seqs",
            "max_num_batched_tokens",
            "block_size",
        ):
            _require_count(name, getattr(self, name))
        if self.kv_cache_memory_bytes is not None:
            _require_count("kv_cache_memory_bytes", self.kv_cache_memory_bytes)
        share = self.gpu_memory_utilization
        if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 < share <= 1:
            raise ConfigError(
                f"gpu_memory_utilization is {share!r}; give a number above 0 and at most 1"
            )
        _require_one_of("enable_prefix_caching", self.enable_prefix_caching, (True, False))
        _require_one_of("async_scheduling", self.async_scheduling, (None, True, False))
        _require_one_of("enforce_eager", self.enforce_eager, (True, False))
        _require_one_of("batch_invariant", self.batch_invariant, (True, False))
        if self.pipeline_parallel_size != 1:
            raise ConfigError(
                f"pipeline_parallel_size is {self.pipeline_parallel_size}; only 1 is supported yet. "
                "Use tensor_parallel_size for more ranks"
            )
        if self.tensor_parallel_size % self.num_nodes:
            raise ConfigError(
                f"tensor_parallel_size {self.tensor_parallel_size} is not a multiple of num_nodes "
                f"{self.num_nodes}; every node holds equally many ranks"
            )
        _require_one_of("all_reduce", self.all_reduce, ALL_REDUCES)
        if self.all_reduce_plan != "auto" and self.all_reduce != "nvrar":
            raise ConfigError(
                f"all_reduce_plan is {self.all_reduce_plan!r}, but all_reduce is {self.all_reduce!r}, "
                'which follows no plan; use all_reduce="nvrar" or leave the plan out'
            )
        self._check_plan()
        if self.batch_invariant and self.all_reduce != "nvrar" and self.tensor_parallel_size > 1:
            raise ConfigError(
                f"batch_invariant is set, but all_reduce is {self.all_reduce!r}, whose sums depend on the "
                'size of a message; use all_reduce="nvrar"'
            )
        _require_one_of("dtype", self.dtype, ("auto", *DTYPES))
        _require_one_of("load_format", self.load_format, LOAD_FORMATS)
        _require_one_of("device", self.device, DEVICES)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ConfigError(f"seed is {self.seed!r}; give an integer")

    def _check_plan(self) -> None:
        word, num_ranks = self.all_reduce_plan, self.tensor_parallel_size
        if not isinstance(word, str):
            raise ConfigError(
                f'all_reduce_plan is {word!r}; give a word, such as "auto" or "one-shot"'
            )
        if word == "auto":
            return
        try:
            # Where ranks turn out to share nodes in another way, their number stays, and so what fits it.
            nvrar.Plan.resolve(word, nvrar.Topology(self.num_nodes, num_ranks // self.num_nodes))
        except nvrar.NvrarError as error:
            raise ConfigError(f"all_reduce_plan: {error}") from None

    def check_against(self, model: ModelConfig) -> None:
        """Raise ConfigError where this model cannot be served so."""
        if self.all_reduce in SYMM_MEM_ALL_REDUCES:
            require_symm_mem(self.all_reduce, device_type(self.device), self.resolved_dtype(model))
        heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
        size = self.tensor_parallel_size
        fitting = [n for n in range(1, heads + 1) if heads % n == 0 and divides_kv(kv_heads, n)]
        remedy = f"use one of {', '.join(map(str, fitting))}"
        if size > heads:
            raise ConfigError(
                f"tensor_parallel_size {size} is more than the model's {heads} attention heads, so some "
                f"ranks would have none; {remedy}"
            )
        if heads % size:
            raise ConfigError(
                f"tensor_parallel_size {size} does not divide the model's {heads} attention heads; {remedy}"
            )
        if not divides_kv(kv_heads, size):
            raise ConfigError(
                f"tensor_parallel_size {size} and the model's {kv_heads} key-value heads do not divide "
                f"each other, so heads can be neither split nor replicated evenly; {remedy}"
            )
        if self.max_model_len is not None:
            _require_count("max_model_len", self.max_model_len)
            if self.max_model_len > model.max_position_embeddings:
                raise ConfigError(
                    f"max_model_len {self.max_model_len} is above the model's max_position_embeddings "
                    f"{model.max_position_embeddings}; lower it, or leave it out"
                )

    def resolved_max_model_len(self, model: ModelConfig) -> int:
        return self.max_model_len or model.max_position_embeddings

    def depth(self, *, is_asynchronous: bool) -> int:
        """How many steps to have under way, where a step does or does not run by itself once begun."""
        wants = is_asynchronous if self.async_scheduling is None else self.async_scheduling
        return 2 if wants else 1

    def resolved_dtype(self, model: ModelConfig) -> str:
        return model.dtype if self.dtype == "auto" else self.dtype


def divides_kv(num_kv_heads: int, tensor_parallel_size: int) -> bool:
    """Whether key-value heads can be split evenly over the ranks, or replicated evenly onto them."""
    return num_kv_heads % tensor_parallel_size == 0 or tensor_parallel_size % num_kv_heads == 0


def _require_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} is {value!r}; give an integer of at least 1")


def _require_one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(map(str, choices))}")
