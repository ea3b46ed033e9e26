# SPDX-License-Identifier: Apache-2.0
"""Is a result the sum that it should be? Asked of every contender before its time counts for anything.

Three questions, the strictest that apply: the same bits as the plan's own order gives in one process;
the same bits on every rank; and, whoever did the adding, no further from an fp64 sum than its roundings
can have taken it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nvrar.errors import WrongResultError
from nvrar.host import WIDE
from nvrar.meeting import exchange_values
from nvrar.plan import Plan
from nvrar.testing import reference_all_reduce
from nvrar.topology import Topology

# Elements looked at together. Every rank makes all ranks' inputs, which for a large message would not
# fit; and a result's bits do not depend on where in the message its elements stand.
_PIECE = 1 << 20


def random_inputs(num_ranks: int, num_elements: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """``[num_ranks, num_elements]`` on the CPU; the same on every rank that asks for the same."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_ranks, num_elements)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
    return torch.randint(-1000, 1001, shape, generator=generator).to(dtype)


def exact_all_reduce(inputs: Tensor, op: str) -> Tensor:
    """The reduction over the first dimension in fp64, or in int64 for whole numbers."""
    wide = inputs.double() if inputs.dtype.is_floating_point else inputs.long()
    if op == "max":
        return wide.amax(0)
    if op == "min":
        return wide.amin(0)
    return wide.mean(0) if op == "avg" else wide.sum(0)


def error_bound(inputs: Tensor, op: str, plan: Plan | None) -> Tensor:
    """The furthest, element by element, that roundings can take a reduction from the exact one.

    Every addition is off by at most eps/2 of what has been added up, which is at most the sum of the
    magnitudes. A plan adds ``sum(radix - 1)`` times in the accumulating type and rounds once a level;
    of an unknown algorithm (``plan=None``) only the number of additions is known.
    """
    if not inputs.dtype.is_floating_point or op in ("max", "min"):
        return torch.zeros(inputs.shape[1:], dtype=torch.float64)
    own = torch.finfo(inputs.dtype)
    if plan is None:
        relative = own.eps * len(inputs)
        num_roundings = len(inputs)
    else:
        accumulator = torch.finfo(WIDE.get(inputs.dtype, inputs.dtype))
        num_roundings = len(plan.levels) + 1  # and one for the division of an average
        relative = own.eps * num_roundings + accumulator.eps * sum(k - 1 for k in plan.radices)
    relative += torch.finfo(torch.float64).eps * len(inputs)  # the fp64 sum's own
    magnitude = inputs.double().abs().sum(0) / (len(inputs) if op == "avg" else 1)
    return magnitude * relative + num_roundings * own.smallest_normal * own.eps


def verify(
    all_reduce: Callable[[Tensor], tuple[Tensor, Plan | None]],
    group: ProcessGroup,
    topology: Topology,
    num_elements: int,
    *,
    name: str,
    dtype: torch.dtype = torch.float32,
    op: str = "sum",
    device: str = "cpu",
    timeout_s: float = 60.0,
) -> None:
    """Checks one call of ``all_reduce`` on random data. Collective over ``group``.

    ``all_reduce`` may work in place; it returns the result and the plan that it ran. None, where someone
    else's algorithm did, asks only for closeness to the exact result. ``name`` says in the error whose
    result it was.

    Raises:
        WrongResultError: on every rank, if the result is wrong on any.
        PeerTimeout: a rank did not come within ``timeout_s``.
    """

    def inputs_of(piece: int) -> Tensor:
        length = min(_PIECE, num_elements - piece)
        return random_inputs(group.size(), length, dtype, seed=num_elements + piece)

    pieces = range(0, num_elements, _PIECE)
    x = torch.cat([inputs_of(piece)[group.rank()] for piece in pieces]).to(device)
    reduced, plan = all_reduce(x)
    result = reduced.cpu()
    digest = hashlib.sha256(result.view(torch.uint8).numpy().tobytes()).hexdigest()
    faults = (
        _fault(result[piece : piece + _PIECE], inputs_of(piece), plan, op, topology, piece)
        for piece in pieces
    )
    mine = {"fault": next(filter(None, faults), ""), "digest": digest}
    said = exchange_values(group, "verify", mine, timeout_s)
    what = f"{name} on {num_elements} x {dtype} ({op}, {topology})"
    for rank, other in enumerate(said):
        if other["fault"]:
            raise WrongResultError(f"{what} is wrong on rank {rank}: {other['fault']}")
    if plan is not None:
        odd = [rank for rank, other in enumerate(said) if other["digest"] != said[0]["digest"]]
        if odd:
            raise WrongResultError(f"{what} has other bits on rank {odd[0]} than on rank 0")


def _fault(
    result: Tensor, inputs: Tensor, plan: Plan | None, op: str, topology: Topology, first: int
) -> str:
    """What is wrong with ``result``, the elements from ``first`` on; empty if nothing is."""
    exact = exact_all_reduce(inputs, op)
    error = (result.to(exact.dtype) - exact).abs()
    beyond = ~(error <= error_bound(inputs, op, plan))  # so that a NaN counts as beyond
    if beyond.any():
        at = int(beyond.nonzero()[0])
        return _account(first + at, result[at], exact[at], "is beyond the rounding bound")
    if plan is not None:
        expected = reference_all_reduce(inputs, plan, op, topology)
        bytes_differ = result.view(torch.uint8) != expected.view(torch.uint8)
        differs = bytes_differ.view(-1, result.itemsize).any(1)
        if differs.any():
            at = int(differs.nonzero()[0])
            verdict = f"is not what '{plan}' adds up to, bit for bit"
            return _account(first + at, result[at], expected[at], verdict)
    return ""


def _account(index: int, found: Tensor, expected: Tensor, verdict: str) -> str:
    return f"element {index} is {found.item()}, expected {expected.item()}: it {verdict}"
