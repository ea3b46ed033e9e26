"""Measured tables: what they say of a size, which of them hold, and what is done with those that do not."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from nvrar import MACHINES, Plan, Topology, tables
from nvrar.gpu.algorithms import Algorithm, Algorithms
from nvrar.gpu.layout import (
    FORMATS,
    LL,
    LL128,
    LaunchShape,
    Room,
    launch_shape,
    most_threads,
    shapes_worth_trying,
)
from nvrar.hardware import device_name
from nvrar.table import Entry, Key, Table, TableError, Trial
from nvrar.tune import Chooser, choose, pinned_radices, worth_trying
from nvrar.tuner import spread

TOPOLOGY = Topology(2, 2)
KEY = Key("gpu", ("NVIDIA H200",), "2x2", "nvlink", "bfloat16")
SHOT, SPLIT = Plan.parse("exchange:4"), Plan.parse("split:2 exchange:2")
HALVING = Plan.parse("split:2 split:2")


def table(key: Key = KEY) -> Table:
    entries = (
        Entry(1024, 9.0, (Trial(SHOT, 2.0, "LL", 2, 64), Trial(SPLIT, 3.0, "LL128", 1, 128))),
        Entry(65536, 10.0, (Trial(SPLIT, 4.0, "LL128", 20, 256), Trial(HALVING, 5.0, "LL", 9, 64))),
        Entry(1 << 20, 8.0, (Trial(HALVING, 9.0, "LL128", 100, 256),)),
    )
    return Table(key, entries, {"git_commit": "abc"}, {"split:4 LL": "at 1 KiB: it timed out"})


def chooser(**options: object) -> Chooser:
    return Chooser(TOPOLOGY, MACHINES["h100-ndr"], tables=(table(),), **options)


def test_it_reads_back_what_was_written(tmp_path: Path) -> None:
    tables.write(table(), tmp_path / "new" / "t.json")
    read = Table.loads((tmp_path / "new" / "t.json").read_text())
    assert read == table()
    assert read.dumps() == table().dumps()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["t.json"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.update(format=2), "format is 2"),
        (lambda t: t.pop("key"), "key"),
        (lambda t: t.pop("left_out"), "left_out"),
        (lambda t: t["key"].update(topology="four"), "four"),
        (lambda t: t["key"].update(link=3), "key"),
        (lambda t: t["key"].update(colour="red"), "colour"),
        (lambda t: t["sizes"].clear(), r"sizes are \[\]"),
        (lambda t: t["sizes"].reverse(), "ascending"),
        (lambda t: t["sizes"][0].update(num_bytes="1K"), "'1K'"),
        (lambda t: t["sizes"][0].update(num_bytes=0), "sizes are"),
        (lambda t: t["sizes"][0].update(torch_us=0), "time of 0"),
        (lambda t: t["sizes"][0]["trials"][0].update(us=float("nan")), "time of nan"),
        (lambda t: t["sizes"][0]["trials"][0].update(us="fast"), "fast"),
        (
            lambda t: t["sizes"][0]["trials"][0].update(plan="exchange:3"),
            "3 ranks, the group has 4",
        ),
        (lambda t: t["sizes"][0]["trials"][0].update(plan="quick:4"), "quick:4"),
        (lambda t: t["sizes"][0]["trials"][0].update(packets="LL64"), "LL64"),
        (lambda t: t["sizes"][0]["trials"][0].update(blocks=0), "launch of 0 blocks"),
        (lambda t: t["sizes"][0]["trials"][0].update(threads=100), "100 threads"),
        (lambda t: t["sizes"][0]["trials"][0].pop("threads"), "None threads"),
    ],
)
def test_what_is_no_table_is_refused(change: object, says: str) -> None:
    read = json.loads(table().dumps())
    change(read)
    with pytest.raises(TableError, match=says):
        Table.loads(json.dumps(read))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "[" * 100_000])
def test_text_that_is_no_table_is_refused(text: str) -> None:
    with pytest.raises(TableError, match=r"JSON|format"):
        Table.loads(text)


def test_a_size_takes_the_row_of_its_next_power_of_two() -> None:
    for num_bytes, plan, launch in [
        (1, SHOT, None),
        (512, SHOT, None),
        (513, SHOT, ("LL", 2, 64)),
        (1024, SHOT, ("LL", 2, 64)),
        (1025, SPLIT, None),  # not measured: the next larger that was
        (32769, SPLIT, ("LL128", 20, 256)),
        (65537, HALVING, None),
        (1 << 20, HALVING, ("LL128", 100, 256)),
        (1 << 24, HALVING, None),
    ]:
        choice = chooser().choose(num_bytes, "bfloat16", "nvlink")
        assert choice.plan == plan, num_bytes
        assert choice.measured is not None
        found = (choice.measured.packets, choice.measured.blocks, choice.measured.threads)
        assert found == (launch or (None, None, None)), num_bytes
        assert choice.by_torch == (num_bytes > 65536)


def test_what_was_not_measured_is_left_to_the_model() -> None:
    for dtype, link in (("float32", "nvlink"), ("bfloat16", "put")):
        choice = chooser().choose(1024, dtype, link)
        assert choice.measured is None
        assert not choice.by_torch
        assert choice.plan == choose(TOPOLOGY, 1024, MACHINES["h100-ndr"])


def test_deterministic_keeps_to_its_radices_and_never_to_torch() -> None:
    pinned = pinned_radices(TOPOLOGY)
    picks = [chooser(deterministic=True).choose(1 << k, "bfloat16", "nvlink") for k in range(26)]
    assert {pick.plan.radices for pick in picks} == {pinned}
    assert not any(pick.by_torch for pick in picks)
    assert picks[10].plan == SPLIT  # measured, though another list of radices was faster
    assert picks[10].measured == Trial(SPLIT, 3.0, "LL128", 1, 128)
    only_flat = replace(table(), entries=(Entry(1024, 9.0, (Trial(SHOT, 2.0),)),))
    pick = Chooser(TOPOLOGY, MACHINES["h100-ndr"], deterministic=True, tables=(only_flat,)).choose(
        1024, "bfloat16", "nvlink"
    )
    assert (pick.plan.radices, pick.measured) == (pinned, None)


def test_torch_is_not_used_where_it_would_do_something_else() -> None:
    choice = chooser(may_use_torch=False).choose(1 << 20, "bfloat16", "nvlink")
    assert (choice.plan, choice.by_torch) == (HALVING, False)
    nothing_right = replace(table(), entries=(Entry(1024, 9.0, ()),))
    choice = Chooser(TOPOLOGY, MACHINES["gloo"], tables=(nothing_right,)).choose(
        1024, "bfloat16", "nvlink"
    )
    assert choice.by_torch


def test_a_fixed_plan_asks_no_table() -> None:
    assert chooser(fixed=SPLIT).choose(1 << 20, "bfloat16", "nvlink").plan == SPLIT


def test_a_measured_launch_reaches_the_kernel_as_far_as_it_fits() -> None:
    def of(link: str) -> Algorithms:
        return Algorithms(
            lambda num_bytes: chooser().choose(num_bytes, "bfloat16", "nvlink"), 1 << 16, link
        )

    assert of("nvlink").of(1000) == Algorithm(SHOT, LL, LaunchShape(2, 64))
    assert of("nvlink").of(65536) == Algorithm(SPLIT, LL128, LaunchShape(20, 256))
    assert of("peer").of(65536) == Algorithm(SPLIT, LL)  # lines may be torn there
    # What was measured of sums says nothing of rows.
    assert of("nvlink").of_rows(1000) == Algorithm(SHOT, LL128)
    assert of("put").of_rows(65536) == Algorithm(SPLIT, LL)
    asked = chooser(fixed=SPLIT).choose
    unmeasured = Algorithms(lambda n: asked(n, "float32", "nvlink"), 10_000, "nvlink")
    # Of rows up to twice the bytes, for what fills them up to whole chunks.
    assert unmeasured.largest() == {Algorithm(SPLIT, LL): 4096, Algorithm(SPLIT, LL128): 20_000}
    assert of("nvlink").largest()[Algorithm(SPLIT, LL128, LaunchShape(20, 256))] == 65536
    assert launch_shape(
        SPLIT, LL128, 65536, Room(lambda t: 264), LaunchShape(20, 256)
    ) == LaunchShape(20, 256)
    assert launch_shape(
        SPLIT, LL128, 65536, Room(lambda t: 24), LaunchShape(20, 512)
    ) == LaunchShape(9, 256)


@pytest.mark.parametrize("packets", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("plan", [SHOT, SPLIT], ids=str)
def test_launches_that_are_tried_can_be_launched(plan: Plan, packets: object) -> None:
    for num_bytes in (2, 1000, 1 << 20):
        for shape in shapes_worth_trying(plan, packets, num_bytes):
            assert shape.threads % 32 == 0
            assert shape.threads <= most_threads(plan)
            assert shape.blocks >= 1
    launches = [(s.blocks, s.threads) for s in shapes_worth_trying(SPLIT, LL, 1 << 14)]
    assert launches == [
        (16, 64), (8, 64), (4, 64), (8, 128), (4, 128), (2, 128), (4, 256), (2, 256), (1, 256),
    ]  # fmt: skip


@pytest.mark.parametrize("shape", ["1x2", "2x1", "2x4", "3x3", "1x8", "7x1"])
def test_what_is_tried_is_best_predicted_and_has_the_pinned_radices(shape: str) -> None:
    topology = Topology.parse(shape)
    for machine in MACHINES.values():
        tried = worth_trying(topology, 65536, machine, 3)
        assert tried[0] == choose(topology, 65536, machine)
        assert pinned_radices(topology) in {plan.radices for plan in tried}
        assert len(set(tried)) == len(tried) <= 5


@pytest.mark.parametrize("length", range(18))
def test_sizes_come_from_coarse_to_fine(length: int) -> None:
    order = spread(list(range(length)))
    assert sorted(order) == list(range(length))
    assert order[:2] == [0, length - 1][: length and min(length, 2)]
    for done in range(2, length):  # each next one lies in a widest gap
        have = sorted(order[:done])
        widest = max(b - a for a, b in pairwise(have))
        after = next(i for i, position in enumerate(have) if position > order[done])
        assert have[after] - have[after - 1] == widest


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NVRAR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tables"


def holding(environment: dict[str, str]) -> list[Path]:
    found = tables.holding(environment, "gpu", ("NVIDIA H200",), "2x2")
    return [f.path for f in found]


def test_the_users_table_goes_before_the_shipped(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    names = {}
    for folder in (cache, tmp_path / "shipped"):
        for key in (KEY, replace(KEY, dtype="float32"), replace(KEY, topology="1x4")):
            names[key] = tables.file_name(table(key))
            tables.write(table(key), folder / names[key])
    (cache / names[replace(KEY, dtype="float32")]).unlink()
    assert holding({}) == [
        cache / names[KEY],
        tmp_path / "shipped" / names[replace(KEY, dtype="float32")],
    ]
    assert holding({"NVRAR_TUNE_TABLE": "off"}) == []


def test_a_given_file_or_folder_goes_before_all(cache: Path, tmp_path: Path) -> None:
    tables.write(table(), cache / "a.json")
    tables.write(table(), tmp_path / "mine.json")
    assert holding({"NVRAR_TUNE_TABLE": str(tmp_path / "mine.json")}) == [tmp_path / "mine.json"]
    assert holding({"NVRAR_TUNE_TABLE": str(cache)}) == [cache / "a.json"]
    assert holding({"NVRAR_TUNE_TABLE": str(tmp_path / "cache")}) == []


def test_a_corrupt_table_is_left_out_with_a_warning(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables.write(table(), cache / "b.json")
    (cache / "a.json").write_text(table().dumps()[:300])
    (cache / "c.json").write_bytes(b"\xff\xfe")
    with caplog.at_level(logging.WARNING, "nvrar"):
        assert holding({}) == [cache / "b.json"]
    assert [r.getMessage().split(" is left out")[0] for r in caplog.records] == [
        f"the tuning table {cache / 'a.json'}",
        f"the tuning table {cache / 'c.json'}",
    ]
    assert "nvrar tune" in caplog.text


def test_a_table_that_is_not_there_is_said(
    cache: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level(logging.WARNING, "nvrar"):
        assert holding({"NVRAR_TUNE_TABLE": str(tmp_path / "typo.json")}) == []
    assert f"no tuning table {tmp_path / 'typo.json'}; correct NVRAR_TUNE_TABLE" in caplog.text


@pytest.mark.parametrize("variable", ["NVRAR_CACHE_DIR", "NVRAR_TUNE_TABLE"])
def test_a_folder_that_cannot_be_read_is_said_and_left_out(
    variable: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    """A container's user may have another's home. Only rank 0 looks: where it raised, all others waited."""
    blocked = str(tmp_path / ("x" * 300))  # refuses root too
    monkeypatch.setenv(variable, blocked)
    monkeypatch.setattr(tables, "SHIPPED", tmp_path)
    tables.write(table(), tmp_path / "a.json")
    given = {variable: blocked} if variable == "NVRAR_TUNE_TABLE" else {}
    assert holding(given) == ([] if given else [tmp_path / "a.json"])
    assert blocked in caplog.text


def test_a_user_without_a_home_has_tables_and_a_folder_to_be_told_of(monkeypatch, caplog) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("NVRAR_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert holding({}) == []
    assert str(tables.user_folder()).startswith("/nonexistent/")


@pytest.mark.parametrize("name", ["missing.json", "other.json"])
def test_a_given_table_that_does_not_hold_is_named(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables.write(table(replace(KEY, devices=("NVIDIA A100",))), tmp_path / "other.json")
    with caplog.at_level(logging.WARNING, "nvrar"):
        assert holding({"NVRAR_TUNE_TABLE": str(tmp_path / name)}) == []
    assert str(tmp_path / name) in caplog.text
    assert ("A100" in caplog.text) == (name == "other.json")


def test_what_we_ship_reads_and_is_named_by_its_key() -> None:
    for path in tables.SHIPPED.glob("*.json"):
        shipped = Table.loads(path.read_text())
        assert path.name == tables.file_name(shipped)
        assert {"timestamp", "git_commit", "nvrar", "torch", "hosts", "command"} <= set(
            shipped.provenance
        )
        assert not any("name" in host for host in shipped.provenance["hosts"])


def test_file_names_tell_keys_apart() -> None:
    keys = [KEY, *(replace(KEY, **{f: "x"}) for f in ("executor", "topology", "link", "dtype"))]
    keys.append(replace(KEY, devices=("NVIDIA A100", "NVIDIA H200")))
    names = {tables.file_name(table(key)) for key in keys}
    assert len(names) == len(keys)
    assert tables.file_name(table()) == "gpu-nvidia-h200-2x2-nvlink-bfloat16.json"


def test_the_host_is_named_with_its_cores() -> None:
    assert device_name("host").endswith(" cores")
