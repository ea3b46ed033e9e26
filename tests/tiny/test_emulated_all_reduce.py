"""The GPU executor's kernels, emulated: their bits beside the reference's, and the protocol when it is tried.

Nodes that reach each other by put only are here, which no machine with GPUs alone can show.
"""

from __future__ import annotations

import random
import shutil

import pytest
import torch
from torch import Tensor

from emulated import EmulatedCluster
from nvrar.gpu.kernel import OTHER_CALL, PEER_MISSING, budget_ticks
from nvrar.gpu.layout import LL, LL128, Format, LaunchShape, Rows
from nvrar.plan import Plan
from nvrar.rms_norm import add_rms_norm
from nvrar.testing import reference_all_reduce

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="needs g++, which Debian has as g++"
)

BF16, F16, F32, I32 = torch.bfloat16, torch.float16, torch.float32, torch.int32
# A plan; for each level whether packets travel by put; type and operation.
CASES = [
    ("exchange:2", "0", BF16, "sum"),
    ("exchange:3", "0", F32, "sum"),
    ("exchange:7", "0", F16, "max"),
    ("split:2", "0", F16, "sum"),
    ("split:5", "0", I32, "max"),
    ("split:2 exchange:2", "00", BF16, "sum"),
    ("split:3 split:2", "00", F32, "max"),
    ("split:2 exchange:3 exchange:2", "000", BF16, "sum"),
    ("exchange:3", "1", F32, "sum"),
    ("split:2 exchange:2", "01", BF16, "sum"),
    ("split:2 split:2", "01", F16, "sum"),
    ("split:3 exchange:2", "11", I32, "sum"),
]
IDS = [f"{word} {put} {str(dtype)[6:]} {op}" for word, put, dtype, op in CASES]


def cluster(
    word: str, put: str, dtype: torch.dtype, op: str = "sum", **options: object
) -> EmulatedCluster:
    levels = tuple(p == "1" for p in put)
    options = {"max_bytes": 8200} | options
    return EmulatedCluster(Plan.parse(word), dtype, op, put=levels, **options)  # type: ignore[arg-type]


def inputs_of(num_ranks: int, length: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(num_ranks, length, generator=generator) * 8
    return list(numbers.to(dtype))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize(("word", "put", "dtype", "op"), CASES, ids=IDS)
def test_bits(word: str, put: str, dtype: torch.dtype, op: str) -> None:
    ranks = cluster(word, put, dtype, op)
    per_unit = LL128.data_bytes // dtype.itemsize
    for packets in (LL,) if "1" in put else (LL, LL128):
        for length in (1, 8, per_unit - 1, per_unit, per_unit + 1, 1009):
            xs = inputs_of(ranks.num_ranks, length, dtype, seed=length)
            want = reference_all_reduce(torch.stack(xs), ranks.plan, op)
            outs = [torch.empty_like(x) for x in xs]
            ranks.run(ranks.prepare(xs, outs, packets, LaunchShape(2, 64)), seed=length)
            ranks.check()
            assert all(same_bits(out, want) for out in outs), (packets.name, length)


STORMS = [
    ("exchange:2", "0"),
    ("split:2 exchange:2", "00"),
    ("split:2 exchange:2", "01"),
    ("exchange:3", "1"),
]


@pytest.mark.parametrize(("word", "put"), STORMS)
def test_calls_need_no_word_between_them(word: str, put: str) -> None:
    """Ranks run ahead and fall behind, sizes and packets change, epochs wrap around, and puts that are on
    their way overtake each other: every result is right."""
    choice = random.Random(word)
    for seed in range(12):
        ranks = cluster(word, put, BF16, first_epoch=2**32 - 3 - seed % 2)
        calls, found, expected = [], [], []
        for i in range(10):
            packets = choice.choice([LL] if "1" in put else [LL, LL128])
            length = 8 * choice.choice([1, 2, 17, 60, 64, choice.randrange(1, 500)])
            xs = inputs_of(ranks.num_ranks, length, BF16, seed=100 * seed + i)
            outs = xs if i % 2 else [torch.empty_like(x) for x in xs]
            shape = LaunchShape(choice.choice([1, 3]), choice.choice([32, 64]))
            expected += [reference_all_reduce(torch.stack(xs), ranks.plan)] * len(outs)
            calls.append(ranks.prepare(xs, outs, packets, shape))
            found += outs
        ranks.run(*calls, seed=seed)
        ranks.check()
        assert all(map(same_bits, found, expected)), seed


@pytest.mark.parametrize(
    ("word", "put", "packets", "num_blocks"),
    [("exchange:2", "0", LL128, 4), ("split:2", "0", LL, 1), ("split:2 exchange:2", "01", LL, 2)],
)
def test_a_peer_that_does_not_come(word: str, put: str, packets: Format, num_blocks: int) -> None:
    ranks = cluster(word, put, F32, budget_s=0.05)
    xs = inputs_of(ranks.num_ranks, 960, F32, seed=0)
    outs = [torch.zeros_like(x) for x in xs]
    call = ranks.prepare(xs, outs, packets, LaunchShape(num_blocks, 64))
    ranks.run_apart([[call]] * (ranks.num_ranks - 1) + [[None]])
    kinds = ranks.failure[:, 0].tolist()
    # Whom they wait for in vain have their own word to give, and the last rank gave none.
    assert set(kinds[:-1]) == {PEER_MISSING}
    assert kinds[-1] == 0
    assert all(out.isnan().any() for out in outs[:-1])
    want = reference_all_reduce(torch.stack(xs), ranks.plan)
    for out in outs[:-1]:
        assert torch.equal(out[~out.isnan()], want[~out.isnan()]), "what is no NaN is right"
    # Broken from then on: the next call waits for nobody.
    ranks.run(call)
    assert all(out.isnan().all() for out in outs[:-1])


@pytest.mark.parametrize("packets", [LL, LL128], ids=lambda packets: packets.name)
def test_a_peer_in_another_call(packets: Format) -> None:
    # Rank 1 finds out at once. Rank 0 looks where a call of its own size would have its packets, and waits.
    ranks = cluster("exchange:2", "0", F32, budget_s=1.0)
    calls, results = [], []
    for length in (480, 960):
        xs = inputs_of(2, length, F32, seed=length)
        outs = [torch.zeros_like(x) for x in xs]
        calls.append(ranks.prepare(xs, outs, packets, LaunchShape(1, 64)))
        results.append((xs, outs))
    ranks.run_apart([[calls[0]], [calls[1]]])
    assert ranks.failure[:, 0].tolist() == [PEER_MISSING, OTHER_CALL]
    assert results[0][1][0].isnan().all()
    assert results[1][1][1].isnan().all()


# 5120 leaves a whole chunk of a part empty, so that not all blocks of a cluster have equally many. Of 960 a
# part is one or two chunks, so that warps, or blocks, have none.
ROWS = [
    ("exchange:2", "0", LL128, 3840, (2, 64, 1)),
    ("exchange:2", "0", LL128, 3840, (4, 32, 4)),
    ("split:2", "0", LL128, 3840, (4, 64, 2)),
    ("split:2", "0", LL128, 5120, (4, 64, 2)),
    ("split:2", "0", LL128, 960, (6, 96, 3)),
    ("split:2 exchange:2", "00", LL128, 3840, (2, 32, 2)),
    ("exchange:3", "0", LL, 3840, (2, 256, 1)),
    ("split:2", "0", LL, 1000, (1, 128, 1)),
    ("split:2", "0", LL, 5120, (4, 256, 4)),
    ("exchange:2", "1", LL, 5120, (8, 256, 4)),
    ("split:2", "1", LL, 3840, (4, 384, 2)),
    ("split:2 exchange:2", "01", LL, 5120, (4, 128, 2)),
    ("exchange:2 exchange:2", "11", LL, 960, (6, 128, 3)),
    ("split:3 exchange:2", "11", LL, 5120, (9, 128, 3)),
]


@pytest.mark.parametrize(("word", "put", "packets", "hidden", "launch"), ROWS)
def test_sum_residual_and_norm(
    word: str, put: str, packets: Format, hidden: int, launch: tuple[int, int, int]
) -> None:
    """Between sums, and norms of what was summed by a launch of its own, on ranks that run apart."""
    ranks = cluster(word, put, BF16, max_bytes=1 << 16)
    weight, shape = torch.rand(hidden).to(BF16), LaunchShape(*launch)
    calls, found, expected = [], [], []
    for i in range(16):
        num_rows = 1 + i % 3
        xs = [
            x.view(-1, hidden) for x in inputs_of(ranks.num_ranks, num_rows * hidden, BF16, seed=i)
        ]
        total = reference_all_reduce(torch.stack(xs), ranks.plan)
        residuals = list(torch.randn(ranks.num_ranks, num_rows, hidden).to(BF16))
        wanted = [add_rms_norm(total, residual, weight, 1e-5) for residual in residuals]
        rows = (xs, residuals, weight, 1e-5)
        if i % 4 < 2:
            calls.append(ranks.prepare_rows(*rows, packets, shape))
        else:
            calls.append(ranks.prepare(xs, xs, packets, LaunchShape(2, 64)))
            calls.append(ranks.prepare_rows(*rows, LL128, LaunchShape(1, 64), sums=False))
        found += [*xs, *residuals]
        expected += [w[0] for w in wanted] + [w[1] for w in wanted]
    ranks.run(*calls)
    ranks.check()
    assert all(map(same_bits, found, expected))


@pytest.mark.parametrize(
    ("word", "put", "packets"), [("split:2", "0", LL128), ("split:2", "1", LL)]
)
def test_rows_of_a_peer_that_does_not_come(word: str, put: str, packets: Format) -> None:
    """Blocks of a cluster end together, and leave NaN."""
    ranks = cluster(word, put, BF16, max_bytes=1 << 15, budget_s=0.05)
    xs = [x.view(2, -1) for x in inputs_of(2, 2 * 3840, BF16, seed=0)]
    residuals, weight = [torch.zeros_like(x) for x in xs], torch.ones(3840).to(BF16)
    call = ranks.prepare_rows(
        xs, residuals, weight, 1e-5, packets, LaunchShape(4, 128 if packets is LL else 64, 2)
    )
    ranks.run_apart([[call], [None]])
    assert ranks.failure[:, 0].tolist() == [PEER_MISSING, 0]
    assert xs[0].isnan().all()
    assert residuals[0].isnan().all()


# In warps of LL128, in fours of warps of LL.
@pytest.mark.parametrize("launch", [(1, 2, 1), (2, 1, 2), (2, 1, 1)])
@pytest.mark.parametrize("packets", [LL, LL128], ids=lambda packets: packets.name)
def test_rows_of_which_one_packet_does_not_come(
    packets: Format, launch: tuple[int, int, int]
) -> None:
    """Whichever it is, the launch ends, tells of it, and each row is NaN or right. What splits leave behind a
    row's end is sent too: where that alone is missing the row is whole, and warps that are through with it
    must find the others in the next."""
    ranks = cluster("split:2", "", BF16, max_bytes=1 << 15)
    # Two units in each of two parts, and the last of them empty.
    hidden = 3 * LL128.data_bytes // 2
    given = [x.view(2, hidden) for x in inputs_of(4, 2 * hidden, BF16, seed=0)]
    tensors, weight = [x.clone() for x in given], torch.rand(hidden).to(BF16)
    blocks, chunks, team = launch
    shape = LaunchShape(blocks, chunks * (128 if packets is LL else 32), team)
    rows = (tensors[:2], tensors[2:], weight, 1e-5, packets, shape)
    ranks.run(ranks.prepare_rows(*rows))
    ranks.check()
    ranks._budget_ticks = budget_ticks(0.05)
    call = ranks.prepare_rows(*rows)
    wanted, sent = [tensors[0].clone(), tensors[2].clone()], ranks.heap.clone()
    num_units = 2 * Rows(2, 2 * hidden).units_of_row(ranks.plan, packets)
    region = 0 if packets is LL else 4 * ranks._room["LL"]
    for area in (1, 3):  # what rank 1 sent to be reduced, and what it had gathered
        for unit in range(0, num_units, max(1, num_units // 6)):
            for tensor, before in zip(tensors, given, strict=True):
                tensor.copy_(before)
            ranks.heap.copy_(sent)
            start = region + (area * num_units + unit) * packets.slot_bytes
            ranks.heap[0, start : start + packets.slot_bytes] = 0
            ranks.control[0] = torch.tensor([2, 0, 0, 0])
            ranks.failure.zero_()
            ranks.run_apart([[call], [None]])
            assert ranks.failure[:, 0].tolist() == [PEER_MISSING, 0]
            for found, want in ((tensors[0], wanted[0]), (tensors[2], wanted[1])):
                for row in range(2):
                    assert found[row].isnan().all() or same_bits(found[row], want[row]), (
                        area,
                        unit,
                    )
