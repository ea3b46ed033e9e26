"""Proof by symbols: what `Plan.schedule` computes, for every plan of every topology up to 36 ranks.

The schedules of all ranks are carried out on expressions instead of numbers: ``(p, e)`` is element e
of the input of position p, and a sum is the tuple of its terms in the order they are added. Equal
expressions are stored once (hash-consed) and known by a number, so that comparing two is comparing
numbers. It is the same schedule that `nvrar/host.py` carries out on tensors.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvrar.plan import Level, Plan, Span, Step
from nvrar.topology import Topology

TOPOLOGIES = [
    Topology(nodes, ranks)
    for nodes in range(1, 37)
    for ranks in range(1, 37)
    if nodes * ranks <= 36
]
UNWRITTEN = None
Expression = int
Memory = list[Expression | None]

_sums: dict[tuple[Expression, ...], Expression] = {}
_terms: list[tuple[Expression, ...]] = []


def leaf(position: int, element: int) -> Expression:
    """An input, as a negative number."""
    return -1 - (position * 4096 + element)


def add(terms: list[Expression]) -> Expression:
    """The sum of ``terms`` in this order; the same number for the same terms in the same order."""
    key = tuple(terms)
    number = _sums.get(key)
    if number is None:
        number = _sums[key] = len(_terms)
        _terms.append(key)
    return number


def leaves(expression: Expression) -> list[tuple[int, int]]:
    """Every input in it as (position, element), as often as it is counted."""
    if expression < 0:
        return [divmod(-1 - expression, 4096)]
    return [found for term in _terms[expression] for found in leaves(term)]


def expected(radices: tuple[int, ...], element: int) -> Expression:
    """The expression that the radices alone ask for: digit by digit, each in order 0..k-1."""
    values = [leaf(p, element) for p in range(prod(radices))]
    for radix in radices:
        values = [add(values[i : i + radix]) for i in range(0, len(values), radix)]
    return values[0]


def carry_out(plan: Plan, length: int, granule: int = 1, in_place: bool = False) -> list[Memory]:
    """Every rank's result. Asserts on the way that the ranks' steps fit each other."""
    everyone = range(plan.world_size)
    schedules = [plan.schedule(p, length, granule) for p in everyone]
    assert {len(s) for s in schedules} == {plan.num_steps}
    inputs: list[Memory] = [[leaf(p, e) for e in range(length)] for p in everyone]
    results: list[Memory] = inputs if in_place else [[UNWRITTEN] * length for _ in everyone]
    source = inputs  # as in host.py: until the first sum is written, a rank's block is its input
    for steps in zip(*schedules, strict=True):
        assert_fit(steps)
        # All messages of a step are under way at once: read everything before writing anything.
        sent = {
            (p, peer): source[p][slice(*step.sends[d])]
            for p, step in enumerate(steps)
            for d, peer in step.peers()
        }
        assert not any(UNWRITTEN in block for block in sent.values()), "sends what it does not have"
        if steps[0].phase == "reduce":
            sums = [reduced(p, step, source[p], sent) for p, step in enumerate(steps)]
            for p, step in enumerate(steps):
                results[p][slice(*step.span)] = sums[p]
            source = results
        else:
            assert source is results
            for p, step in enumerate(steps):
                for d, peer in step.peers():
                    results[p][slice(*step.receives[d])] = sent[peer, p]
    return results if plan.levels else inputs


def reduced(position: int, step: Step, own: Memory, sent: dict[tuple[int, int], Memory]) -> Memory:
    contributions = [sent[peer, position] for _, peer in step.peers()]
    contributions.insert(step.digit, own[slice(*step.span)])
    return [add(terms) for terms in zip(*contributions, strict=True)]  # type: ignore[arg-type]


def assert_fit(steps: tuple[Step, ...]) -> None:
    """One step of all ranks: what one sends, the other expects; and nobody writes what is being sent."""
    assert len({(step.phase, step.level) for step in steps}) == 1
    for position, step in enumerate(steps):
        assert step.members[step.digit] == position
        for digit, peer in step.peers():
            theirs = steps[peer]
            assert theirs.members == step.members
            assert theirs.digit == digit
            assert step.sends[digit] == theirs.receives[step.digit]
            if step.phase == "reduce":
                assert step.receives[digit] == step.span, "contributions must be of one span"
        if step.phase == "gather":
            written = [step.receives[digit] for digit, _ in step.peers()]
            kept = {step.sends[digit] for digit, _ in step.peers()}
            assert kept == {step.span}, "only the finished part is sent"
            assert not any_overlap([*written, step.span])


def any_overlap(spans: list[Span]) -> bool:
    full = sorted(span for span in spans if span[0] < span[1])
    return any(first[1] > second[0] for first, second in pairwise(full))


def assert_is_all_reduce(plan: Plan, length: int, granule: int = 1, in_place: bool = False) -> None:
    want = [expected(plan.radices, e) for e in range(length)]
    for result in carry_out(plan, length, granule, in_place):
        assert result == want


@pytest.mark.parametrize("num_ranks", range(1, 37))
def test_every_plan_sums_in_the_order_of_its_radices(num_ranks: int) -> None:
    """All ranks hold, at every element, the one expression that the radices alone determine; modes,
    length and position of the element do not appear in it."""
    for topology in (t for t in TOPOLOGIES if t.world_size == num_ranks):
        for plan in Plan.all(topology):
            cuts = prod(level.radix for level in plan.levels if level.mode == "split")
            # One element for most parts empty; one more than the parts, and one less than two each,
            # for ragged ones.
            lengths = {0, 1, cuts + 1, 2 * cuts - 1} if num_ranks <= 24 else {cuts + 1}
            for length in lengths:
                assert_is_all_reduce(plan, length)
            assert_is_all_reduce(plan, cuts + 1, in_place=True)


@pytest.mark.parametrize("num_ranks", range(1, 37))
def test_the_order_counts_every_input_once(num_ranks: int) -> None:
    once = [(p, 7) for p in range(num_ranks)]
    for radices in {
        p.radices for t in TOPOLOGIES if t.world_size == num_ranks for p in Plan.all(t)
    }:
        assert sorted(leaves(expected(radices, 7))) == once


def test_different_radices_are_different_sums() -> None:
    """Else the proof above would hold for an order that ignored the radices."""
    radices = {p.radices for t in TOPOLOGIES if t.world_size == 24 for p in Plan.all(t)}
    assert len({expected(r, 0) for r in radices}) == len(radices) > 10


levels = st.lists(
    st.builds(Level, st.sampled_from(["exchange", "split"]), st.integers(2, 5)), max_size=4
)
plans = levels.map(lambda found: Plan(tuple(found))).filter(lambda plan: plan.world_size <= 48)
LENGTHS = st.one_of(st.sampled_from([0, 1, 2, 3, 5, 7, 31, 97, 211]), st.integers(0, 300))


@settings(max_examples=150)
@given(plans, LENGTHS, st.integers(1, 64), st.booleans())
def test_any_list_of_levels_any_length_any_granule(
    plan: Plan, length: int, granule: int, in_place: bool
) -> None:
    assert_is_all_reduce(plan, length, granule, in_place)


@pytest.mark.parametrize(
    ("position", "wrong"),
    [
        (0, "sends"),
        (1, "receives"),
        (2, "span"),
    ],
)
def test_the_proof_sees_a_wrong_schedule(
    monkeypatch: pytest.MonkeyPatch, position: int, wrong: str
) -> None:
    """One span of one rank shifted by one element must not go unnoticed."""
    from dataclasses import replace

    true_schedule = Plan.schedule

    def schedule(plan: Plan, at: int, length: int, granule: int = 1) -> tuple[Step, ...]:
        steps = list(true_schedule(plan, at, length, granule))
        if at == position:
            shifted = getattr(steps[1], wrong)
            if wrong == "span":
                shifted = (shifted[0] + 1, shifted[1])
            else:
                shifted = tuple((a, b - 1) for a, b in shifted)
            steps[1] = replace(steps[1], **{wrong: shifted})
        return tuple(steps)

    monkeypatch.setattr(Plan, "schedule", schedule)
    with pytest.raises((AssertionError, ValueError)):
        assert_is_all_reduce(Plan.parse("split:2 exchange:2 split:2"), 64)
