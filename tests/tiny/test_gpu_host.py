"""The host's side of the GPU executor, on a machine with no GPU: what it decides and keeps, not kernels."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nvrar import gpu
from nvrar.communicator import Communicator
from nvrar.cost import machine_named
from nvrar.gpu import kernel, links
from nvrar.gpu.algorithms import Algorithms
from nvrar.gpu.calls import GpuCalls
from nvrar.gpu.executor import GpuExecutor
from nvrar.gpu.links import Device
from nvrar.plan import Plan
from nvrar.topology import Topology
from nvrar.tune import Chooser


class FakeStream:
    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle
        self.waited_for: list[FakeStream] = []

    def wait_stream(self, other: FakeStream) -> None:
        self.waited_for.append(other)


def test_a_new_stream_waits_for_the_default_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default stream's handle is 0, of which torch.cuda.ExternalStream makes another stream."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    made = object.__new__(GpuExecutor)
    made._last_stream = made._last_raw_stream = None
    default, side = FakeStream(0), FakeStream(7)
    for stream in (default, side, default):
        made._follow(stream)
    assert side.waited_for == [default]
    assert default.waited_for == [side]
    assert made._last_raw_stream == 0


@pytest.mark.parametrize("budget_s", [1e-9, 30.0, 1e7, 1e12])
def test_a_budget_fits_the_kernels_signed_clock(budget_s: float) -> None:
    ticks = kernel.budget_ticks(budget_s)
    assert 1 <= ticks < 2**31
    assert ticks == 2**31 - 1 or abs(ticks * 2**20 - budget_s * 1e9) <= 2**20


def test_reports_tell_many_calls_apart_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvrar.gpu.executor._MOST_NAMED", 3)
    made, plan = object.__new__(GpuExecutor), Plan.parse("exchange:2")
    made._calls = {}
    numbers = [made._number_of(f"size {size}", plan) for size in (1, 2, 3, 4, 5, 2)]
    assert numbers == [0, 1, 2, 3, 3, 1]
    made.failure = SimpleNamespace(call=3)
    assert made.failed_call() == ("a call by 'exchange:2'", plan)
    made.failure.call = 1
    assert made.failed_call() == ("size 2", plan)


HERE = Device("a", "0000:1B:00.0")
NEAR, FAR = Device("a", "0000:2C:00.0"), Device("b", "0000:1B:00.0")


@pytest.mark.parametrize("joined", [True, False])
def test_lines_are_trusted_to_nvlink_alone(joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(links, "_joined_by_nvlink", lambda *pair: asked.append(pair) or joined)
    assert HERE.keeps_lines_to([NEAR, FAR, HERE]) == joined
    assert asked == [(HERE.bus, [NEAR.bus])]  # nothing but NVLink maps another host's memory
    assert HERE.keeps_lines_to([HERE, FAR])
    assert Device.from_json(HERE.to_json()) == HERE


def test_without_nvml_lines_are_not_trusted(caplog: pytest.LogCaptureFixture) -> None:
    assert not HERE.keeps_lines_to([NEAR])  # this machine has no driver
    assert "capability 'utility'" in caplog.text


def test_a_failure_counts_calls_as_the_host_does() -> None:
    calls = object.__new__(GpuCalls)
    calls._topology, calls._position = Topology(1, 2), 0
    failure = SimpleNamespace(epoch=2, level=0, digit=1, kind=1)
    plan = Plan.parse("exchange:2")
    calls._executor = SimpleNamespace(failure=failure, failed_call=lambda: ("sum", plan))
    report = calls.report()
    assert (report.epoch, report.waits_on, report.timed_out) == (1, 1, True)


class Recorder:
    """Stands for GpuCalls: records what a communicator would prepare and launch."""

    def __init__(self) -> None:
        self.device, self.has_failed = SimpleNamespace(index=-1), False
        self.prepared: list[tuple[list[int], torch.dtype]] = []
        self.norms: list[tuple[list[int], torch.dtype]] = []
        self.launched: list[tuple[int, torch.dtype]] = []

    def why_unsupported(self, dtype: torch.dtype, op: str) -> str:
        return ""

    def warmup(self, sizes, dtype: torch.dtype, op: str = "sum") -> None:
        self.prepared.append((list(sizes), dtype))

    def warmup_norm(self, sizes, dtype: torch.dtype) -> None:
        self.norms.append((list(sizes), dtype))

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor, op: str) -> None:
        self.launched.append((x.nbytes, x.dtype))
        out.copy_(x.detach())


def communicator(wire_dtype: torch.dtype | None) -> tuple[Communicator, Recorder]:
    comm, calls = object.__new__(Communicator), Recorder()
    comm._gpu, comm.wire_dtype, comm.max_bytes = calls, wire_dtype, 1000
    comm._choices, comm._link, comm._plain_calls = {}, "nvlink", set()
    comm._chooser = Chooser(Topology(1, 2), machine_named("h100-ndr"), Plan.parse("split:2"))
    return comm, calls


def test_what_is_sent_in_fp32_is_prepared_in_fp32() -> None:
    comm, calls = communicator(torch.float32)
    comm.warmup([2, 1000, 1001])
    assert calls.prepared == [([4, 2000], torch.float32)]
    x = torch.ones(500, dtype=torch.bfloat16)  # max_bytes, and twice that on the wire
    comm._run_gpu(calls, x, torch.empty_like(x), "sum")
    assert calls.launched == [(2000, torch.float32)]


def test_a_norm_is_prepared_in_its_own_type() -> None:
    for wire_dtype, summed in ((None, [512]), (torch.float32, [])):
        comm, calls = communicator(wire_dtype)
        comm.warmup([512, 4096], norm=True)
        assert calls.norms == [(summed, torch.bfloat16)]
        comm.warmup([4096])
        assert len(calls.norms) == 1


def test_the_norm_alone_is_always_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages above max_bytes are summed by torch, and normalised by a kernel that has to be loaded."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    calls, loaded = object.__new__(GpuCalls), []
    one_shot = Chooser(Topology(1, 2), machine_named("h100-ndr"), Plan.parse("exchange:2"))
    of_type = Algorithms(lambda n: one_shot.choose(n, "bfloat16", "nvlink"), 1 << 20, "nvlink")
    calls._algorithms, calls.device = {torch.bfloat16: of_type}, None
    calls._executor = SimpleNamespace(load_rows=lambda dtype, a: loaded.append(str(a.plan)))
    calls.warmup_norm([], torch.bfloat16)
    assert loaded == ["identity"]
    calls.warmup_norm([0, 512, 1 << 20, 1 << 20], torch.bfloat16)
    assert loaded == ["identity", "identity", "exchange:2", "exchange:2"]  # LL, LL128
    calls.warmup_norm([512], torch.int32)
    assert len(loaded) == 4


def test_the_workspace_is_made_for_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    made, recorder = [], Recorder()
    monkeypatch.setattr("nvrar.gpu.calls.GpuCalls", lambda *given: made.append(given) or recorder)
    monkeypatch.setattr("nvrar.gpu.together", lambda group, what, action, wait: [action()])
    for wire_dtype in (None, torch.float32):
        calls = gpu.make_calls(None, Topology(1, 2), None, 1000, wire_dtype, 5.0, 4.0)
        assert calls is recorder
    assert [given[3] for given in made] == [1000, 2000]
    assert [(max(sizes), dtype) for sizes, dtype in recorder.prepared] == [
        (1000, torch.bfloat16),
        (2000, torch.float32),
    ]


def test_strided_parameters_are_reduced_in_place() -> None:
    comm, calls = communicator(None)
    weight = nn.Parameter(torch.ones(4, 6).t())
    assert not weight.is_contiguous()
    comm._run_gpu(calls, weight, weight, "sum")
    assert calls.launched == [(96, torch.float32)]
    assert weight.is_leaf
