"""The host's side of the GPU executor, on a machine with no GPU: what it decides and keeps, not kernels."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nvrar import gpu
from nvrar.cost import machine_named
from nvrar.errors import ArgumentError
from nvrar.gpu import kernel, links
from nvrar.gpu.algorithms import Algorithm
from nvrar.gpu.calls import GpuCalls
from nvrar.gpu.executor import GpuExecutor
from nvrar.gpu.layout import LL128, Rows
from nvrar.gpu.links import Device
from nvrar.gpu.virtual import VirtualCluster
from nvrar.plan import Plan
from nvrar.rms_norm import add_rms_norm
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


def test_containers_of_one_machine_are_on_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """PCIe may map their memory, and tear lines; that of another host is mapped by NVLink alone."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    found = []
    for name in ("container-1", "container-2"):
        monkeypatch.setattr(links.socket, "gethostname", lambda name=name: name)
        found.append(Device.current().host)
    assert found[0] == found[1]


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
    failure.kind = kernel.OTHER_CALL
    report = calls.report()
    assert (report.reason, report.timed_out) == ("it made another call", False)


class Executor:
    """Stands for GpuExecutor: keeps what it is told to prepare, load and launch; sums nothing."""

    def __init__(self, meeting, topology, algorithms, budget_s: float) -> None:
        self.device, self.failure = SimpleNamespace(index=0), SimpleNamespace(kind=0)
        self.most_bytes = max(algorithms("nvlink").values())
        self.prepared: list[tuple[int, torch.dtype]] = []
        self.loaded: list[str] = []
        self.rows: list[tuple[object, ...]] = []
        self.launched: list[int] = []

    def prepare(self, num_bytes: int, dtype: torch.dtype, op: str, algorithm) -> int:
        self.prepared.append((num_bytes, dtype))
        return num_bytes

    def load_rows(self, dtype: torch.dtype, algorithm: Algorithm) -> None:
        self.loaded.append(str(algorithm.plan))

    def launch(self, num_bytes: int, x: torch.Tensor, out: torch.Tensor) -> None:
        for tensor in (x, out):  # what a kernel sees is their memory
            assert tensor.is_contiguous()
            assert not tensor.is_neg()
        assert x.nbytes == num_bytes
        self.launched.append(num_bytes)
        out.copy_(x.detach())

    def prepare_rows(self, *how: object) -> tuple[object, ...]:
        self.rows.append(how)
        return how

    def launch_rows(self, how: tuple, *tensors: torch.Tensor) -> None:
        assert all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in tensors)
        assert not any(t.is_neg() for t in tensors)
        x, residual, weight, *results = tensors
        rows, dtype, eps, _ = how
        assert (rows, dtype) == (Rows(len(x), x.shape[1] * x.itemsize), x.dtype)
        for target, result in zip(results, add_rms_norm(x, residual, weight, eps), strict=True):
            target.copy_(result)


@pytest.fixture
def make_calls(monkeypatch: pytest.MonkeyPatch):
    """Of up to 1000 bytes, on the stand-in of an executor."""
    monkeypatch.setattr("nvrar.gpu.calls.GpuExecutor", Executor)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    chooser = Chooser(Topology(1, 2), machine_named("h100-ndr"), Plan.parse("exchange:2"))

    def make(wire_dtype: torch.dtype | None = None) -> GpuCalls:
        meeting = SimpleNamespace(
            group=SimpleNamespace(rank=lambda: 0),
            together=lambda what, action, more_s: [action()],
        )
        made = gpu.make_calls(meeting, Topology(1, 2), chooser.choose, 1000, wire_dtype, 4.0)
        made._executor.prepared.clear()
        return made

    return make


@pytest.mark.parametrize(("wire_dtype", "wider"), [(None, 1), (torch.float32, 2)])
def test_memory_and_kernels_are_made_for_what_is_sent(make_calls, wire_dtype, wider: int) -> None:
    calls = make_calls(wire_dtype)
    assert calls._executor.most_bytes == 2 * 1000 * wider  # twice: rows may be filled up
    calls.warmup([0, 2, 1000, 1001], torch.bfloat16)
    wire = wire_dtype or torch.bfloat16
    assert calls._executor.prepared == [(2 * wider, wire), (1000 * wider, wire)]
    x = torch.ones(500, dtype=torch.bfloat16)  # max_bytes, and twice that where it is sent wider
    out = torch.empty_like(x)
    calls.all_reduce(x, out, "sum")
    assert calls._executor.launched == [1000 * wider]
    assert len(calls._executor.prepared) == 2  # before
    assert torch.equal(out, x)


def test_creation_compiles_bfloat16_sums_of_all_sizes(make_calls, monkeypatch) -> None:
    warmed = []
    monkeypatch.setattr(
        GpuCalls, "warmup", lambda calls, sizes, dtype: warmed.append((sizes, dtype))
    )
    make_calls()
    assert warmed == [([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000], torch.bfloat16)]


def test_a_norm_is_prepared_in_its_own_type(make_calls) -> None:
    """And alone: messages above max_bytes are summed by torch, and normalised by a kernel of ours."""
    for wire_dtype, summed in ((None, ["exchange:2"]), (torch.float32, [])):
        calls = make_calls(wire_dtype)
        calls.warmup_norm([0, 512, 1000, 4096], torch.bfloat16)
        assert calls._executor.loaded == ["identity", *summed]
        calls.warmup_norm([], torch.bfloat16)
        assert calls._executor.loaded == ["identity", *summed, "identity"]
        calls.warmup_norm([512], torch.int32)
        assert len(calls._executor.loaded) == 2 + len(summed)
        x = torch.ones(1, 32, dtype=torch.bfloat16)
        calls._executor.has_room_for = lambda rows, algorithm: True
        assert calls.sums_rows(x) == bool(summed)
        calls._executor.has_room_for = lambda rows, algorithm: False
        assert not calls.sums_rows(x)


def test_a_norm_is_kept_by_all_that_its_kernel_knows(make_calls) -> None:
    calls, weights = make_calls(), {8: torch.ones(8), 16: torch.ones(16)}
    kinds = [(4, 8, 0.0, True), (2, 16, 0.0, True), (4, 8, 1.0, True), (4, 8, 0.0, False)]
    for rows, hidden, eps, sums in kinds * 2:
        x = torch.ones(rows, hidden)
        calls.add_rms_norm(x, x, weights[hidden], eps, x.clone(), x.clone(), sums)
    plans = [str(algorithm.plan) for *_, algorithm in calls._executor.rows]
    assert plans == ["exchange:2"] * 3 + ["identity"]


def test_a_norm_takes_any_layout(make_calls) -> None:
    def strided(values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(2, dim=-1)[..., ::2]

    def shifted(values: torch.Tensor) -> torch.Tensor:
        return torch.cat((torch.zeros(1), values.flatten()))[1:].view(values.shape)

    x, residual, weight = torch.randn(4, 8), torch.randn(4, 8), torch.randn(8)
    wanted = add_rms_norm(x, residual, weight, 1e-6)

    def negated(values: torch.Tensor) -> torch.Tensor:
        return torch._neg_view(-values)  # as the imaginary part of a conjugated tensor is

    for lay in (strided, shifted, negated):
        given = lay(x), lay(residual), lay(weight)
        for results in ((lay(x), lay(x)), given[:2]):  # the second time in place
            make_calls().add_rms_norm(*given, 1e-6, *results, sums=True)
            assert all(map(torch.equal, results, wanted))


def test_which_rows_a_kernel_takes(make_calls) -> None:
    def takes(*shape: int) -> bool:
        return make_calls().takes_rows(torch.empty(*shape, dtype=torch.bfloat16))

    assert takes(2, 8)
    assert not takes(2, 9)
    assert takes(1, 1 << 15)
    assert not takes(1, (1 << 15) + 8)


def test_rows_are_loaded_before_the_call() -> None:
    """CUDA loads lazily: a kernel is on the GPU once it was asked how many of its blocks fit."""
    made, asked = object.__new__(GpuExecutor), []
    made._function = lambda *which, **how: SimpleNamespace(resident_blocks=asked.append)
    made.load_rows(torch.bfloat16, Algorithm(Plan(()), LL128))
    assert asked == [32]


def test_more_virtual_ranks_than_a_gpu_holds_are_refused() -> None:
    made = object.__new__(VirtualCluster)
    made.num_ranks, made._num_processors = 100, 14
    room = made._room(SimpleNamespace(resident_blocks=lambda threads, shared: 2048 // threads))
    assert room.most_blocks(128) == 1
    with pytest.raises(
        ArgumentError, match=r"100 virtual ranks need a block of 512 threads.* 56 at"
    ):
        room.most_blocks(512)


def test_a_negated_view_is_reduced_by_what_it_shows(make_calls) -> None:
    shown = torch.complex(torch.zeros(1), torch.ones(1)).conj().imag
    assert shown.is_contiguous()
    for x, out in (
        (shown, torch.empty(1)),
        (torch.full((1,), -1.0), torch._neg_view(torch.ones(1))),
    ):
        make_calls().all_reduce(x, out, "sum")
        assert out.item() == -1


def test_strided_parameters_are_reduced_in_place(make_calls) -> None:
    weight = nn.Parameter(torch.ones(4, 6).t())
    assert not weight.is_contiguous()
    calls = make_calls()
    calls.all_reduce(weight, weight, "sum")
    assert calls._executor.launched == [96]
    assert weight.is_leaf
