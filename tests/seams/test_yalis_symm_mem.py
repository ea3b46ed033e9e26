"""The all-reduces over symmetric memory, with torch's kernels played by a stand-in that doubles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from yalis import ConfigError
from yalis.layers import functional
from yalis.parallel import symm_mem
from yalis.parallel.all_reduce import AllReduce, make_all_reduce

BYTES = 4096


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def buffer(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Two ranks that hold the same: what comes out is twice what went in."""
    buffer = torch.full((BYTES,), 0x7F, dtype=torch.uint8)

    def one_shot(place: Tensor, x: Tensor, op: str, group_name: str, out: Tensor) -> None:
        assert (place.data_ptr(), place.shape, op) == (buffer.data_ptr(), x.shape, "sum")
        assert x.data_ptr() % 16 == 0
        place.copy_(x)
        out.copy_(2 * place)

    def two_shot(place: Tensor, op: str, group_name: str) -> None:
        assert (place.data_ptr(), op) == (buffer.data_ptr(), "sum")
        place.mul_(2)

    fake = SimpleNamespace(one_shot_all_reduce_copy_out=one_shot, two_shot_all_reduce_=two_shot)
    monkeypatch.setattr(symm_mem, "_MAX_BYTES", BYTES)
    monkeypatch.setattr(symm_mem, "open_buffer", lambda group: (buffer, ""))
    monkeypatch.setattr(torch.ops, "symm_mem", fake)
    return buffer


def make(name: str, group: dist.ProcessGroup) -> AllReduce:
    return make_all_reduce(name, group=group, nodes=None, plan="auto")


@pytest.mark.parametrize("name", ["symm-one-shot", "symm-two-shot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_and_what_falls_back(
    name: str, dtype: torch.dtype, group: dist.ProcessGroup, buffer: Tensor
) -> None:
    all_reduce = make(name, group)
    for shape in ((1, 2), (3, 7, 2), (BYTES // dtype.itemsize,), (0, 8)):
        x = torch.randn(shape).to(dtype)
        want = 2 * x
        got = all_reduce(x)
        assert torch.equal(got, want)
        buffer.fill_(0)  # a later call writes there: the result must not be in it
        assert torch.equal(got, want)
    unaligned = torch.randn(9).to(dtype)[1:]
    want = 2 * unaligned
    assert torch.equal(all_reduce(unaligned), want)
    assert all_reduce.describe() == {"backend": name, "calls": 5, "fallbacks": {}}
    # The group has one rank: where torch.distributed sums instead, nothing is doubled.
    large, odd = torch.ones(BYTES // dtype.itemsize + 2, dtype=dtype), torch.ones(3, dtype=dtype)
    assert torch.equal(all_reduce(large), torch.ones_like(large))
    assert torch.equal(all_reduce(odd), torch.ones(3).to(dtype) * (2 if dtype.itemsize == 4 else 1))
    reasons = {f"more than {BYTES} bytes": 1}
    if dtype.itemsize == 2:
        reasons["an odd number of 16-bit elements"] = 1
    assert all_reduce.describe()["fallbacks"] == reasons


@pytest.mark.parametrize("name", ["symm-one-shot", "symm-two-shot"])
def test_sum_residual_and_norm(name: str, group: dist.ProcessGroup, buffer: Tensor) -> None:
    all_reduce = make(name, group)
    for rows in (3, 200):  # the second does not fit the buffer
        x, residual, weight = (torch.randn(n, 20).bfloat16() for n in (rows, rows, 1))
        total = x if rows == 200 else 2 * x
        want = functional.add_rms_norm(total, residual, weight[0], 1e-5)
        got = all_reduce.add_rms_norm(x.clone(), residual, weight[0], 1e-5)
        assert all(map(torch.equal, got, want))


def test_gpus_that_cannot_share_memory(
    group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(symm_mem, "open_buffer", lambda group: (None, "no peer access"))
    with pytest.raises(
        ConfigError, match=r"'symm-one-shot', but .* \(no peer access\); use .*nvrar"
    ):
        make("symm-one-shot", group)


def test_hosts_that_are_several(group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(into: list[str], host: str, group: object) -> None:
        into[:] = [host, "other"]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(ConfigError, match=r"within one node, but the ranks are on .*other"):
        make("symm-two-shot", group)
