"""A bench over real processes: what is measured, and who is caught."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ranks
from nvrar import MACHINES, Topology
from nvrar.bench import Measurement, Settings, measure
from nvrar.contenders import TorchContender, contenders
from nvrar.errors import WrongResultError
from nvrar.verify import verify

pytestmark = pytest.mark.host

QUICK = Settings(iterations=3, rounds=2, warmup=1, timeout_s=30)


class Wrong(TorchContender):
    """Right everywhere but in one element on one rank."""

    name = "wrong"

    def __init__(self, group: dist.ProcessGroup, rank: int, error: float) -> None:
        super().__init__(group)
        self._is_wrong = group.rank() == rank
        self._error = error

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        super().all_reduce(x, op)
        if self._is_wrong:
            x[7] += self._error
        return x


def _measure(rank: int) -> tuple[list[Measurement], list[str]]:
    topology, steps = Topology(2, 2), []
    options = {"max_bytes": 2048, "machine": MACHINES["perlmutter"]}
    with contenders(dist.group.WORLD, topology, ["nvrar", "auto"], **options) as entrants:
        found = measure(
            dist.group.WORLD,
            topology,
            entrants,
            [2048, 4096],
            QUICK,
            MACHINES["perlmutter"],
            steps.append,
        )
    return found, steps


def test_measures_the_same_on_every_rank() -> None:
    (found, steps), *others = ranks.run(_measure, 4)
    assert all(other == (found, steps) for other in others)
    assert len(steps) == 2 * (1 + QUICK.rounds)
    assert [(m.contender, m.num_bytes) for m in found] == [
        (name, size) for size in (2048, 4096) for name in ("torch", "nvrar", "auto")
    ]
    for m in found:
        assert len(m.samples_us) == QUICK.iterations * QUICK.rounds
        assert 0 < m.min_us <= m.percentile_us(10) <= m.median_us <= m.percentile_us(90) < 3e7
        if m.contender == "torch" or m.num_bytes > 2048:
            assert (m.plan, m.predicted_us) == (None, None)
        else:
            assert m.plan is not None
            assert m.predicted_us is not None
        fell_back = m.contender != "torch" and m.num_bytes > 2048
        assert sum(m.fallbacks.values()) == (len(m.samples_us) if fell_back else 0)


def _measure_wrong(rank: int, wrong_rank: int, error: float) -> tuple[str, list[str]]:
    group, steps = dist.group.WORLD, []
    with contenders(group, Topology(1, 3), ["nvrar"]) as entrants:
        entrants.append(Wrong(group, wrong_rank, error))
        try:
            measure(group, Topology(1, 3), entrants, [1024], QUICK, on_step=steps.append)
        except WrongResultError as caught:
            return str(caught), steps
    return "", steps


@pytest.mark.parametrize("error", [0.5, float("nan"), float("inf")])
def test_a_wrong_contender_ends_it_on_every_rank_before_any_timing(error: float) -> None:
    said = ranks.run(_measure_wrong, 3, 1, error)
    assert said[0] == said[1] == said[2]
    message, steps = said[0]
    assert message.startswith("wrong on 512 x torch.bfloat16 (sum, 1x3) is wrong on rank 1")
    assert "element 7" in message
    assert steps == ["checking 1 KiB"]


def _verify_in_pieces(rank: int, wrong_at: int | None) -> str:
    group = dist.group.WORLD
    with contenders(group, Topology(1, 2), ["two-shot"], max_bytes=1 << 30) as (_, ours):

        def all_reduce(x: Tensor) -> Any:
            ours.all_reduce(x, "max")
            if rank == 1 and wrong_at is not None:
                x[wrong_at] += 1
            return x, ours.plan_for(x.nbytes, x.dtype)

        try:
            verify(all_reduce, group, Topology(1, 2), 2_200_003, name="x", op="max")
        except WrongResultError as caught:
            return str(caught)
    return ""


def test_a_large_message_is_checked_to_its_end() -> None:
    assert ranks.run(_verify_in_pieces, 2, None) == ["", ""]
    said = ranks.run(_verify_in_pieces, 2, 2_200_002)
    assert said[0] == said[1]
    assert "wrong on rank 1: element 2200002" in said[0]


class OtherBits(TorchContender):
    """Within the rounding bound, yet not what the plan it claims would give."""

    name = "other-bits"

    def __init__(self, group: dist.ProcessGroup, claim: Any, rank: int | None = None) -> None:
        super().__init__(group)
        self._claim = claim
        self._is_off = rank is None or group.rank() == rank

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        self._claim.all_reduce(x, op)
        if self._is_off:
            x[3] = torch.nextafter(x[3], torch.tensor(torch.inf, dtype=x.dtype))
        return x

    def plan_for(self, num_bytes: int, dtype: torch.dtype) -> Any:
        return self._claim.plan_for(num_bytes, dtype)

    def fallbacks(self) -> Mapping[str, int]:
        return {}


def _measure_other_bits(rank: int) -> str:
    group, topology = dist.group.WORLD, Topology(2, 2)
    settings = Settings(torch.float32, iterations=1, rounds=1)
    with contenders(group, topology, ["nvrar"]) as (_, ours):
        try:
            measure(group, topology, [OtherBits(group, ours, 2)], [4096], settings)
        except WrongResultError as caught:
            return str(caught)
    return ""


def test_one_other_bit_is_wrong_too() -> None:
    said = set(ranks.run(_measure_other_bits, 4))
    assert len(said) == 1
    assert "rank 2" in min(said)
    assert "element 3" in min(said)
    assert "bit for bit" in min(said)
