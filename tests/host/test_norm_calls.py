"""The sum with residual and norm on the host: the bits of its three steps, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from nvrar import ArgumentError, Communicator, DisagreementError, Topology
from nvrar.rms_norm import add_rms_norm
from nvrar.testing import reference_all_reduce
from ranks import run

pytestmark = pytest.mark.host
TOPOLOGY = Topology(2, 2)


def inputs(dtype: torch.dtype, rows: int, hidden: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(hidden)
    everyone = torch.randn(4, rows, hidden, generator=generator).to(dtype)
    residual = torch.randn(rows, hidden, generator=generator).to(dtype)
    return everyone, residual, torch.rand(hidden, generator=generator).to(dtype)


def steps(rank: int) -> None:
    with Communicator(topology=TOPOLOGY, max_bytes=1 << 12, timeout_s=30) as comm:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for rows, hidden in ((1, 8), (3, 500), (40, 512)):  # the last is larger than max_bytes
                everyone, residual, weight = inputs(dtype, rows, hidden)
                x = everyone[rank].clone()
                total = comm.all_reduce(x)
                if x.nbytes <= comm.max_bytes:
                    plan = comm.plan_for(x.nbytes, dtype)
                    expected = reference_all_reduce(everyone, plan, "sum", TOPOLOGY)
                    assert torch.equal(total, expected)
                normed, h = add_rms_norm(total, residual, weight, 1e-5)
                found = comm.all_reduce_add_rms_norm(x, residual, weight, 1e-5)
                assert torch.equal(found[0], normed)
                assert torch.equal(found[1], h)
                wide = torch.empty(rows, 2 * hidden, dtype=dtype)[:, ::2]
                kept = residual.clone()
                out, kept_too = comm.all_reduce_add_rms_norm(
                    x, kept, weight, 1e-5, out=wide, residual_out=kept
                )
                assert out is wide
                assert kept_too is kept
                assert torch.equal(wide, normed)
                assert torch.equal(kept, h)
                both = comm.all_reduce_add_rms_norm(x, residual.t().contiguous().t(), weight, 1e-5)
                assert torch.equal(both[0], normed)
        calls = comm.stats.calls
        empty = torch.empty(0, 8)
        assert comm.all_reduce_add_rms_norm(empty, empty, torch.ones(8))[0].shape == (0, 8)
        assert comm.stats.calls == calls + 1

        everyone, residual, weight = inputs(torch.float32, 2, 64)
        x = everyone[rank]
        eager = comm.all_reduce_add_rms_norm(x, residual, weight)
        fused = torch.compile(comm.all_reduce_add_rms_norm, fullgraph=True, backend="aot_eager")
        for a, b in zip(fused(x, residual, weight), eager, strict=True):
            assert torch.equal(a, b)
        arguments = (x, residual, weight, 1e-6, comm.name)
        torch.library.opcheck(torch.ops.nvrar.all_reduce_add_rms_norm.default, arguments)


def test_it_has_the_bits_of_its_steps() -> None:
    run(steps, 4, timeout_s=120)


def refusing(rank: int) -> None:
    comm = Communicator(timeout_s=5)
    x, weight = torch.ones(2, 8), torch.ones(8)
    if rank == 1:
        with pytest.raises(ArgumentError, match=r"weight is torch.float32 \(4,\)"):
            comm.all_reduce_add_rms_norm(x, x, torch.ones(4))
    else:
        with pytest.raises(DisagreementError, match=r"rank 1 refused .* weight is"):
            comm.all_reduce_add_rms_norm(x, x, weight)


def test_a_refusal_reaches_the_other_ranks() -> None:
    run(refusing, 2)
