# SPDX-License-Identifier: Apache-2.0
"""The all-reduce of a plan in one process: what every executor must give, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from nvrar.host import reduce_in_order, wire_type
from nvrar.plan import Plan
from nvrar.topology import Topology


def reference_all_reduce(
    inputs: Tensor,
    plan: Plan,
    op: str = "sum",
    topology: Topology | None = None,
    wire_dtype: torch.dtype | None = None,
) -> Tensor:
    """The result that every rank must hold, where ``inputs[r]`` is rank r's tensor ([P, ...]).

    Adds in the plan's own order (digit by digit, 16-bit types in fp32, rounded once a level), so that
    equality can be asked for, not closeness. Only the plan's radices matter.
    """
    plan.check(len(inputs))
    order = topology.order if topology is not None and topology.order else range(len(inputs))
    values = inputs[list(order)].to(wire_type(inputs.dtype, wire_dtype))
    for i, radix in enumerate(plan.radices):
        # Once a digit is summed its members hold the same, so one of them stands for all.
        grouped = values.reshape(len(values) // radix, radix, *values.shape[1:])
        divisor = plan.world_size if op == "avg" and i == len(plan.radices) - 1 else 1
        values = reduce_in_order(list(grouped.unbind(1)), op, divisor)
    return values[0].to(inputs.dtype)
