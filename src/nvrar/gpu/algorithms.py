# SPDX-License-Identifier: Apache-2.0
"""Which plan in which packets for which size, and what workspace that takes. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nvrar.gpu.layout import FORMATS, KB, LL, LL128, Format, LaunchShape, num_parts
from nvrar.plan import Plan
from nvrar.tune import Choice

NVLINK = "nvlink"  # the link (nvrar.table.Key.link) that keeps 128-byte lines whole

# Up to so many bytes a part, LL is as fast as LL128 over NVLink or faster; it needs fewer instructions.
# Measured on 2x H200 (benchmarks/): 2.68 us against 2.70 at 1 KB, 2.79 against 2.73 at 4 KB.
LL_PART_BYTES = 2048
_ROW_SLACK = 256 * KB  # so that rows of small messages have room; of large ones the rest is little


@dataclass(frozen=True)
class Algorithm:
    """How one size is reduced; equal on all ranks. ``shape`` None: as :func:`nvrar.gpu.layout.launch_shape`
    says."""

    plan: Plan
    packets: Format
    shape: LaunchShape | None = None


class Algorithms:
    """For sizes up to ``max_bytes``, told apart by their next power of two.

    Args:
        choose: what to do for a size in bytes.
        link: how the peers are reached; LL128 takes NVLINK.
    """

    def __init__(self, choose: Callable[[int], Choice], max_bytes: int, link: str) -> None:
        self._by_exponent = [
            _algorithm(choose(1 << exponent), 1 << exponent, link)
            for exponent in range(max(max_bytes - 1, 0).bit_length() + 1)
        ]
        self._max_bytes = max_bytes
        self._row_packets = LL128 if link == NVLINK else LL

    def of(self, num_bytes: int) -> Algorithm:
        """The algorithm for a message of ``num_bytes``, at most ``max_bytes``."""
        return self._by_exponent[max(num_bytes - 1, 0).bit_length()]

    def of_rows(self, num_bytes: int) -> Algorithm:
        """The same where the launch goes on with the norm of rows. Tables have not measured that: there LL,
        which takes four times the warps a row, was no faster from 2 KB to 64 KB, and slower with rows of
        16 KB (two ranks that share an H200; docs/protocol.md)."""
        return Algorithm(self.of(num_bytes).plan, self._row_packets)

    def largest(self) -> dict[Algorithm, int]:
        """Every algorithm that may run, with the bytes of its largest message; rows are filled up to whole
        chunks."""
        found: dict[Algorithm, int] = {}
        for exponent, algorithm in enumerate(self._by_exponent):
            num_bytes = min(1 << exponent, max(self._max_bytes, 1))
            found[algorithm] = max(num_bytes, found.get(algorithm, 0))
            found[self.of_rows(num_bytes)] = num_bytes + min(num_bytes, _ROW_SLACK)
        return found


def _algorithm(choice: Choice, num_bytes: int, link: str) -> Algorithm:
    measured = choice.measured
    if measured is not None and measured.packets and (link == NVLINK or measured.packets == "LL"):
        shape = None
        if measured.blocks and measured.threads:
            shape = LaunchShape(measured.blocks, measured.threads)
        return Algorithm(choice.plan, FORMATS[measured.packets], shape)
    small = num_bytes <= LL_PART_BYTES * num_parts(choice.plan)
    return Algorithm(choice.plan, LL if small or link != NVLINK else LL128)
