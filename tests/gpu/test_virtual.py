"""The kernel on the virtual cluster: every topology up to 128 ranks on one GPU, bit for bit."""

from __future__ import annotations

import pytest
import torch

import gpus
from nvrar.errors import PeerTimeout
from nvrar.gpu.layout import FORMATS, LL, LL128
from nvrar.plan import PLAN_NAMES, Plan
from nvrar.rms_norm import add_rms_norm
from nvrar.testing import reference_all_reduce
from nvrar.topology import Topology

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(gpus.COUNT == 0, reason=gpus.NEED),
]

TOPOLOGIES = [
    "1x2", "2x1", "1x3", "3x1", "2x2", "1x4", "4x1", "1x5", "5x1", "2x3", "3x2", "1x6", "1x7", "7x1",
    "2x4", "4x2", "8x1", "1x8", "3x3", "9x1", "2x5", "5x2", "11x1", "3x4", "4x3", "12x1", "13x1", "2x7",
    "7x2", "3x5", "5x3", "4x4", "2x8", "8x2", "16x1", "17x1", "3x6", "4x5", "3x7", "2x12", "4x6", "5x5",
    "3x9", "4x7", "2x16", "4x8", "8x4", "6x6", "5x8", "8x8", "16x4", "16x8",
]  # fmt: skip


def words_of(topology: Topology) -> list[str]:
    return list(dict.fromkeys(str(Plan.named(name, topology)) for name in PLAN_NAMES))


def random_inputs(num_ranks: int, length: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(num_ranks, length, generator=generator, device="cuda").to(dtype)
    return torch.randint(
        -(10**6), 10**6, (num_ranks, length), generator=generator, device="cuda", dtype=dtype
    )


def same_bits(result: torch.Tensor, expected: torch.Tensor) -> bool:
    view = torch.int16 if expected.element_size() == 2 else torch.int32
    return torch.equal(result.view(view), expected.view(view))


def check(cluster, inputs: torch.Tensor) -> None:
    expected = reference_all_reduce(inputs, cluster.plan, cluster.op)
    results = [torch.full_like(x, 77) for x in inputs]
    cluster.all_reduce(list(inputs), results)
    for rank, result in enumerate(results):
        assert same_bits(result, expected), f"rank {rank}, {inputs.shape[1]} elements"


@pytest.mark.parametrize("packets", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("text", TOPOLOGIES)
def test_every_named_plan_gives_the_bits_of_the_specification(text, packets):
    from nvrar.gpu.virtual import VirtualCluster

    topology = Topology.parse(text)
    for word in words_of(topology):
        plan = Plan.parse(word)
        cluster = VirtualCluster(plan, packets, torch.bfloat16, max_bytes=1 << 17)
        parts = packets.data_bytes // 2
        for length in (
            1,
            2,
            parts - 1,
            parts,
            parts + 1,
            plan.world_size * parts + 3,
            10007,
            1 << 16,
        ):
            check(cluster, random_inputs(plan.world_size, length, torch.bfloat16, length))


@pytest.mark.parametrize("packets", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("op", ["sum", "max"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32], ids=str
)
def test_types_operations_and_alignments(dtype, op, packets):
    from nvrar.gpu.virtual import VirtualCluster

    plan = Plan.parse("split:3 exchange:2")
    cluster = VirtualCluster(plan, packets, dtype, op, max_bytes=4 << 20)
    for length in (1, 3, 5, 127, 128, 129, 4001, 999_983, 1_000_000):
        inputs = random_inputs(6, length, dtype, length)
        expected = reference_all_reduce(inputs, plan, op)
        for shift in (0, 1, 3):  # elements from an aligned address
            padded = torch.full((6, length + 7), 5, dtype=dtype, device="cuda")
            views = [row[shift : shift + length] for row in padded]
            for view, x in zip(views, inputs, strict=True):
                view.copy_(x)
            cluster.all_reduce(views, views)  # in place
            for row, view in zip(padded, views, strict=True):
                assert same_bits(view.contiguous(), expected)
                assert (row[:shift] == 5).all(), "wrote before its tensor"
                assert (row[shift + length :] == 5).all(), "wrote past its tensor"


@pytest.mark.parametrize("word", ["exchange:5", "split:4 exchange:2", "split:3 split:2 exchange:2"])
@pytest.mark.parametrize("packets", FORMATS.values(), ids=FORMATS)
def test_calls_of_random_sizes_with_random_delays(word, packets):
    from nvrar.gpu.virtual import VirtualCluster

    plan = Plan.parse(word)
    ranks = plan.world_size
    cluster = VirtualCluster(plan, packets, torch.bfloat16, max_bytes=1 << 16, jitter_ns=20_000)
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 8, 480, 481, 4096, 30_000]
    cases = {n: random_inputs(ranks, n, torch.bfloat16, n) for n in lengths}
    expected = {n: reference_all_reduce(x, plan) for n, x in cases.items()}
    calls = []
    for _ in range(300):
        n = lengths[int(torch.randint(len(lengths), (), generator=generator))]
        results = [torch.full_like(x, 77) for x in cases[n]]
        calls.append((n, results, cluster.prepare(list(cases[n]), results)))
    for _, _, call in calls:  # back to back, nothing looked at in between
        cluster.launch(call)
    cluster.check()
    for n, results, _ in calls:
        assert all(same_bits(r, expected[n]) for r in results)


@pytest.mark.parametrize("packets", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "word",
    ["identity", "exchange:2", "exchange:8", "split:2", "split:3 exchange:2", "split:8 exchange:4"],
)
def test_sum_residual_and_norm_have_the_bits_of_the_three_apart(word, dtype, packets):
    from nvrar.gpu.virtual import VirtualCluster

    plan = Plan.parse(word)
    ranks = plan.world_size
    cluster = VirtualCluster(plan, packets, dtype, max_bytes=4 << 20, jitter_ns=2000)
    align = 16 // dtype.itemsize
    for hidden in (align, 3 * align, 480, 1024, 5120, 16384):
        for num_rows in (1, 3, 40):
            shape = (ranks, num_rows, hidden)
            x = random_inputs(ranks, num_rows * hidden, dtype, hidden).view(shape)
            residual = random_inputs(ranks, num_rows * hidden, dtype, hidden + 1).view(shape)
            weight = random_inputs(1, hidden, dtype, hidden + 2)[0]
            total = reference_all_reduce(x, plan)
            expected = [add_rms_norm(total, r, weight, 1e-5) for r in residual]
            call = cluster.prepare_rows(
                list(x), list(residual), weight, 1e-5, list(x), list(residual)
            )
            before = cluster._control[:, 0].tolist()
            cluster.launch(call)  # in place
            cluster.check()
            # An epoch is used up by what all ranks hear of, and by nothing else.
            assert cluster._control[:, 0].tolist() == [e + bool(plan.levels) for e in before]
            for rank, (normed, h) in enumerate(expected):
                assert same_bits(residual[rank], h), (hidden, num_rows, rank)
                assert same_bits(x[rank], normed), (hidden, num_rows, rank)


@pytest.mark.parametrize("word", ["exchange:2", "split:2"])
def test_rows_that_cannot_be_summed_are_poisoned(word):
    """One rank is missing from the launch: the others end, and leave no numbers behind."""
    from nvrar.gpu.virtual import VirtualCluster

    cluster = VirtualCluster(
        Plan.parse(word), LL128, torch.bfloat16, max_bytes=1 << 16, budget_s=0.05
    )
    hidden = 5120  # over a cluster; in two parts, the last chunk of the second is empty
    x, residual = (
        random_inputs(2, 2 * hidden, torch.bfloat16, n).view(2, 2, hidden) for n in range(2)
    )
    weight = torch.ones(hidden, dtype=torch.bfloat16, device="cuda")
    call = cluster.prepare_rows(list(x), list(residual), weight, 1e-5, list(x), list(residual))
    cluster.num_ranks = 1  # of the launch's grid
    cluster.launch(call)
    with pytest.raises(PeerTimeout):
        cluster.check()
    assert x[0].isnan().all()
    assert residual[0].isnan().all()
    assert not x[1].isnan().any()


@pytest.mark.parametrize("op", ["sum", "max"])
def test_infinities_zeros_and_nan(op):
    """As the specification has them; of a NaN only that it is one, on every rank the same."""
    from nvrar.gpu.virtual import VirtualCluster

    special = torch.tensor(
        [0.0, -0.0, 1.5, float("inf"), float("-inf"), float("nan")], device="cuda"
    )
    for word in ("exchange:2", "split:2 exchange:3", "exchange:7"):
        plan = Plan.parse(word)
        generator = torch.Generator(device="cuda").manual_seed(3)
        shape = (plan.world_size, 5000)
        picks = torch.randint(6, shape, generator=generator, device="cuda")
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            inputs = special[picks].to(dtype)
            expected = reference_all_reduce(inputs, plan, op)
            cluster = VirtualCluster(plan, LL, dtype, op, max_bytes=1 << 16)
            results = cluster.all_reduce(list(inputs))
            number = ~expected.isnan()
            for result in results:
                assert torch.equal(result.isnan(), ~number)
                assert same_bits(result[number], expected[number])
                assert same_bits(result, results[0])


def test_the_epoch_wraps_around():
    from nvrar.gpu.virtual import VirtualCluster

    plan = Plan.parse("split:2 exchange:3")
    for packets in (LL, LL128):
        cluster = VirtualCluster(
            plan, packets, torch.float32, max_bytes=1 << 14, first_epoch=2**32 - 5, jitter_ns=2000
        )
        for call in range(12):
            check(cluster, random_inputs(6, 1000 + call, torch.float32, call))
        assert int(cluster._control[0, 0]) == 9  # 5 up to the end, then 2, 3, ... 8 used


def test_a_graph_replays_mixed_with_eager_calls():
    from nvrar.gpu.virtual import VirtualCluster

    plan = Plan.parse("split:4 exchange:2")
    cluster = VirtualCluster(plan, LL, torch.bfloat16, max_bytes=1 << 16, jitter_ns=3000)
    inputs = random_inputs(8, 3000, torch.bfloat16)
    results = torch.empty_like(inputs)
    call = cluster.prepare(list(inputs), list(results))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            cluster.launch(call)
    for turn in range(200):
        inputs.copy_(random_inputs(8, 3000, torch.bfloat16, turn))
        results.fill_(77)
        graph.replay()
        if turn % 20 == 0:
            check(cluster, random_inputs(8, 17 + turn, torch.bfloat16, turn))
            expected = reference_all_reduce(inputs, plan)
            assert all(same_bits(r, expected) for r in results)
    cluster.check()
