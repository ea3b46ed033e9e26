"""Who carries out a call, told from the call alone; and that the communicator follows it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nvrar import Communicator
from nvrar.communicator import Stats
from nvrar.plan import Plan
from nvrar.routing import FASTER_BY_TORCH, Routing
from nvrar.tune import Choice

LARGE = "messages above max_bytes (1000)"
TORCH = "torch.distributed"
NO_GPU = "no executor for cuda tensors: rank 1 sees no GPU"


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says it were elsewhere."""

    is_cuda = True
    device = torch.device("cuda", 0)


def tensor(num_bytes: int, device: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    plain = torch.zeros(num_bytes // dtype.itemsize, dtype=dtype)
    return plain.as_subclass(OnGpu) if device == "cuda" else plain


def routing(executor: str, wire_dtype: torch.dtype | None = None) -> Routing:
    """By a table that has torch faster for all that is sent in 512 bytes or less."""

    def choose(num_bytes: int, dtype: str, link: str) -> Choice:
        assert link == "nvlink"
        return Choice(Plan(()), by_torch=num_bytes <= 512)

    chooser = SimpleNamespace(tables=("a table",), choose=choose)
    return Routing(chooser, "nvlink", 1000, wire_dtype, executor, "rank 1 sees no GPU")


@pytest.mark.parametrize(
    ("executor", "device", "num_bytes", "reason"),
    [
        ("gpu", "cuda", 512, FASTER_BY_TORCH),
        ("gpu", "cuda", 514, ""),
        ("gpu", "cuda", 1000, ""),
        ("gpu", "cuda", 1002, LARGE),
        ("gpu", "cpu", 512, ""),  # the table is of the GPU's executor
        ("gpu", "cpu", 1002, LARGE),
        ("host", "cpu", 512, FASTER_BY_TORCH),
        ("host", "cuda", 514, ""),  # the host's executor takes it
        (TORCH, "cpu", 512, FASTER_BY_TORCH),
        (TORCH, "cpu", 514, ""),
        (TORCH, "cuda", 514, NO_GPU),
        (TORCH, "cuda", 1002, NO_GPU),
    ],
)
def test_why_a_call_is_left_to_torch(
    executor: str, device: str, num_bytes: int, reason: str
) -> None:
    asked = routing(executor)
    x = tensor(num_bytes, device)
    if not (device == "cuda" and executor == "gpu"):  # else the GPU's executor is asked instead
        assert asked.why_not_host(x) == reason
        assert asked.why_not_host(x.to(torch.complex64)) == "dtype torch.complex64"
    if reason != NO_GPU:
        assert asked.why_torch(x) == reason


def test_a_table_is_asked_for_what_is_sent() -> None:
    wide = routing("gpu", torch.float32)
    assert wide.why_torch(tensor(256, "cuda")) == FASTER_BY_TORCH
    assert wide.why_torch(tensor(512, "cuda")) == ""
    assert wide.why_torch(tensor(512, "cuda", torch.float32)) == FASTER_BY_TORCH


@pytest.mark.parametrize(("num_bytes", "is_fused"), [(512, False), (960, True), (1024, False)])
def test_sum_and_norm_are_one_launch_where_the_sum_is_not_left_to_torch(
    num_bytes: int, is_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    calls = SimpleNamespace(
        has_failed=False,
        device=SimpleNamespace(index=-1),
        why_unsupported=lambda dtype, op: "",
        sums_rows=lambda x: True,
        takes_rows=lambda x: True,
        add_rms_norm=lambda *how, sums: made.append(("norm", sums)),
    )
    communicator = object.__new__(Communicator)
    communicator._gpu, communicator._routing = calls, routing("gpu")
    communicator._ending, communicator._epoch = SimpleNamespace(raise_if_over=lambda: None), 0
    communicator.stats = Stats()
    communicator._on_gpu = set()
    monkeypatch.setattr(
        communicator, "_run_torch", lambda x, out, op, reason: made.append(("torch", reason))
    )
    x = tensor(num_bytes, "cuda").view(2, -1)
    communicator.all_reduce_add_rms_norm(x, x, x[0])
    reason = FASTER_BY_TORCH if num_bytes <= 512 else LARGE
    assert made == ([("norm", True)] if is_fused else [("torch", reason), ("norm", False)])
