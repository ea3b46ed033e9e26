# SPDX-License-Identifier: Apache-2.0
"""All ranks of a topology on one GPU: is every plan right there, and how long does the emulation take?

The times are of one GPU that plays all ranks: they say nothing of a network, and compare at most plans with
each other.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nvrar.bench import Settings
from nvrar.errors import ArgumentError, WrongResultError
from nvrar.gpu import layout
from nvrar.gpu.jit import OPS, TYPES
from nvrar.gpu.layout import FORMATS, Format
from nvrar.gpu.virtual import VirtualCluster
from nvrar.host import type_name
from nvrar.plan import Plan
from nvrar.testing import reference_all_reduce
from nvrar.timing import GraphClock
from nvrar.topology import Topology
from nvrar.units import format_size
from nvrar.verify import random_inputs


@dataclass(frozen=True)
class Emulated:
    """One plan at one size in one packet format, found right. ``time_us`` is of all ranks on one GPU."""

    plan: Plan
    packets: str
    num_bytes: int
    time_us: float


def emulate(
    topology: Topology,
    plans: Sequence[Plan],
    sizes: Sequence[int],
    settings: Settings,
    on_step: Callable[[str], None] = lambda what: None,
) -> list[Emulated]:
    """Every plan at every size (bytes) in every packet format, on the current GPU: checked, then timed.

    ``on_step`` is told what comes next, once a plan and format.

    Raises:
        ArgumentError: the kernels have no such type or operation, or the GPU not the memory.
        WrongResultError: a rank's bits are not those of :func:`nvrar.testing.reference_all_reduce`.
        PeerTimeout: a virtual rank waited in vain.
    """
    if settings.dtype not in TYPES or settings.op not in OPS:
        raise ArgumentError(
            f"the kernels have no {settings.op} of {type_name(settings.dtype)}; they have "
            f"{' and '.join(OPS)} of {', '.join(map(type_name, TYPES))}"
        )
    _check_memory(topology, plans, max(sizes))
    found = []
    inputs = [_inputs(topology.world_size, size, settings) for size in sizes]
    for plan in dict.fromkeys(plans):
        for packets in FORMATS.values():
            on_step(f"{plan}, {packets.name}")
            cluster = VirtualCluster(
                plan, packets, settings.dtype, settings.op, max_bytes=max(sizes)
            )
            for size, x in zip(sizes, inputs, strict=True):
                found.append(Emulated(plan, packets.name, size, _one(cluster, x, settings)))
    return found


def num_steps(plans: Sequence[Plan]) -> int:
    """How often :func:`emulate` speaks."""
    return len(dict.fromkeys(plans)) * len(FORMATS)


def memory_needed(plan: Plan, packets: Format, num_bytes: int) -> int:
    """Bytes of GPU memory that messages of ``num_bytes`` take: both inboxes of every rank, its input and
    output, and the reference beside them, in fp32 on the way."""
    inboxes = 2 * layout.inbox_bytes(plan, packets, num_bytes)
    return plan.world_size * (inboxes + 8 * num_bytes)


def _check_memory(topology: Topology, plans: Sequence[Plan], num_bytes: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    for plan in plans:
        needed = max(memory_needed(plan, packets, num_bytes) for packets in FORMATS.values())
        if needed > free:
            raise ArgumentError(
                f"{topology} virtual ranks with messages of {format_size(num_bytes)} by '{plan}' take "
                f"{format_size(needed)} of GPU memory, and {format_size(free)} are free; give smaller "
                "--sizes, fewer ranks, or --plans without this one"
            )


def _inputs(num_ranks: int, num_bytes: int, settings: Settings) -> Tensor:
    length = settings.num_elements(num_bytes)
    return random_inputs(num_ranks, length, settings.dtype, seed=length).cuda()


def _one(cluster: VirtualCluster, inputs: Tensor, settings: Settings) -> float:
    expected = reference_all_reduce(inputs, cluster.plan, settings.op)
    results = torch.full_like(inputs, 77)
    cluster.all_reduce(list(inputs), list(results))
    for rank, result in enumerate(results):
        wrong = (_bytes_of(result) != _bytes_of(expected)).any(1).nonzero()
        if len(wrong):
            at = int(wrong[0])
            raise WrongResultError(
                f"'{cluster.plan}' in {cluster.packets.name} packets on {format_size(expected.nbytes)} of "
                f"{type_name(settings.dtype)} ({settings.op}): virtual rank {rank} has {result[at].item()} "
                f"at element {at}, where the plan adds up to {expected[at].item()}"
            )
    call = cluster.prepare(list(inputs), list(results))
    clock = GraphClock(None, lambda: cluster.launch(call), settings.warmup)
    time_us = statistics.median(clock.samples(settings.iterations))
    cluster.check()
    return time_us


def _bytes_of(x: Tensor) -> Tensor:
    """``[elements, bytes of one]``."""
    return x.view(torch.uint8).view(-1, x.element_size())
