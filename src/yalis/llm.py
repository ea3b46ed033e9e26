# SPDX-License-Identifier: Apache-2.0
"""What the user holds: prompts in, texts out, however many ranks do the work."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from os import PathLike
from types import TracebackType
from typing import Any

from yalis.config import ModelConfig
from yalis.core import RequestOutput
from yalis.engine import Engine
from yalis.errors import YalisError
from yalis.executor import make_executor
from yalis.options import EngineOptions
from yalis.requests import Prompt, check_requests
from yalis.runner import check_checkpoint
from yalis.sampling_params import SamplingParams
from yalis.scheduler import Scheduler
from yalis.tokenizer import Tokenizer
from yalis.weights.loader import Progress


class LLM:
    """A model ready to generate. Names follow vLLM's.

    `model` is a folder in the Hugging Face layout. With `tensor_parallel_size` n > 1 and no launcher, n
    local worker processes start by themselves, and `num_nodes` makes them play that many nodes; under
    torchrun or srun every rank runs the same script, this joins their group, and every rank gets the same
    outputs. One rank works in the calling process. `all_reduce` is "nvrar" (with a plan word of its
    language in `all_reduce_plan`) or "torch". `dtype` "auto" is the checkpoint's. `load_format` "dummy"
    needs a config.json only. `kv_cache_memory_bytes` is per rank. `on_progress` is called with
    (phase, done, total) while loading.

    Raises ConfigError or CheckpointError, before any process starts, for what cannot work; WorkerError
    when a rank fails. Close it, or use it as a context manager, to stop the workers.
    """

    def __init__(
        self,
        model: str | PathLike[str],
        *,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        num_nodes: int = 1,
        all_reduce: str = "nvrar",
        all_reduce_plan: str = "auto",
        dtype: str = "auto",
        load_format: str = "auto",
        device: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 8192,
        kv_cache_memory_bytes: int = 4 << 30,
        seed: int = 0,
        on_progress: Progress | None = None,
    ) -> None:
        options = EngineOptions(
            model=str(model),
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            num_nodes=num_nodes,
            all_reduce=all_reduce,
            all_reduce_plan=all_reduce_plan,
            dtype=dtype,
            load_format=load_format,
            device=device,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            seed=seed,
        )
        self.config = ModelConfig.from_folder(options.model)
        options.check_against(self.config)
        check_checkpoint(options, self.config)
        has_tokenizer = Tokenizer.exists(options.model)
        self.tokenizer = Tokenizer(options.model) if has_tokenizer else None
        self.options = options
        self.max_model_len = options.resolved_max_model_len(self.config)
        self._is_closed = False
        self._executor = make_executor(options, self.config, on_progress)
        scheduler = Scheduler(
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            num_cache_tokens=options.num_cache_tokens(self.config),
        )
        self.engine = Engine(
            self._executor,
            scheduler,
            self.tokenizer,
            eos_token_ids=self.config.eos_token_ids,
            max_model_len=self.max_model_len,
            seed=options.seed,
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_progress: Progress | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt; the outputs are in the prompts' order.

        A prompt is a text or a list of token ids; `sampling_params` is one for all or one for each.
        Every prompt is checked before any is begun: RequestError names the one that cannot be served.
        `on_progress` counts drawn tokens, of the most that max_tokens allows.
        Collective under a launcher: every rank passes the same arguments.
        """
        if self._is_closed:
            raise YalisError("this LLM is closed; make a new one")
        requests = check_requests(
            prompts,
            sampling_params,
            tokenizer=self.tokenizer,
            folder=self.options.model,
            vocab_size=self.config.vocab_size,
            max_model_len=self.max_model_len,
        )
        self._executor.agree(hashlib.sha256(repr(requests).encode()).digest())
        outputs: dict[int, RequestOutput] = {}
        try:
            ids = [self.engine.add(request) for request in requests]
            first, most = self.engine.num_drawn_tokens, self.engine.num_tokens_to_draw
            while self.engine.has_work:
                outputs |= self.engine.step()
                if on_progress:
                    on_progress("generating tokens", self.engine.num_drawn_tokens - first, most)
        except BaseException:
            self.engine.drop_all()
            raise
        return [outputs[request_id] for request_id in ids]

    def describe_all_reduce(self) -> dict[str, Any]:
        """Which all-reduce runs and how often it has run, as rank 0 counts it."""
        return self._executor.describe_all_reduce()

    def close(self) -> None:
        """Stop the workers and give up the communicators. A second call does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._executor.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
