# SPDX-License-Identifier: Apache-2.0
"""Where the tuner tries plans on CPUs: communicators with a plan each, over the process group's backend."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager

from torch.distributed import ProcessGroup

from nvrar.bench import Settings
from nvrar.communicator import Communicator
from nvrar.contenders import BASELINE, PlanContender
from nvrar.cost import Machine
from nvrar.hardware import device_name
from nvrar.host import backend_of, type_name
from nvrar.meeting import exchange_values
from nvrar.plan import Plan
from nvrar.table import Key, Trial
from nvrar.topology import Topology
from nvrar.tune import worth_trying
from nvrar.tuner import Attempt


class HostLab:
    """See :class:`nvrar.tuner.Lab`. ``most_plans`` of a size are tried. To be closed."""

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
        self._open = ExitStack()
        self._made: dict[Plan, PlanContender] = {}
        self.topology = topology
        devices = exchange_values(group, "devices", device_name("host"), settings.timeout_s)
        self.key = Key(
            "host",
            tuple(sorted(set(devices))),
            str(topology),
            backend_of(group, "cpu"),
            type_name(settings.dtype),
        )
        # What a communicator that leaves a call to torch does, its own precautions included.
        self.baseline = self._contender(BASELINE, Plan.named("nvrar", topology), max_bytes=0)

    @contextmanager
    def attempts(
        self, num_bytes: int, left_out: MutableMapping[str, str]
    ) -> Iterator[Sequence[Attempt]]:
        plans = worth_trying(self.topology, num_bytes, self._machine, self._most_plans)
        yield [
            Attempt(self._of(plan), Trial(plan, 0.0)) for plan in plans if str(plan) not in left_out
        ]

    def variants(self, best: Attempt, num_bytes: int) -> Sequence[Attempt]:
        return []  # there is nothing to launch

    def failure(self) -> str:
        return ""  # a communicator raises

    def close(self) -> None:
        self._open.close()

    def _of(self, plan: Plan) -> PlanContender:
        if plan not in self._made:
            self._made[plan] = self._contender(str(plan), plan, max_bytes=1 << 62)
        return self._made[plan]

    def _contender(self, name: str, plan: Plan, max_bytes: int) -> PlanContender:
        communicator = Communicator(
            self._group,
            self.topology,
            plan,
            max_bytes,
            self._settings.timeout_s,
            executor="host",
        )
        return PlanContender(name, self._open.enter_context(communicator))
