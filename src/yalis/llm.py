# SPDX-License-Identifier: Apache-2.0
"""What the user holds: prompts in, texts out, however many ranks do the work."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from os import PathLike
from types import TracebackType
from typing import Any

from yalis.blocks import BlockPool
from yalis.config import ModelConfig, read_generation_config
from yalis.core import Request
from yalis.device import device_type
from yalis.engine import Engine
from yalis.errors import YalisError
from yalis.executor import make_executor
from yalis.options import EngineOptions
from yalis.outputs import RequestOutput, Update
from yalis.parallel.launcher import detect
from yalis.progress import TerminalProgress
from yalis.requests import Prompt, check_requests
from yalis.runner import check_checkpoint, stored_dtype
from yalis.sampling_params import SamplingParams
from yalis.scheduler import Scheduler
from yalis.tokenizer import Tokenizer
from yalis.trace import trace_on
from yalis.weights.loader import Progress


class LLM:
    """A model ready to generate. Names follow vLLM's.

    `model` is a folder in the Hugging Face layout. With `tensor_parallel_size` n > 1 and no launcher, n
    local worker processes start by themselves, and `num_nodes` makes them play that many nodes; under
    torchrun or srun every rank runs the same script, this joins their group, and every rank gets the same
    outputs. One rank works in the calling process. `all_reduce` is "nvrar" (with a plan word of its
    language in `all_reduce_plan`), "torch", or on GPUs of one node torch's "symm-one-shot" or
    "symm-two-shot". `dtype` "auto" is the checkpoint's. `load_format` "dummy" needs a config.json only.
    `on_progress` is called with (phase, done, total) while loading.

    A step computes at most `max_num_batched_tokens` tokens of at most `max_num_seqs` sequences. Keys and
    values lie in blocks of `block_size` tokens, in `kv_cache_memory_bytes` per rank; left out, that is 4 GiB
    on a CPU, and on a GPU what weights and the largest step leave of `gpu_memory_utilization` of its memory.
    `enable_prefix_caching` lets requests with the same beginning share its blocks. `async_scheduling`
    prepares a step while the one before it runs; left out, it is on wherever that helps. On a GPU steps of
    up to 1024 tokens, as far as `all_reduce` takes them, are CUDA graphs, captured while loading, unless
    `enforce_eager`; with `batch_invariant` those that only decode, 256 sequences at most.

    What else is in a step changes sums of many terms in their last bits, and so, where two tokens are all
    but equally likely, a request's tokens: seldom in float32, now and then in 16-bit types. With
    `batch_invariant` the same request gives the same greedy tokens and log probabilities, bit for bit,
    whatever runs beside it, however its prompt was cut and whether it was preempted; on the same devices
    with the same options. It needs `all_reduce` "nvrar". On a GPU prompts take longer, decoding of more
    than a few sequences too; on a CPU, and in float32, tokens are computed one after the other.

    Raises ConfigError or CheckpointError, before any process starts, for what cannot work; WorkerError
    when a rank fails. Close it, or use it as a context manager, to stop the workers. One thread at a time
    may use it; `make_requests` is for any.
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
        block_size: int = 16,
        kv_cache_memory_bytes: int | None = None,
        gpu_memory_utilization: float = 0.9,
        enable_prefix_caching: bool = True,
        async_scheduling: bool | None = None,
        enforce_eager: bool = False,
        batch_invariant: bool = False,
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
            block_size=block_size,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            gpu_memory_utilization=gpu_memory_utilization,
            enable_prefix_caching=enable_prefix_caching,
            async_scheduling=async_scheduling,
            enforce_eager=enforce_eager,
            batch_invariant=batch_invariant,
            seed=seed,
        )
        config = ModelConfig.from_folder(options.model)
        self.config = config if config.dtype else replace(config, dtype=stored_dtype(options))
        self._generation_config = read_generation_config(options.model)
        options.check_against(self.config)
        check_checkpoint(options, self.config)
        has_tokenizer = Tokenizer.exists(options.model)
        self.tokenizer = Tokenizer(options.model) if has_tokenizer else None
        self.options = options
        self._plan = all_reduce_plan
        self.max_model_len = options.resolved_max_model_len(self.config)
        self._is_closed = False
        place = detect(os.environ)
        self._is_first = place is None or place.rank == 0
        self._executor = make_executor(options, self.config, on_progress)
        scheduler = Scheduler(
            BlockPool(self._executor.num_blocks, options.block_size),
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            shares_prefixes=options.enable_prefix_caching,
        )
        self.engine = Engine(
            self._executor,
            scheduler,
            self.tokenizer,
            eos_token_ids=tuple(
                i for i in self.config.eos_token_ids if 0 <= i < self.config.vocab_size
            ),
            max_model_len=self.max_model_len,
            seed=options.seed,
            trace=trace_on(device_type(options.device)),
        )
        self._inboxes: dict[int, deque[Update]] = {}

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        on_progress: Progress | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt; the outputs are in the prompts' order.

        A prompt is a text or a list of token ids, by itself or as vLLM's `{"prompt": text}` and
        `{"prompt_token_ids": ids}`; `sampling_params` is one for all or one for each, and left out the
        checkpoint's own (`get_default_sampling_params`). Every prompt is checked before any is begun:
        RequestError names the one that cannot be served.
        `on_progress` counts drawn tokens, of the most that max_tokens allows; without it `use_tqdm` shows a
        bar on a terminal when it takes long. Collective under a launcher: every rank passes the same
        arguments.
        """
        requests = self.make_requests(prompts, sampling_params)
        with ExitStack() as stack:
            if on_progress is None:
                is_shown = use_tqdm and self._is_first and sys.stderr.isatty()
                on_progress = stack.enter_context(TerminalProgress(is_shown=is_shown))
            ids: list[int] = []
            stack.callback(self._end, ids)
            self._begin(requests, ids, is_streamed=False)
            most, done = sum(map(self.engine.max_new_tokens, requests)), 0
            outputs: dict[int, RequestOutput] = {}
            while len(outputs) < len(ids):
                for update in self._news(ids):
                    done += len(update.token_ids)
                    if update.output is not None:
                        outputs[update.request_id] = update.output
                on_progress("generating tokens", done, most)
        return [outputs[request_id] for request_id in ids]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[Update]:
        """Continue one prompt, and say what each step adds; the last update has the whole output.

        Checked at once, begun with the first `next`; closing the iterator cancels it. Several streams, and
        `generate`, may take turns: whoever is asked computes for all. Collective under a launcher, each
        `next`, and the closing: leave none of those to the garbage collector there.
        """
        [request] = self.make_requests([prompt], sampling_params)
        self.engine.check(request)
        return self._stream(request)

    def _stream(self, request: Request) -> Iterator[Update]:
        ids: list[int] = []
        is_over = False
        try:
            self._begin([request], ids, is_streamed=True)
            while not is_over:
                for update in self._news(ids):
                    is_over = update.output is not None
                    yield update
        finally:
            self._end(ids)

    def make_requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Request]:
        """Checked requests for `engine.add`, from what `generate` takes; RequestError as there."""
        if self._is_closed:
            raise YalisError("this LLM is closed; make a new one")
        return check_requests(
            prompts,
            self.get_default_sampling_params() if sampling_params is None else sampling_params,
            tokenizer=self.tokenizer,
            folder=self.options.model,
            vocab_size=self.config.vocab_size,
            max_model_len=self.max_model_len,
        )

    def get_default_sampling_params(self) -> SamplingParams:
        """What is used where no sampling_params are given: what the checkpoint's generation_config.json says,
        and SamplingParams' own defaults for the rest. ConfigError where a value of it is out of bounds.
        """
        return SamplingParams.from_generation_config(self._generation_config)

    def _begin(self, requests: list[Request], ids: list[int], *, is_streamed: bool) -> None:
        """Adds their numbers to `ids`, each at once: where an interrupt comes, the caller ends those."""
        self._executor.agree(requests)
        for request in requests:
            self.engine.check(request)
        inbox: deque[Update] = deque()  # one for all: they are asked for together
        for request in requests:
            ids.append(self.engine.add(request, is_streamed=is_streamed))
            self._inboxes[ids[-1]] = inbox

    def _end(self, ids: list[int]) -> None:
        """Forget these requests, finished or not."""
        self.engine.abandon(ids)
        for request_id in ids:
            self._inboxes.pop(request_id, None)

    def _news(self, ids: list[int]) -> list[Update]:
        """What is new of the requests that were begun together; computes a step when nothing is yet."""
        inbox = self._inboxes[ids[0]]
        if not inbox:
            if self._is_closed:
                raise YalisError("this LLM is closed; make a new one")
            if not any(map(self.engine.is_under_way, reversed(ids))):  # the last end last
                raise YalisError(
                    "the request was cancelled, or dropped when a step failed; begin it again"
                )
            for update in self.engine.step():
                its_inbox = self._inboxes.get(update.request_id)
                if its_inbox is not None:  # those added to the engine itself have none
                    its_inbox.append(update)
        news = list(inbox)
        inbox.clear()
        return news

    def use_all_reduce(self, name: str) -> None:
        """Sum over the ranks by another backend from now on, with the same weights: to compare them.

        "nvrar" follows the plan that the options say. Collective under a launcher. Raises ConfigError when
        the options rule it out, YalisError while requests are under way; where GPUs turn out not to share
        memory, ConfigError on a launcher's ranks, and WorkerError, which ends them, with workers.
        """
        self.engine.settle()
        plan = self._plan if name == "nvrar" else "auto"
        options = replace(self.options, all_reduce=name, all_reduce_plan=plan)
        options.check_against(self.config)
        self._executor.use_all_reduce(name)
        self.options = options

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
