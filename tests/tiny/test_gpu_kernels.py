"""The kernels compile for every architecture we serve, on a machine with no GPU, and stay lean."""

from __future__ import annotations

import ctypes
import multiprocessing
import re

import pytest
import torch

from nvrar.gpu import disk_cache, includes, jit, kernel, layout
from nvrar.gpu.heap import first_gap
from nvrar.gpu.layout import FORMATS, LL, LL128
from nvrar.plan import PLAN_NAMES, Plan
from nvrar.topology import Topology


def spec(word: str, packets=LL, arch="sm_90", **options) -> jit.KernelSpec:
    plan = Plan.parse(word)
    size = ctypes.sizeof(kernel.args_type_of(plan))
    options = {"dtype": torch.bfloat16, "op": "sum", **options}
    return jit.KernelSpec(plan, packets, arch=arch, args_bytes=size, **options)


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NVRAR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def entry_points(cubin: bytes) -> int:
    # Every kernel of a cubin has one section of this name.
    return len(set(re.findall(rb"\.nv\.info\.(nvrar_\w+)\x00", cubin)))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("name", PLAN_NAMES)
def test_named_plans_compile_lean(name, arch):
    plan = Plan.named(name, Topology(4, 8))
    for packets in FORMATS.values():
        built = jit.build(spec(str(plan), packets, arch))
        assert built.num_registers * layout.most_threads(plan) <= 65536  # a multiprocessor's
        assert built.spill_bytes == 0
        assert built.stack_bytes == 0
        assert entry_points(built.cubin) == 1


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_sum_with_norm_compiles_lean(arch):
    for word in ("identity", "exchange:2", "exchange:8", "split:8 exchange:2 exchange:2"):
        for packets in FORMATS.values():
            built = jit.build(spec(word, packets, arch, rows=True))
            threads = layout.most_threads(Plan.parse(word))
            assert built.num_registers * threads <= 65536
            assert built.spill_bytes == built.stack_bytes == 0
            assert entry_points(built.cubin) == 1


@pytest.mark.parametrize("dtype", jit.TYPES, ids=str)
@pytest.mark.parametrize("op", jit.OPS)
def test_every_type_and_operation_compiles(dtype, op):
    for packets in FORMATS.values():
        for whole in (True, False):
            assert jit.build(spec("split:2 exchange:3", packets, dtype=dtype, op=op, whole=whole))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("rows", [False, True])
def test_put_links_with_nvshmem(arch, rows):
    built = jit.build(spec("split:4 exchange:2", arch=arch, put=(False, True), rows=rows))
    assert b"nvshmem" in built.cubin
    assert entry_points(built.cubin) == 1
    assert built.spill_bytes == built.stack_bytes == 0


def test_an_entry_is_made_once_and_survives_damage(private_cache, caplog, monkeypatch):
    wanted = spec("exchange:2")
    code = jit.cubin(wanted)
    (entry,) = private_cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(jit, "build", lambda spec: pytest.fail("compiled again"))
        assert jit.cubin(wanted) == code
    entry.write_bytes(entry.read_bytes()[:-1])
    mended = jit.cubin(wanted)
    assert entry_points(mended) == 1
    assert str(private_cache) in caplog.text
    assert "delete" in caplog.text
    assert jit.cubin(wanted) == mended


def compile_one(folder: str, queue: multiprocessing.Queue) -> None:
    import os

    os.environ["NVRAR_CACHE_DIR"] = folder
    queue.put(entry_points(jit.cubin(spec("exchange:4", LL128))))


def test_eight_processes_race_on_an_empty_cache(private_cache):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    racers = [
        context.Process(target=compile_one, args=(str(private_cache), queue)) for _ in range(8)
    ]
    for racer in racers:
        racer.start()
    entries = [queue.get(timeout=120) for _ in racers]
    for racer in racers:
        racer.join()
    assert entries == [1] * 8
    assert [p.suffix for p in private_cache.iterdir()] == [".cubin"]


def test_a_cache_that_cannot_be_written_is_said_and_survived(monkeypatch, caplog):
    monkeypatch.setenv("NVRAR_CACHE_DIR", "/proc/nvrar")
    disk_cache._say_once.cache_clear()
    for packets in FORMATS.values():
        assert jit.cubin(spec("exchange:2", packets))
    assert caplog.text.count("NVRAR_CACHE_DIR") == 1  # a communicator has tens of kernels


def test_a_machine_without_headers_is_told_how_to_get_them(monkeypatch):
    monkeypatch.setattr(includes.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(jit.CompileError, match=r"/nowhere/include.*pip install.*CUDA_HOME"):
        jit.cubin(spec("exchange:2"))


def test_a_compiler_error_shows_its_log(monkeypatch):
    monkeypatch.setattr(jit.KernelSpec, "source", lambda self: "this is not CUDA")
    with pytest.raises(jit.CompileError, match=r"(?s)exchange:2.*not compile.*error"):
        jit.cubin(spec("exchange:2"))


@pytest.mark.parametrize("text", ["1x2", "2x4", "3x4", "4x8", "7x1"])
def test_the_inbox_has_a_place_for_every_packet(text):
    """Counted from the schedule: what a rank receives fits, and nothing is left over but its own slots."""
    topology = Topology.parse(text)
    for plan in Plan.all(topology):
        length = layout.num_parts(plan)  # one element a part stands for one unit a part
        received = sum(
            stop - start
            for step in plan.schedule(0, length)
            for digit, _ in step.peers()
            for start, stop in [step.receives[digit]]
        )
        own = sum(step.span[1] - step.span[0] for step in plan.schedule(0, length))
        assert layout.num_areas(plan) == received + own


@pytest.mark.parametrize("packets", FORMATS.values(), ids=FORMATS)
def test_units_cover_every_message(packets):
    for word in ("exchange:2", "split:4 exchange:2", "split:3 split:5"):
        plan = Plan.parse(word)
        for num_bytes in (
            1,
            packets.data_bytes,
            60 * packets.data_bytes,
            60 * packets.data_bytes + 1,
        ):
            covered = layout.num_parts(plan) * packets.data_bytes
            units = layout.num_units(plan, packets, num_bytes)
            assert (units - 1) * covered < num_bytes <= units * covered


@pytest.mark.parametrize("packets", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    "word",
    ["identity", "exchange:2", "split:4 exchange:2", "split:7", "split:8 split:8", "split:128"],
)
@pytest.mark.parametrize("row_bytes", [16, 1008, 8192, 16384, 65536])
def test_a_block_covers_its_row(row_bytes, word, packets):
    plan, rows = Plan.parse(word), layout.Rows(5, row_bytes)
    units = rows.units_of_row(plan, packets)
    assert units * layout.num_parts(plan) * packets.data_bytes >= row_bytes
    for has_clusters, resident in ((False, 8), (True, 8), (True, 264), (False, 264)):
        room = layout.Room(lambda threads, resident=resident: resident * 512 // max(threads, 32))
        shape = rows.launch_shape(plan, packets, room, has_clusters)
        assert shape.blocks % shape.cluster == 0
        assert 1 <= shape.blocks <= room.most_blocks(shape.threads)
        assert shape.cluster == 1 or has_clusters
        assert shape.threads % 32 == 0
        assert 32 <= shape.threads <= layout.most_threads(plan)
        if resident == 264:
            assert shape.blocks == 5 * shape.cluster
            in_block = shape.threads * packets.data_bytes // packets.threads // 960
            chunks = units * packets.data_bytes // 960
            assert chunks > (shape.cluster - 1) * in_block  # each block has one
    needed = rows.inbox_bytes(plan, packets)
    assert needed >= layout.inbox_bytes(plan, packets, 5 * row_bytes)
    # Else the sum is a launch of its own. A kernel has 48 KB without asking.
    assert not rows.fits(plan, packets, needed - 1)
    assert not rows.fits(plan, packets, needed) or rows.shared_bytes(plan, packets) < 48 << 10
    assert rows.fits(plan, packets, needed) or layout.num_parts(plan) > 2


@pytest.mark.parametrize(
    ("word", "packets", "num_rows", "row_bytes", "shape"),
    [
        ("exchange:2", LL128, 1, 16384, (4, 160, 4)),
        ("exchange:2", LL128, 8, 16384, (32, 160, 4)),
        ("exchange:2", LL, 1, 8192, (5, 256, 5)),
        ("exchange:2", LL, 1, 16384, (6, 384, 6)),
        ("exchange:2", LL, 1, 2048, (3, 128, 3)),
        ("split:8 exchange:2", LL, 1, 16384, (3, 128, 3)),
        ("split:8 exchange:2", LL128, 1, 8192, (1, 64, 1)),
    ],
)
def test_a_row_goes_over_a_cluster(word, packets, num_rows, row_bytes, shape):
    room = layout.Room(lambda threads: 132 * (1024 // threads))
    plan, rows = Plan.parse(word), layout.Rows(num_rows, row_bytes)
    assert rows.launch_shape(plan, packets, room, has_clusters=True) == layout.LaunchShape(*shape)
    assert rows.launch_shape(plan, packets, room, has_clusters=False).cluster == 1
    little = layout.Room(lambda threads: 4)  # too little for clusters
    assert rows.launch_shape(plan, packets, little, has_clusters=True).cluster == 1


def test_rows_that_their_parts_would_fill_up_much_are_summed_apart():
    plan = Plan.parse("split:8 exchange:2")  # 8 KB in eight parts are filled up to 15 KB
    few, many = layout.Rows(1, 8192), layout.Rows(64, 8192)
    assert few.fits(plan, LL, 1 << 30)
    assert not many.fits(plan, LL, 1 << 30)
    assert many.fits(plan, LL128, 1 << 30)
    assert many.fits(Plan.parse("exchange:2"), LL, 1 << 30)  # half a chunk a row


def test_clusters_take_room_by_powers_of_two():
    shapes = [layout.LaunchShape(12, 32, cluster) for cluster in (1, 2, 3, 4, 6)]
    assert [shape.taken_blocks for shape in shapes] == [12, 12, 16, 12, 16]
    room = layout.Room(lambda threads: 64)
    assert room.overlaps(layout.LaunchShape(12, 32, 6))
    assert not room.overlaps(layout.LaunchShape(15, 32, 5))


def test_first_gap():
    assert first_gap([], 10, 10) == 0
    assert first_gap([], 11, 10) is None
    assert first_gap([(0, 4), (6, 8)], 2, 10) == 4
    assert first_gap([(6, 8), (0, 4), (1, 7)], 2, 10) == 8
    assert first_gap([(0, 4), (6, 8)], 3, 10) is None
