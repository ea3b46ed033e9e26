# SPDX-License-Identifier: Apache-2.0
"""Where the tuner tries plans on GPUs: any plan, in any packets and launch, on one executor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nvrar.bench import Settings
from nvrar.contenders import TorchContender
from nvrar.cost import Machine
from nvrar.errors import NvrarError
from nvrar.gpu.algorithms import LL_PART_BYTES, NVLINK, Algorithm
from nvrar.gpu.executor import GpuExecutor, Prepared
from nvrar.gpu.kernel import NO_FAILURE
from nvrar.gpu.layout import LL, LL128, num_parts, shapes_worth_trying
from nvrar.hardware import device_name
from nvrar.host import type_name
from nvrar.meeting import Meeting, exchange_values
from nvrar.plan import Plan
from nvrar.table import Key, Trial
from nvrar.topology import Topology
from nvrar.tune import worth_trying
from nvrar.tuner import Attempt

# In parts of up to so many times the size where LL128 begins to win, LL is still tried.
_LL_REACH = 32
_BUDGET_S = 5.0  # of a wait inside a kernel


class GpuLab:
    """See :class:`nvrar.tuner.Lab`. ``most_plans`` of a size are tried, in every fitting packet format."""

    def __init__(
        self,
        group: ProcessGroup,
        topology: Topology,
        machine: Machine,
        settings: Settings,
        most_plans: int,
    ) -> None:
        self._group, self._machine, self._settings = group, machine, settings
        self._most_plans = most_plans
        self._executor: GpuExecutor | None = None
        self.topology = topology
        self.baseline = TorchContender(group)
        devices = exchange_values(group, "devices", device_name("gpu"), settings.timeout_s)
        self._link = self._ask_link()
        self.key = Key(
            "gpu",
            tuple(sorted(set(devices))),
            str(topology),
            self._link,
            type_name(settings.dtype),
        )

    @contextmanager
    def attempts(
        self, num_bytes: int, left_out: MutableMapping[str, str]
    ) -> Iterator[Sequence[Attempt]]:
        wanted = [a for a in self._algorithms(num_bytes) if _name(a) not in left_out]
        if not wanted:
            yield []
            return
        # One executor a size: its workspace is no larger than needed, and one that broke harms no other.
        self._executor = self._new_executor(lambda link: dict.fromkeys(wanted, num_bytes))
        try:
            made = []
            for algorithm in wanted:
                attempt = self._attempt(algorithm, num_bytes, left_out)
                if attempt is not None:
                    made.append(attempt)
            yield made
        finally:
            torch.cuda.synchronize()
            self._executor.close()
            self._executor = None

    def variants(self, best: Attempt, num_bytes: int) -> Sequence[Attempt]:
        packets = next(f for f in (LL, LL128) if f.name == best.trial.packets)
        found = {best.name: best}
        for shape in shapes_worth_trying(best.trial.plan, packets, num_bytes):
            made = self._attempt(Algorithm(best.trial.plan, packets, shape), num_bytes, {})
            if made is not None and _launch(made) != _launch(best):
                found[made.name] = made  # by the launch that came of it: the GPU holds only so many
        return [attempt for attempt in found.values() if attempt is not best]

    def failure(self) -> str:
        torch.cuda.synchronize()
        if self._executor is not None and self._executor.failure.kind != NO_FAILURE:
            level = self._executor.failure.level
            return f"a wait at level {level} did not end within {_BUDGET_S:g} s"
        return ""

    def close(self) -> None:
        pass

    def _algorithms(self, num_bytes: int) -> list[Algorithm]:
        found = []
        for plan in worth_trying(self.topology, num_bytes, self._machine, self._most_plans):
            if self._link == NVLINK:
                found.append(Algorithm(plan, LL128))
            if self._link != NVLINK or num_bytes <= _LL_REACH * LL_PART_BYTES * num_parts(plan):
                found.append(Algorithm(plan, LL))
        return found

    def _attempt(
        self, algorithm: Algorithm, num_bytes: int, left_out: MutableMapping[str, str]
    ) -> Attempt | None:
        assert self._executor is not None
        prepared, launch, reason = None, (0, 0), ""
        try:
            prepared = self._executor.prepare(num_bytes, self._settings.dtype, "sum", algorithm)
            launch = (prepared.shape.blocks, prepared.shape.threads)
        except NvrarError as error:
            reason = str(error).splitlines()[0]
        said = exchange_values(self._group, "attempt", (reason, launch), self._settings.timeout_s)
        reasons = [other for other, _ in said if other]
        if prepared is None or reasons:
            left_out[_name(algorithm)] = reasons[0]
            return None
        # GPUs of other kinds have room for other launches. Rank 0's is the one that all ranks go by.
        blocks, threads = said[0][1]
        trial = Trial(algorithm.plan, 0.0, algorithm.packets.name, blocks, threads)
        return Attempt(_Launched(algorithm, trial, self._executor, prepared), trial)

    def _ask_link(self) -> str:
        heard: list[str] = []
        smallest = Algorithm(Plan.named("one-shot", self.topology), LL)

        def algorithms(link: str) -> dict[Algorithm, int]:
            heard.append(link)
            return {smallest: 1}

        self._new_executor(algorithms).close()
        return heard[0]

    def _new_executor(self, algorithms: Callable[[str], dict[Algorithm, int]]) -> GpuExecutor:
        meeting = Meeting(self._group, "tune", self._settings.timeout_s)
        return GpuExecutor(meeting, self.topology, algorithms, _BUDGET_S)


class _Launched:
    """A contender: one algorithm and launch."""

    def __init__(
        self, algorithm: Algorithm, trial: Trial, executor: GpuExecutor, prepared: Prepared
    ) -> None:
        self.name = _name(algorithm)
        if algorithm.shape is not None:
            self.name += f" {trial.blocks}x{trial.threads}"
        self._plan, self._executor, self._prepared = algorithm.plan, executor, prepared

    def buffer(self, num_elements: int, dtype: torch.dtype, device: str) -> Tensor:
        return torch.empty(num_elements, dtype=dtype, device=device)

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        self._executor.launch(self._prepared, x, x)
        return x

    def plan_for(self, num_bytes: int, dtype: torch.dtype) -> Plan:
        return self._plan

    def executor_for(self, device: str) -> str:
        return "gpu"

    def fallbacks(self) -> Mapping[str, int]:
        return {}


def _name(algorithm: Algorithm) -> str:
    return f"{algorithm.plan} {algorithm.packets.name}"


def _launch(attempt: Attempt) -> tuple[int | None, int | None]:
    return attempt.trial.blocks, attempt.trial.threads
