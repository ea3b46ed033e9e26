# SPDX-License-Identifier: Apache-2.0
"""One rank of a group that torchrun or srun started: every rank runs the same script and the same engine.

Every rank schedules for itself, so a step needs no message between hosts beyond those of the model. The
schedulers are equal because their inputs are: the requests, which `generate` and `stream` compare before they
begin, and the tokens, which the ranks draw together, or rank 0 for all.
"""

from __future__ import annotations

import atexit
import hashlib

import torch.distributed as dist

from nvrar.launch import Seat
from yalis.config import ModelConfig
from yalis.core import Request, StepResult
from yalis.device import pick_device
from yalis.errors import RequestError
from yalis.local import LocalExecutor
from yalis.options import EngineOptions
from yalis.parallel.group import TensorParallel, join_default_group, open_store
from yalis.runner import Runner
from yalis.weights.loader import Progress


class JoinedExecutor(LocalExecutor):
    """Every method is collective over the launcher's ranks. Joins torch's default group, or makes it."""

    def __init__(
        self,
        options: EngineOptions,
        config: ModelConfig,
        place: Seat | None,
        on_progress: Progress | None,
    ) -> None:
        device = pick_device(options.device, place.local_rank if place else dist.get_rank())
        if not dist.is_initialized():
            assert place is not None  # somebody started this group
            # torchrun's agent hosts a store already; under srun, rank 0 does.
            store = None
            if not dist.is_torchelastic_launched():
                store = open_store(place.host, place.port, is_host=place.rank == 0)
            join_default_group(store, place.rank, place.world_size, device)
            # The group is the launcher's, not this engine's: another may follow in this process.
            atexit.register(_leave_default_group)
        # A group of our own, so that nobody else's collectives come between ours.
        self._group = dist.new_group(list(range(dist.get_world_size())))
        num_nodes = options.num_nodes
        # One node is the default and says nothing: nvrar then looks where the ranks really are.
        nodes = (num_nodes, self._group.size() // num_nodes) if num_nodes > 1 else None
        tp = TensorParallel.over(
            self._group, options.all_reduce, options.all_reduce_plan, nodes,
            is_batch_invariant=options.batch_invariant,
        )  # fmt: skip
        super().__init__(options, Runner(options, config, tp, device, on_progress))

    def result(self) -> StepResult:
        pending = self._under_way.popleft()
        result = pending.wait()
        if not pending.wants_logprobs:
            return result
        shared = [result.logprobs]  # every rank has the tokens; these only rank 0
        dist.broadcast_object_list(shared, group=self._group, group_src=0)
        return StepResult(result.token_ids, shared[0])

    def agree(self, requests: list[Request]) -> None:
        digest = hashlib.sha256(repr(requests).encode()).digest()
        digests: list[bytes | None] = [None] * self._group.size()
        dist.all_gather_object(digests, digest, group=self._group)
        others = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if others:
            raise RequestError(
                f"ranks {others} were given other prompts or sampling_params than rank 0; every rank of "
                "a launched group runs the same generate"
            )

    def close(self) -> None:
        try:
            super().close()
        finally:
            dist.destroy_process_group(self._group)


def _leave_default_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
