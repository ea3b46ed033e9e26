"""The host executor on real processes: every plan, type, operation, layout and awkward length.

Equality is asked for, bit by bit, with `testing.reference_all_reduce`, which adds in the plan's order
in one process; that reference is held against an fp64 sum by a bound derived from its roundings.
"""

from __future__ import annotations

import gc
import hashlib
import os
import random
import time
from collections.abc import Iterator

import psutil
import pytest
import torch
from torch import Tensor

from nvrar import Communicator, Plan, Topology
from nvrar.host import DTYPES
from nvrar.plan import PLAN_NAMES
from nvrar.testing import reference_all_reduce
from ranks import run

pytestmark = pytest.mark.host

TYPES = sorted(DTYPES, key=str)
LENGTHS = [0, 1, 2, 3, 5, 7, 13, 31, 64, 97, 211, 1000, 4099]
FLOATS = [t for t in TYPES if t.is_floating_point]


def inputs_for(world_size: int, length: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Every rank's input, [P, length]: the same on all ranks, of mixed magnitudes and signs."""
    generator = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        return torch.randint(-1000, 1000, (world_size, length), generator=generator, dtype=dtype)
    values = torch.randn(world_size, length, generator=generator, dtype=torch.float64)
    return (values * 2.0 ** torch.randint(-4, 5, values.shape, generator=generator)).to(dtype)


def bits(x: Tensor) -> Tensor:
    """For comparisons in which -0.0 is not 0.0 and nan is nan."""
    x = x.contiguous()
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def assert_same_bits(found: Tensor, want: Tensor, what: object) -> None:
    assert found.dtype == want.dtype
    assert found.shape == want.shape
    assert torch.equal(bits(found), bits(want)), f"{what}: {found} is not {want}"


def ops_of(dtype: torch.dtype) -> list[str]:
    return ["sum", "max", "min", *(["avg"] if dtype.is_floating_point else [])]


def every_combination(rank: int, topology: Topology, words: list[str]) -> str:
    """All plans x types x operations x lengths; a digest of all results."""
    digest = hashlib.sha256()
    # Of one seed per case, not per plan: plans of equal radices must give equal bits.
    by_radices: dict[object, Tensor] = {}
    for word in words:
        comm = Communicator(topology=topology, plan=word)
        for dtype in TYPES:
            for length in LENGTHS:
                inputs = inputs_for(topology.world_size, length, dtype, seed=length)
                for op in ops_of(dtype):
                    case = (word, dtype, length, op)
                    x = inputs[rank].clone()
                    y = comm.all_reduce(x, op=op)
                    assert_same_bits(x, inputs[rank], case)  # the input is left alone
                    if length:
                        assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
                    want = reference_all_reduce(inputs, comm.plan, op)
                    assert_same_bits(y, want, case)
                    digest.update(bits(y).numpy().tobytes())
                    key = (comm.plan.radices, dtype, length, op)
                    assert_same_bits(y, by_radices.setdefault(key, y), case)
        assert comm.stats.fallbacks == {}
    return digest.hexdigest()


SMALL = ["1x1", "1x2", "2x1", "1x3", "2x2"]
LARGE = ["5x1", "1x6", "3x3", "7x1"]


@pytest.mark.parametrize("shape", SMALL)
def test_every_plan_on_small_topologies(shape: str) -> None:
    topology = Topology.parse(shape)
    words = [str(plan) for plan in Plan.all(topology)]
    assert len(set(run(every_combination, topology.world_size, topology, words))) == 1


def sampled(rank: int, topology: Topology, words: list[str], num_calls: int) -> str:
    """Random cases of the same kind, in and out of place, for topologies too large for all."""
    digest = hashlib.sha256()
    choice = random.Random(17)
    comms = {word: Communicator(topology=topology, plan=word) for word in words}
    for i in range(num_calls):
        word = words[i % len(words)]
        dtype = choice.choice(TYPES)
        op = choice.choice(ops_of(dtype))
        length = choice.choice([*LENGTHS[:9], choice.randrange(300)])
        inputs = inputs_for(topology.world_size, length, dtype, seed=i)
        x = inputs[rank].clone()
        y = comms[word].all_reduce(x, op=op, out=x if i % 3 == 0 else None)
        want = reference_all_reduce(inputs, comms[word].plan, op)
        assert_same_bits(y, want, (i, word, dtype, op, length))
        digest.update(bits(y).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("shape", LARGE)
def test_named_plans_on_larger_topologies(shape: str) -> None:
    topology = Topology.parse(shape)
    words = sorted({str(Plan.named(name, topology)) for name in PLAN_NAMES})
    assert len(set(run(sampled, topology.world_size, topology, words, 150))) == 1


def layouts(rank: int) -> None:
    """Any strides in, any strides out, in place and out of place."""
    topology = Topology(2, 2)
    comm = Communicator(topology=topology, plan="split:2 exchange:2")
    wide = Communicator(topology=topology, plan="split:2 exchange:2", wire_dtype=torch.float32)
    for dtype in TYPES:
        for shape in ((6, 5), (1, 7), (3, 0), (), (2, 3, 5)):
            inputs = inputs_for(4, 2 * torch.Size(shape).numel(), dtype, seed=3)
            inputs = inputs[:, : torch.Size(shape).numel()].reshape(4, *shape)
            for communicator in (comm, wide):
                want = reference_all_reduce(
                    inputs, comm.plan, wire_dtype=communicator.wire_dtype
                ).reshape(shape)
                for make in LAYOUTS:
                    for make_out in LAYOUTS:
                        x, out = make(inputs[rank]), make_out(torch.zeros(shape, dtype=dtype))
                        assert communicator.all_reduce(x, out=out) is out
                        assert_same_bits(out, want, (dtype, shape, make, make_out))
                        assert_same_bits(x, inputs[rank], "the input is left alone")
                    x = make(inputs[rank])
                    assert communicator.all_reduce(x, out=x) is x
                    assert_same_bits(x, want, (dtype, shape, make, "in place"))
                    x = make(inputs[rank])
                    y = communicator.all_reduce(x)
                    assert y.is_contiguous()
                    assert_same_bits(y, want, (dtype, shape, make, "new"))


def dense(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def transposed(x: Tensor) -> Tensor:
    return dense(x.mT).mT if x.dim() >= 2 else dense(x)


def strided(x: Tensor) -> Tensor:
    """Every second element of a larger tensor, away from its start."""
    host = torch.full((*x.shape, 2), 77, dtype=x.dtype)
    host[..., 1] = x
    return host[..., 1]


LAYOUTS = (dense, transposed, strided)


def test_layouts() -> None:
    run(layouts, 4)


def columns(rank: int) -> None:
    """x and out are columns of one matrix: they interleave, and share no element."""
    comm = Communicator(plan="two-shot")
    matrix = torch.zeros(5, 6)
    matrix[:, :3] = rank + 1
    comm.all_reduce(matrix[:, :3], out=matrix[:, 3:])
    assert torch.equal(matrix[:, 3:], torch.full((5, 3), 3.0))
    assert torch.equal(matrix[:, :3], torch.full((5, 3), rank + 1.0))
    view = matrix[0, :3]
    comm.all_reduce(matrix[0, :3], out=view)  # the same memory by another name is in place
    assert torch.equal(matrix[0, :3], torch.full((3,), 3.0))


def test_columns_of_one_matrix() -> None:
    run(columns, 2)


def special_values(rank: int, words: list[str]) -> str:
    digest = hashlib.sha256()
    zero, inf, nan = 0.0, float("inf"), float("nan")
    rows = torch.tensor(
        [
            [-zero, -zero, zero, inf, inf, nan, 1.0, inf, -inf, -zero, -nan],
            [-zero, zero, -zero, inf, -inf, 1.0, nan, 1.0, 1.0, -1.0, nan],
            [-zero, zero, -zero, 1.0, 1.0, 1.0, -nan, inf, -inf, 1.0, 1.0],
            [-zero, zero, -zero, -1.0, 1.0, -nan, 1.0, 2.0, inf, -zero, nan],
        ],
        dtype=torch.float64,
    ).repeat(1, 7)  # so that vector loops and their tails see them all
    by_radices: dict[object, Tensor] = {}
    for word in words:
        comm = Communicator(topology=Topology(2, 2), plan=word)
        for dtype in FLOATS:
            inputs = rows.to(dtype)
            for op in ops_of(dtype):
                y = comm.all_reduce(inputs[rank], op=op)
                exact = {
                    "sum": rows.sum(0),
                    "avg": rows.mean(0),
                    "max": rows.amax(0),
                    "min": rows.amin(0),
                }
                assert torch.equal(y.isnan(), exact[op].isnan()), (word, dtype, op)
                found, want = y.masked_fill(y.isnan(), 9), exact[op].masked_fill(y.isnan(), 9)
                assert torch.equal(found, want.to(dtype)), (word, dtype, op)
                if op in ("sum", "avg"):
                    assert y[0].signbit(), "the sum of negative zeros is negative zero"
                    assert not y[1].signbit()
                assert_same_bits(y, reference_all_reduce(inputs, comm.plan, op), (word, dtype, op))
                assert_same_bits(y, by_radices.setdefault((comm.plan.radices, dtype, op), y), word)
                digest.update(bits(y).numpy().tobytes())
    return digest.hexdigest()


def test_negative_zero_infinity_and_nan() -> None:
    words = [str(plan) for plan in Plan.all(Topology(2, 2))]
    assert len(set(run(special_values, 4, words))) == 1


def wide_wire(rank: int) -> None:
    """fp32 across levels and one rounding at the end; other types are untouched by it."""
    topology = Topology(2, 2)
    for word in ("split:2 exchange:2", "exchange:2 split:2", "split:4"):
        comm = Communicator(topology=topology, plan=word, wire_dtype=torch.float32)
        for dtype in TYPES:
            inputs = inputs_for(4, 301, dtype, seed=11)
            for op in ops_of(dtype):
                y = comm.all_reduce(inputs[rank], op=op)
                want = reference_all_reduce(inputs, comm.plan, op, wire_dtype=torch.float32)
                assert_same_bits(y, want, (word, dtype, op))
                if dtype.itemsize == 2:  # exactly the fp32 result, rounded once
                    once = reference_all_reduce(inputs.float(), comm.plan, op).to(dtype)
                    assert_same_bits(y, once, (word, dtype, op))
                else:
                    assert_same_bits(y, reference_all_reduce(inputs, comm.plan, op), (word, dtype))
    narrow = Communicator(topology=topology, plan="split:2 exchange:2")
    inputs = inputs_for(4, 4000, torch.bfloat16, seed=12)
    exact = inputs.double().sum(0)
    y, narrow_y = (c.all_reduce(inputs[rank]).double() for c in (comm, narrow))
    assert (y - exact).abs().mean() < 0.8 * (narrow_y - exact).abs().mean()


def test_fp32_wire() -> None:
    run(wide_wire, 4)


def placed_cyclically(rank: int) -> None:
    """A placement order that is no identity: plans are in positions, data in ranks."""
    order = (0, 2, 1, 3) if dist_size() == 4 else (3, 0, 5, 1, 4, 2)
    topology = Topology(2, len(order) // 2, order)
    inputs = inputs_for(len(order), 53, torch.float32, seed=5)
    for plan in Plan.all(topology):
        comm = Communicator(topology=topology, plan=plan)
        y = comm.all_reduce(inputs[rank])
        assert_same_bits(y, reference_all_reduce(inputs, plan, topology=topology), plan)


def dist_size() -> int:
    return torch.distributed.get_world_size()


@pytest.mark.parametrize("world_size", [4, 6])
def test_placement_order(world_size: int) -> None:
    run(placed_cyclically, world_size)


def with_delays(rank: int, num_calls: int) -> None:
    """Back to back, of changing size, type and plan, while ranks are late at random."""
    topology = Topology(2, 2)
    comm = Communicator(topology=topology, plan="auto")
    sizes, delays = random.Random(1), random.Random(100 + rank)
    table = inputs_for(4, 6000, torch.float32, seed=1)
    for i in range(num_calls):
        length = sizes.choice([0, 1, 2, 3, 17, 64, 1023, sizes.randrange(6000)])
        start = sizes.randrange(6000 - length)
        dtype = (torch.float32, torch.bfloat16, torch.float64)[i % 3]
        inputs = table[:, start : start + length].to(dtype)
        x = inputs[rank].clone()
        if delays.random() < 0.03:
            time.sleep(delays.random() * 0.02)
        y = comm.all_reduce(x, out=x if i % 2 else None)
        want = reference_all_reduce(inputs, comm.plan_for(x.nbytes, dtype))
        assert torch.equal(y, want), f"call {i}, {length} x {dtype}"
    assert comm.stats.calls == num_calls


def test_thousands_of_calls_with_late_ranks() -> None:
    run(with_delays, 4, 2000, timeout_s=120)


def resident_bytes(rank: int, num_calls: int) -> list[int]:
    """Resident memory after each of four equal stretches of calls."""
    comm = Communicator(plan="exchange:2", topology=Topology(1, 2))
    process = psutil.Process(os.getpid())
    x, seen = torch.ones(50), []
    for _ in range(4):
        for _ in range(num_calls):
            comm.all_reduce(x)
        gc.collect()
        seen.append(process.memory_info().rss)
    return seen


def test_memory_does_not_grow() -> None:
    """A leak of 100 bytes a call would show as 0.3 MB in the last two stretches."""
    for first, second, *rest in run(resident_bytes, 2, 1500, timeout_s=120):
        assert rest[-1] - second < 200_000, (first, second, *rest)


# -- the reference itself --------------------------------------------------------------------------


def bound(inputs: Tensor, plan: Plan) -> Tensor:
    """How far a sum by ``plan`` may be from the exact one: (P-1) roundings of the type that adds, and
    for 16-bit types one more per level, each relative to at most the sum of absolute values."""
    dtype = inputs.dtype
    adds_in = torch.float32 if dtype.itemsize == 2 else dtype
    roundings = (len(inputs) - 1) * torch.finfo(adds_in).eps / 2
    tiny = 0.0
    if dtype.itemsize == 2:
        roundings += len(plan.levels) * torch.finfo(dtype).eps / 2
        tiny = len(inputs) * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    # 1.01: what roundings of roundings add
    return 1.01 * roundings * inputs.double().abs().sum(0) + tiny


def cases() -> Iterator[tuple[Topology, Plan, torch.dtype]]:
    for shape in ("2x2", "1x7", "3x3", "4x2", "3x4"):
        topology = Topology.parse(shape)
        for plan in Plan.all(topology):
            for dtype in FLOATS:
                yield topology, plan, dtype


def test_the_reference_is_near_the_exact_sum() -> None:
    for topology, plan, dtype in cases():
        inputs = inputs_for(topology.world_size, 200, dtype, seed=2)
        exact = inputs.double().sum(0)
        for wire in (None, torch.float32):
            found = reference_all_reduce(inputs, plan, wire_dtype=wire).double()
            assert ((found - exact).abs() <= bound(inputs, plan)).all(), (plan, dtype, wire)
        mean = reference_all_reduce(inputs, plan, "avg").double()
        half_ulp = torch.finfo(dtype).eps / 2
        allowed = bound(inputs, plan) / topology.world_size + half_ulp * exact.abs()
        assert ((mean - exact / topology.world_size).abs() <= allowed).all(), (plan, dtype)
        for op, want in (("max", inputs.amax(0)), ("min", inputs.amin(0))):
            assert torch.equal(reference_all_reduce(inputs, plan, op), want)


def test_integers_are_exact() -> None:
    for dtype in (torch.int32, torch.int64):
        inputs = inputs_for(12, 100, dtype, seed=4)
        for plan in Plan.all(Topology(3, 4)):
            assert torch.equal(reference_all_reduce(inputs, plan), inputs.sum(0).to(dtype))


@pytest.mark.parametrize(
    ("word", "inputs", "want"),
    [
        # In fp32, 1 is lost beside 1e8: what is left tells the order.
        ("exchange:3", [1.0, 1e8, -1e8], 0.0),
        ("exchange:3", [1e8, -1e8, 1.0], 1.0),
        ("split:3", [-1e8, 1e8, 1.0], 1.0),
        # Digit 0 first: ranks 0 and 1, 2 and 3, then the two sums.
        ("exchange:2 exchange:2", [1e8, -1e8, 1.0, 0.0], 1.0),
        ("exchange:2 exchange:2", [1e8, 1.0, -1e8, 0.0], 0.0),
        ("split:2 exchange:2", [1e8, 1.0, -1e8, 1.0], 0.0),
        ("exchange:4", [1e8, 1.0, -1e8, 1.0], 1.0),
    ],
)
def test_the_reference_adds_in_digit_order(word: str, inputs: list[float], want: float) -> None:
    """By hand: the executor is held against the reference, but both share one function."""
    found = reference_all_reduce(torch.tensor(inputs)[:, None], Plan.parse(word))
    assert found.item() == want


def test_the_first_of_equals_wins() -> None:
    zeros = torch.tensor([[-0.0, 0.0], [0.0, -0.0]])
    for op in ("max", "min"):
        found = reference_all_reduce(zeros, Plan.parse("exchange:2"), op)
        assert found.signbit().tolist() == [True, False]
