# SPDX-License-Identifier: Apache-2.0
"""A plan: the short list of levels that an all-reduce is made of, and the schedule it unrolls to.

A position is written in mixed radix, ``position = d0 + k0*(d1 + k1*(d2 + ...))``. At level ``i`` a rank
works with the ``k_i - 1`` others that differ from it in digit ``i`` alone:

- ``exchange:k``  all send their whole block to each other, and each sums the k blocks;
- ``split:k``     part j of the block goes to the member with digit j, which sums it; the remaining
  levels run on that part only; then every member sends its finished part to the others.

``exchange:k`` is a step of recursive multiplying (recursive doubling for k = 2), ``split:k`` a
reduce-scatter with its all-gather around the rest (Rabenseifner's halving-doubling for k = 2; Thakur,
Rabenseifner and Gropp 2005). Pure: values in, values out. The executors only carry out :meth:`Plan.schedule`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import prod
from typing import Literal, get_args

from nvrar.errors import PlanError, TopologyError
from nvrar.topology import Topology

Mode = Literal["exchange", "split"]
Span = tuple[int, int]  # first element and one past the last
PLAN_NAMES = ("nvrar", "one-shot", "two-shot", "direct", "halving-doubling")
IDENTITY = "identity"  # the word of the plan of one rank: no levels
_LEVEL = re.compile(rf"({'|'.join(get_args(Mode))}):([0-9]+)")


@dataclass(frozen=True, slots=True)
class Level:
    mode: Mode
    radix: int

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise PlanError(f"mode {self.mode!r} is neither 'exchange' nor 'split'")
        if not isinstance(self.radix, int) or self.radix < 2:  # True is below 2
            raise PlanError(
                f"radix {self.radix!r} of a level; it must be a whole number of at least 2 (leave 1 out)"
            )

    def __str__(self) -> str:
        return f"{self.mode}:{self.radix}"


@dataclass(frozen=True, slots=True)
class Step:
    """One round of messages of one rank, and what it does with what arrives.

    A ``reduce`` step sums what the members hold of ``span``, in digit order, and leaves the sum there.
    A ``gather`` step only receives finished spans. Within a step all sends are of data that the step
    itself does not overwrite before they are complete.
    """

    phase: Literal["reduce", "gather"]
    level: int
    members: tuple[int, ...]  # positions in digit order, this rank's own included
    digit: int  # which of the members this rank is
    span: Span  # finished here: this rank's sum (reduce), or its finished part (gather)
    sends: tuple[Span, ...]  # by digit; what the member there is sent
    receives: tuple[Span, ...]  # by digit; what the member there sends

    def peers(self) -> Iterator[tuple[int, int]]:
        """``(digit, position)`` of the others."""
        return ((d, p) for d, p in enumerate(self.members) if d != self.digit)


def parts(span: Span, radix: int, granule: int) -> tuple[Span, ...]:
    """``span`` cut into ``radix`` consecutive parts, all but the last non-empty one of equal length.

    Lengths are multiples of ``granule`` elements except at the end; parts at the end may be empty.
    """
    start, stop = span
    share = -(-(stop - start) // (radix * granule)) * granule
    cuts = [min(start + j * share, stop) for j in range(radix + 1)]
    return tuple(pairwise(cuts))


@dataclass(frozen=True, slots=True)
class Plan:
    """An all-reduce algorithm, as levels. ``str(plan)`` is its word and ``Plan.parse`` reads it back."""

    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        if isinstance(self.levels, (str, Level)) or not isinstance(self.levels, Iterable):
            raise PlanError(f"levels are {self.levels!r}; give Levels, or a word to Plan.parse")
        object.__setattr__(self, "levels", tuple(self.levels))  # plans are keys of caches
        wrong = [level for level in self.levels if not isinstance(level, Level)]
        if wrong:
            raise PlanError(f"{wrong[0]!r} is no Level, such as Level('split', 4)")

    @property
    def world_size(self) -> int:
        return prod(level.radix for level in self.levels)

    @property
    def radices(self) -> tuple[int, ...]:
        """All that the rounding of the result depends on."""
        return tuple(level.radix for level in self.levels)

    @property
    def inner_parts(self) -> int:
        """Parts of the block that the first split leaves to a rank: what a GPU's kernel has in registers."""
        splits = [level.radix for level in self.levels if level.mode == "split"]
        return prod(splits[1:])

    @property
    def num_steps(self) -> int:
        """Message latencies on the way from first to last byte."""
        return sum(2 if level.mode == "split" else 1 for level in self.levels)

    def __str__(self) -> str:
        return " ".join(map(str, self.levels)) or IDENTITY

    # -- digits ------------------------------------------------------------------------------------

    def strides(self) -> tuple[int, ...]:
        """Distance in position between neighbours of each level."""
        return tuple(prod(self.radices[:i]) for i in range(len(self.levels)))

    def digits(self, position: int) -> tuple[int, ...]:
        return tuple(position // s % k for s, k in zip(self.strides(), self.radices, strict=True))

    def members(self, position: int, level: int) -> tuple[int, ...]:
        """Positions that ``position`` works with at ``level``, in digit order, itself included."""
        stride, radix = self.strides()[level], self.radices[level]
        first = position - (position // stride % radix) * stride
        return tuple(first + j * stride for j in range(radix))

    def schedule(self, position: int, length: int, granule: int = 1) -> tuple[Step, ...]:
        """The steps of the rank at ``position`` for ``length`` elements, in order.

        ``granule`` is the smallest number of elements that a part is cut to (see :func:`parts`).
        """
        down: list[Step] = []
        up: list[Step] = []
        block: Span = (0, length)
        digits = self.digits(position)
        for i, level in enumerate(self.levels):
            members, digit = self.members(position, i), digits[i]
            if level.mode == "exchange":
                cut = (block,) * level.radix
            else:
                cut = parts(block, level.radix, granule)
            own = cut[digit]
            same = (own,) * level.radix
            down.append(Step("reduce", i, members, digit, own, sends=cut, receives=same))
            if level.mode == "split":
                up.append(Step("gather", i, members, digit, own, sends=same, receives=cut))
            block = own
        return (*down, *reversed(up))

    def check(self, world_size: int) -> None:
        """Raises PlanError unless the radices multiply to ``world_size``."""
        if self.world_size != world_size:
            raise PlanError(
                f"plan '{self}' is for {self.world_size} ranks, the group has {world_size}; "
                f"the radices must multiply to {world_size}, such as "
                f"'{Plan.named('nvrar', Topology(1, world_size))}'"
            )

    # -- making plans ------------------------------------------------------------------------------

    @classmethod
    def parse(cls, word: str) -> Plan:
        """``"split:4 exchange:2"`` as a Plan.

        Raises:
            PlanError: the word does not read as levels ``exchange:K`` and ``split:K`` with K >= 2.
        """
        if not isinstance(word, str):
            raise PlanError(f"plan is {word!r}; it must be a word, such as 'split:4 exchange:2'")
        tokens = word.split()
        if tokens == [IDENTITY]:
            return cls(())
        matches = [_LEVEL.fullmatch(token) for token in tokens]
        if not tokens or not all(matches):
            wrong = next((t for t, m in zip(tokens, matches, strict=True) if not m), word)
            raise PlanError(
                f"{wrong!r} in plan {word!r} is not a level: write exchange:K or split:K with K >= 2, "
                f"separated by spaces, or '{IDENTITY}' for one rank"
            )
        return cls(tuple(Level(m[1], int(m[2])) for m in matches if m))  # type: ignore[arg-type]

    @classmethod
    def named(cls, name: str, topology: Topology) -> Plan:
        """A well-known algorithm on ``topology``.

        - ``one-shot``          exchange:P
        - ``two-shot``          split:P
        - ``nvrar``             split:G, then an exchange for every prime factor of N (arXiv 2511.09557
          for N a power of two: recursive doubling; else recursive multiplying)
        - ``direct``            split:G exchange:N
        - ``halving-doubling``  split:G, then a split for every prime factor of N (Rabenseifner)

        Raises:
            PlanError: an unknown name.
            TopologyError: no Topology.
        """
        if name not in PLAN_NAMES:
            raise PlanError(f"no plan is named {name!r}; the names are {', '.join(PLAN_NAMES)}")
        if not isinstance(topology, Topology):
            raise TopologyError(
                f"topology is {topology!r}; it must be a Topology, such as Topology.parse('2x4')"
            )
        nodes, ranks = topology.num_nodes, topology.ranks_per_node
        words: dict[str, list[tuple[Mode, int]]] = {
            "one-shot": [("exchange", topology.world_size)],
            "two-shot": [("split", topology.world_size)],
            "nvrar": [("split", ranks), *(("exchange", k) for k in prime_factors(nodes))],
            "direct": [("split", ranks), ("exchange", nodes)],
            "halving-doubling": [("split", ranks), *(("split", k) for k in prime_factors(nodes))],
        }
        return cls(tuple(Level(mode, radix) for mode, radix in words[name] if radix > 1))

    @classmethod
    def resolve(cls, text: str | Plan, topology: Topology) -> Plan:
        """``text`` as a name or a word, checked against the topology's number of ranks."""
        if isinstance(text, str):
            named = text in PLAN_NAMES
            plan = cls.named(text, topology) if named else cls._parse_or_explain(text)
        else:
            plan = text
        plan.check(topology.world_size)
        return plan

    @classmethod
    def _parse_or_explain(cls, text: str) -> Plan:
        try:
            return cls.parse(text)
        except PlanError as error:
            raise PlanError(f"{error}; or a name: {', '.join(PLAN_NAMES)}") from None

    @classmethod
    def all(cls, topology: Topology) -> tuple[Plan, ...]:
        """Every plan worth trying: ordered factorisations of G, then of N, with a mode for each level,
        and the flat one-shot and two-shot. Sorted by number of levels, then by word."""
        hierarchical = {
            cls(local + cross)
            for local in _level_lists(topology.ranks_per_node)
            for cross in _level_lists(topology.num_nodes)
        }
        flat = {cls.named(name, topology) for name in ("one-shot", "two-shot")}
        return tuple(sorted(hierarchical | flat, key=lambda p: (len(p.levels), str(p))))


def prime_factors(number: int) -> tuple[int, ...]:
    """In ascending order, with multiplicity; empty for 1."""
    for p in range(2, int(number**0.5) + 1):
        if number % p == 0:
            return (p, *prime_factors(number // p))
    return (number,) if number > 1 else ()


@cache
def _level_lists(number: int) -> tuple[tuple[Level, ...], ...]:
    """Every list of levels whose radices multiply to ``number``."""
    if number == 1:
        return ((),)
    return tuple(
        (Level(mode, radix), *rest)
        for radix in range(2, number + 1)
        if number % radix == 0
        for mode in get_args(Mode)
        for rest in _level_lists(number // radix)
    )
