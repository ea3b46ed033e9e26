"""The symmetric heap and a communicator's place on it, with a stand-in for NVSHMEM: no GPU, one process."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from nvrar.errors import ArgumentError, GpuUnavailable
from nvrar.gpu import heap, workspace
from nvrar.gpu.algorithms import Algorithm
from nvrar.gpu.executor import GpuExecutor
from nvrar.gpu.layout import LL, LL128, inbox_bytes
from nvrar.gpu.workspace import Workspace
from nvrar.plan import Plan
from nvrar.topology import Topology

PLAN = Plan.parse("exchange:2")
BYTES = 1 << 16


class Nvshmem:
    """What is asked of its bindings, for PE 0 of 2."""

    NVSHMEMError = type("NVSHMEMError", (Exception,), {})
    Flags = SimpleNamespace(INIT_WITH_UNIQUEID=8)
    InitAttr = uniqueid = staticmethod(lambda: SimpleNamespace(ptr=0))

    def __init__(self, is_mapped: bool = True, fails: bool = False) -> None:
        self.is_mapped, self.fails = is_mapped, fails
        self.told: list[int] = []  # where it writes its state, whenever one is added

    def my_pe(self) -> int:
        return 0

    def n_pes(self) -> int:
        return 2

    def ptr(self, address: int, pe: int) -> int:
        return address + (1 << 40) * pe if self.is_mapped else 0

    def align(self, granule: int, num_bytes: int) -> int:
        return 1 << 30

    def set_attr_uniqueid_args(self, *place: int) -> None:
        pass

    def culibrary_init(self, handle: int) -> int:
        self.told.append(handle)
        assert all(Library.loaded[told]() is not None for told in self.told), "unloaded"
        return 7 if self.fails else 0

    def hostlib_init_attr(self, flags: int, attributes: int) -> None:
        if self.fails:
            raise self.NVSHMEMError("Status code 7")


class Library:
    """Machine code that is loaded as long as somebody holds it. A handle comes again."""

    loaded: ClassVar[dict[int, weakref.ref]] = {}

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.loaded[handle] = weakref.ref(self)


GROUP = SimpleNamespace(rank=lambda: 0, size=lambda: 2)


class Meeting:
    """The other rank says what this one does, but for its PE."""

    group, timeout_s = GROUP, 1.0

    def exchange(self, purpose: str, value: object) -> list[object]:
        return [0, 1] if purpose == "pe" else [value] * 2

    def together(self, purpose: str, action: Callable[[], object]) -> list[object]:
        return [action()] * 2


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The index of the current GPU, to be changed."""
    index = [0]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: index[0])
    monkeypatch.setattr(heap, "_zero", lambda address, num_bytes: None)
    monkeypatch.setattr(workspace.links.Device, "current", lambda: workspace.links.Device("a", "b"))
    monkeypatch.setattr(heap, "together", lambda group, what, act, wait: [act()] * 2)
    return index


@pytest.fixture
def make(current: list[int], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Workspace]:
    def make(nvshmem: Nvshmem | None = None) -> Workspace:
        monkeypatch.setattr(heap, "_bindings", lambda: nvshmem or Nvshmem())
        if heap._opened is None:  # the first in the test
            monkeypatch.setattr(heap, "_opened", heap.Heap(1 << 30, 1 << 26))
        algorithms = {Algorithm(PLAN, packets): BYTES for packets in (LL, LL128)}
        return Workspace(Meeting(), Topology(1, 2), lambda link: algorithms)

    return make


@pytest.mark.parametrize("is_mapped", [True, False])
def test_memory_to_put_from_is_taken_where_anything_is_put(make, is_mapped: bool) -> None:
    made = make(Nvshmem(is_mapped))
    assert made.link == ("nvlink" if is_mapped else "network")
    assert made.puts(PLAN) == (not is_mapped,)
    inboxes = 2 * sum(made.room_for(packets) for packets in (LL, LL128))
    assert made._piece.num_bytes == inboxes + (0 if is_mapped else 2 * made.room_for(LL))
    assert all(made.room_for(f) >= inbox_bytes(PLAN, f, BYTES) for f in (LL, LL128))


def test_the_gpu_of_the_heap_is_the_only_one(make, current: list[int]) -> None:
    make()
    current[0] = 3
    with pytest.raises(ArgumentError, match=r"current GPU is cuda:3.*on cuda:0.*set_device"):
        make()


def test_memory_is_given_back_on_its_own_gpu(make, current: list[int], monkeypatch) -> None:
    at: list[int] = []

    @contextmanager
    def device(wanted: torch.device):
        before, current[0] = current[0], wanted.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(heap.Heap, "finish_puts", lambda heap: at.append(current[0]))
    made = object.__new__(GpuExecutor)
    made.device, made.failure = torch.device("cuda", 0), SimpleNamespace(kind=0)
    made._workspace = make(Nvshmem(is_mapped=False))
    current[0] = 3
    made.close()
    assert at == [0]
    assert made._workspace._heap._taken == set()


def test_a_library_is_told_of_nvshmem_once_and_kept(make) -> None:
    """NVSHMEM writes its state into every library that it was told of, whenever it is told of another."""
    nvshmem = Nvshmem(is_mapped=False)
    shared = Library(1)
    for handle in (2, 3):
        made = make(nvshmem)
        made.initialise(shared)
        made.initialise(Library(handle))
        made._heap.finish_puts = lambda: None
        made.release()
        gc.collect()
    assert nvshmem.told == [1, 2, 3]


def test_a_library_that_nvshmem_does_not_take_is_said(make) -> None:
    with pytest.raises(GpuUnavailable, match=r"status 7.*pip install"):
        make(Nvshmem(fails=True)).initialise(Library(1))


def test_an_nvshmem_that_does_not_start_leaves_calls_to_torch(current, monkeypatch) -> None:
    monkeypatch.setattr(heap.dist, "group", SimpleNamespace(WORLD=GROUP))
    monkeypatch.setattr(heap, "_opened", None)
    monkeypatch.setattr(heap, "_bindings", lambda: Nvshmem(fails=True))
    monkeypatch.setattr(heap, "_offer", lambda rank: {"arena": 1 << 20, "ready": False, "id": ""})
    for _ in range(2):
        with pytest.raises(GpuUnavailable, match=r"did not start: Status code 7; NVSHMEM_DEBUG"):
            heap.open_heap("", 1.0)
