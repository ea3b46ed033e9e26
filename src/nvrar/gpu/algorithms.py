"""Which plan in which packets for which size, and what workspace that takes. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nvrar.gpu.layout import LL, LL128, Format, num_parts
from nvrar.plan import Plan

# Up to so many bytes a part, LL is as fast as LL128 over NVLink or faster; it needs fewer instructions.
# Measured on 2x H200 (benchmarks/): 2.68 us against 2.70 at 1 KB, 2.79 against 2.73 at 4 KB.
LL_PART_BYTES = 2048


@dataclass(frozen=True)
class Algorithm:
    """How one size is reduced; equal on all ranks."""

    plan: Plan
    packets: Format


class Algorithms:
    """For sizes up to ``max_bytes``, told apart by their next power of two.

    Args:
        choose: the plan for a size in bytes.
        lines_travel_whole: whether LL128 may be used: every link keeps 128-byte lines whole.
    """

    def __init__(
        self, choose: Callable[[int], Plan], max_bytes: int, lines_travel_whole: bool
    ) -> None:
        self._by_exponent = []
        for exponent in range(max(max_bytes - 1, 0).bit_length() + 1):
            plan = choose(1 << exponent)
            small = 1 << exponent <= LL_PART_BYTES * num_parts(plan)
            packets = LL if small or not lines_travel_whole else LL128
            self._by_exponent.append(Algorithm(plan, packets))
        self._max_bytes = max_bytes

    def of(self, num_bytes: int) -> Algorithm:
        """The algorithm for a message of ``num_bytes``, at most ``max_bytes``."""
        return self._by_exponent[max(num_bytes - 1, 0).bit_length()]

    def largest(self) -> dict[Algorithm, int]:
        """Every algorithm that may run, with the bytes of its largest message."""
        return {
            algorithm: min(1 << exponent, max(self._max_bytes, 1))
            for exponent, algorithm in enumerate(self._by_exponent)
        }
