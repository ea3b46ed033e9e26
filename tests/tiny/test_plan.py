"""The plan language: words, names, digits, parts, and errors that say what to do."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvrar.errors import PlanError, TopologyError
from nvrar.plan import PLAN_NAMES, Level, Plan, parts, prime_factors
from nvrar.topology import Topology

levels = st.builds(Level, st.sampled_from(["exchange", "split"]), st.integers(2, 7))
plans = st.lists(levels, max_size=4).map(lambda found: Plan(tuple(found)))
small_plans = plans.filter(lambda plan: plan.world_size <= 150)


@given(plans)
def test_print_and_parse_are_inverse(plan: Plan) -> None:
    assert Plan.parse(str(plan)) == plan
    assert Plan.parse(f"  {plan}\n".replace(" ", "  ")) == plan
    assert prod(plan.radices) == plan.world_size


@given(small_plans, st.data())
def test_digits_spell_the_position(plan: Plan, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, plan.world_size - 1))
    digits = plan.digits(position)
    assert all(0 <= d < k for d, k in zip(digits, plan.radices, strict=True))
    assert sum(d * s for d, s in zip(digits, plan.strides(), strict=True)) == position


@given(small_plans, st.data())
def test_members_differ_in_one_digit_alone(plan: Plan, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, plan.world_size - 1))
    for i, level in enumerate(plan.levels):
        members = plan.members(position, i)
        assert len(set(members)) == level.radix
        assert position in members
        for digit, member in enumerate(members):
            want = list(plan.digits(position))
            want[i] = digit
            assert plan.digits(member) == tuple(want)
            assert plan.members(member, i) == members


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 1000))
def test_parts_cut_a_span(start: int, length: int, radix: int, granule: int) -> None:
    cut = parts((start, start + length), radix, granule)
    assert len(cut) == radix
    assert cut[0][0] == start
    assert cut[-1][1] == start + length
    assert all(a[1] == b[0] for a, b in pairwise(cut))
    sizes = [stop - first for first, stop in cut]
    full = [size for size in sizes if size]
    assert all(sizes[: len(full)]), "empty parts come last"
    assert len(set(full[:-1])) <= 1
    assert all(size % granule == 0 for size in full[:-1])
    assert max(sizes) < length / radix + granule, "no part is longer than it needs to be"
    if full[1:]:
        assert full[-1] <= full[0]


def test_the_number_of_steps() -> None:
    assert Plan.parse("split:4 exchange:2 exchange:2").num_steps == 4
    assert Plan.parse("exchange:16").num_steps == 1
    assert Plan.parse("split:4 split:2").num_steps == 4
    assert Plan.parse("identity").num_steps == 0


@pytest.mark.parametrize(
    ("name", "shape", "word"),
    [
        ("one-shot", "2x4", "exchange:8"),
        ("two-shot", "2x4", "split:8"),
        ("nvrar", "8x4", "split:4 exchange:2 exchange:2 exchange:2"),
        ("nvrar", "12x4", "split:4 exchange:2 exchange:2 exchange:3"),
        ("nvrar", "7x1", "exchange:7"),
        ("nvrar", "1x6", "split:6"),
        ("direct", "3x4", "split:4 exchange:3"),
        ("halving-doubling", "6x2", "split:2 split:2 split:3"),
        *((name, "1x1", "identity") for name in PLAN_NAMES),
    ],
)
def test_named_plans(name: str, shape: str, word: str) -> None:
    assert str(Plan.named(name, Topology.parse(shape))) == word


@given(st.sampled_from(PLAN_NAMES), st.integers(1, 40), st.integers(1, 40))
def test_every_name_fits_every_topology(name: str, nodes: int, ranks: int) -> None:
    topology = Topology(nodes, ranks)
    plan = Plan.resolve(name, topology)
    assert plan.world_size == topology.world_size
    assert all(k > 1 for k in plan.radices)


@pytest.mark.parametrize("shape", ["1x1", "2x2", "3x4", "1x12", "8x8", "5x7"])
def test_all_plans_hold_the_named_and_no_plan_twice(shape: str) -> None:
    topology = Topology.parse(shape)
    plans = Plan.all(topology)
    assert len(set(plans)) == len(plans)
    assert {Plan.named(name, topology) for name in PLAN_NAMES} <= set(plans)
    assert all(plan.world_size == topology.world_size for plan in plans)
    assert list(plans) == sorted(plans, key=lambda p: (len(p.levels), str(p)))


def test_how_many_plans_there_are() -> None:
    """Ordered factorisations with a mode each: 2 for a prime, 6 for 4 (4, 2*2), and the two flat."""
    assert len(Plan.all(Topology(1, 7))) == 2
    assert len(Plan.all(Topology(4, 1))) == 6
    assert len(Plan.all(Topology(2, 3))) == 2 * 2 + 2
    assert len(Plan.all(Topology(4, 4))) == 6 * 6 + 2


@given(st.integers(1, 10_000))
def test_prime_factors(number: int) -> None:
    found = prime_factors(number)
    assert prod(found) == number
    assert list(found) == sorted(found)
    assert all(p > 1 and all(p % q for q in range(2, int(p**0.5) + 1)) for p in found)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("", "write exchange:K or split:K with K >= 2"),
        ("split", "'split' in plan 'split' is not a level"),
        ("split:4 ring:2", "'ring:2' in plan 'split:4 ring:2' is not a level"),
        ("split:4,exchange:2", "is not a level"),
        ("split:-2", "is not a level"),
        ("exchange:1", "radix 1 of a level; it must be a whole number of at least 2"),
        ("split:0", "radix 0 of a level; it must be a whole number of at least 2"),
        ("identity exchange:2", "'identity' in plan"),
        ("Split:4", "is not a level"),
        ("split:²", "is not a level"),
    ],
)
def test_a_word_that_does_not_read(word: str, message: str) -> None:
    with pytest.raises(PlanError) as error:
        Plan.parse(word)
    assert message in str(error.value)


@given(st.text(max_size=30))
def test_any_text_parses_or_is_a_plan_error(text: str) -> None:
    try:
        plan = Plan.parse(text)
    except PlanError:
        return
    assert Plan.parse(str(plan)) == plan


def test_a_word_that_does_not_fit_says_what_would() -> None:
    with pytest.raises(PlanError) as error:
        Plan.resolve("split:4 exchange:2", Topology(3, 4))
    assert str(error.value) == (
        "plan 'split:4 exchange:2' is for 8 ranks, the group has 12; "
        "the radices must multiply to 12, such as 'split:12'"
    )
    with pytest.raises(PlanError, match=r"is for 8 ranks, the group has 1; .* 'identity'"):
        Plan.resolve(Plan.parse("exchange:8"), Topology(1, 1))


def test_an_unknown_name_gives_the_names() -> None:
    with pytest.raises(
        PlanError, match=r"'ring' in plan 'ring' is not a level.*; or a name: nvrar, "
    ):
        Plan.resolve("ring", Topology(2, 2))
    with pytest.raises(PlanError, match="no plan is named 'ring'; the names are nvrar, one-shot"):
        Plan.named("ring", Topology(2, 2))
    with pytest.raises(PlanError, match="mode 'ring' is neither 'exchange' nor 'split'"):
        Level("ring", 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [None, 3, ["nvrar"], b"split:2"])
def test_what_is_no_text_is_neither_word_nor_name(value: object) -> None:
    with pytest.raises(PlanError, match="it must be a word, such as"):
        Plan.parse(value)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="no plan is named"):
        Plan.named(value, Topology(2, 2))  # type: ignore[arg-type]
    with pytest.raises(TopologyError, match="it must be a Topology, such as"):
        Plan.named("nvrar", value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "levels", [None, "split:2", Level("split", 2), ["split:2"], [("split", 2)]]
)
def test_levels_that_are_none(levels: object) -> None:
    with pytest.raises(PlanError, match=r"Plan.parse|is no Level"):
        Plan(levels)  # type: ignore[arg-type]


@pytest.mark.parametrize("radix", [2.5, "2", None, True, 1])
def test_a_radix_that_is_none(radix: object) -> None:
    with pytest.raises(PlanError, match="it must be a whole number of at least 2"):
        Level("split", radix)  # type: ignore[arg-type]


def test_plans_are_values() -> None:
    assert Plan.parse("split:2") == Plan((Level("split", 2),)) == Plan([Level("split", 2)])  # type: ignore[arg-type]
    assert len({Plan.parse("split:2"), Plan([Level("split", 2)])}) == 1  # type: ignore[arg-type]
