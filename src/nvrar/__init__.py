# SPDX-License-Identifier: Apache-2.0
"""A fast all-reduce for tensor parallelism beyond one node. See README.md and docs/architecture.md."""

from nvrar._version import __version__
from nvrar.communicator import Communicator, Stats
from nvrar.cost import MACHINES, Link, Machine
from nvrar.errors import (
    ArgumentError,
    ClosedError,
    DisagreementError,
    NvrarError,
    PeerTimeout,
    PlanError,
    TopologyError,
)
from nvrar.plan import Level, Plan
from nvrar.topology import Topology

__all__ = [
    "MACHINES",
    "ArgumentError",
    "ClosedError",
    "Communicator",
    "DisagreementError",
    "Level",
    "Link",
    "Machine",
    "NvrarError",
    "PeerTimeout",
    "Plan",
    "PlanError",
    "Stats",
    "Topology",
    "TopologyError",
    "__version__",
]
