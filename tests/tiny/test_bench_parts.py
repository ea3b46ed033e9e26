"""The pure parts of a bench: sizes, turns, statistics, rows, table, picture, seats, bounds."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console

from nvrar import ArgumentError, Plan, Topology
from nvrar.bench import Measurement, Settings
from nvrar.cost import MACHINES
from nvrar.draw import draw, names_of
from nvrar.launch import Seat, seat
from nvrar.record import checkout, rows, write_rows
from nvrar.report import headline, picture, table
from nvrar.testing import reference_all_reduce
from nvrar.timing import turns
from nvrar.units import format_size, format_time, parse_size
from nvrar.verify import error_bound, exact_all_reduce, random_inputs

ABOUT = {
    "topology": "2x2",
    "op": "sum",
    "dtype": "bfloat16",
    "backend": "gloo",
    "hosts": [{"name": "a", "cpu": "Some CPU", "num_cores": 8, "gpu": None, "num_ranks": 4}],
}
MEASURED = [
    Measurement("torch", 1024, None, (100.0, 110.0, 90.0, 400.0), {}, "torch.distributed"),
    Measurement("nvrar", 1024, "split:2 exchange:2", (50.0, 52.0, 48.0, 60.0), {}, "host", 45.0),
    Measurement("torch", 4096, None, (200.0, 200.0, 200.0, 200.0), {}, "torch.distributed"),
    Measurement("nvrar", 4096, None, (210.0, 190.0, 200.0, 200.0), {"too large": 4}),
]


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1", 1), ("4096", 4096), ("256K", 262144), ("2M", 2 << 20), ("1g", 1 << 30),
        ("4KiB", 4096), ("4kB", 4096), ("7B", 7), (" 8 K ", 8192),
    ],
)  # fmt: skip
def test_sizes_read(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes
    assert parse_size(format_size(num_bytes)) == num_bytes


@pytest.mark.parametrize("text", ["", "K", "0", "0M", "-1", "1.5K", "1T", "1e6", "0x10", "K4"])
def test_other_sizes_are_refused_by_name(text: str) -> None:
    with pytest.raises(ArgumentError, match="size") as refusal:
        parse_size(text)
    assert repr(text) in str(refusal.value)


def test_times_are_written_with_their_unit() -> None:
    assert [format_time(t) for t in (1.25, 850, 12345, 3.4e6)] == [
        "1.25 us", "850 us", "12.3 ms", "3.4 s",
    ]  # fmt: skip


@pytest.mark.parametrize("n", range(1, 9))
def test_everybody_follows_everybody_equally_often(n: int) -> None:
    num_rounds = n if n % 2 == 0 else 2 * n
    orders = turns(n, num_rounds)
    assert all(sorted(order) == list(range(n)) for order in orders)
    follows = Counter(pair for order in orders for pair in pairwise(order))
    assert len(follows) == n * (n - 1)
    assert len(set(follows.values())) <= 1
    for place in range(n):
        assert len(set(Counter(order[place] for order in orders).values())) == 1
    assert turns(n, num_rounds + 1)[-1] == orders[0]


def test_rows_say_who_was_how_fast_and_what_fell_back() -> None:
    found = list(rows(MEASURED, ABOUT))
    assert [row["speedup"] for row in found] == [1.0, pytest.approx(105 / 51, abs=1e-3), 1.0, 1.0]
    assert found[0]["median_us"] == 105
    assert found[0]["min_us"] == 90
    assert found[0]["p90_us"] == pytest.approx(313)
    assert [row["executor"] for row in found] == [
        "torch.distributed", "host", "torch.distributed", "torch.distributed",
    ]  # fmt: skip
    assert found[3]["fallbacks"] == {"too large": 4}
    assert all(row["topology"] == "2x2" for row in found)


def test_rows_are_written_a_line_each(tmp_path: Path) -> None:
    write_rows(rows(MEASURED, ABOUT), tmp_path / "rows.jsonl")
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["contender"] for line in lines] == ["torch", "nvrar"] * 2


def test_a_checkout_is_dirty_where_its_own_files_were_changed(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(tmp_path), *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    source, beside = package / "source.py", tmp_path / "results.json"
    source.write_text("1\n")
    git("init", "--quiet")
    assert checkout(source) == (None, None)  # as a package installed inside a clone
    git("add", "package/source.py")
    git("commit", "--quiet", "--message", "x")
    beside.write_text("{}")
    assert checkout(source) == (git("rev-parse", "HEAD"), False)
    table = package / "table.json"
    table.write_text("{}")  # as one that the tuner wrote there
    assert checkout(source) == (git("rev-parse", "HEAD"), True)
    table.unlink()
    source.write_text("2\n")
    assert checkout(source) == (git("rev-parse", "HEAD"), True)


def test_the_table_shows_ratio_prediction_and_fallback() -> None:
    out = io.StringIO()
    Console(width=160, file=out).print(table(MEASURED, ABOUT, with_predictions=True))
    text = out.getvalue()
    assert "sum of bfloat16, 2 nodes x 2 ranks on Some CPU, 8 cores (gloo)" in text
    assert "x2.06" in text
    assert "~45" in text
    assert "* nvrar at 4 KiB: 4 of 4 calls fell back to torch.distributed (too large)" in text


def test_the_headline_says_what_carries_ours_where_that_is_not_the_backend() -> None:
    assert headline({**ABOUT, "link": "gloo"}).endswith("(gloo)")
    assert headline({**ABOUT, "backend": "nccl", "link": "nvlink"}).endswith(
        "(nccl; nvrar: nvlink)"
    )


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_picture_is_drawn(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bench{suffix}"
    picture(MEASURED, ABOUT, path)
    start = path.read_bytes()[:2000]
    assert start.startswith(b"\x89PNG") if suffix == ".png" else b"<svg" in start
    if suffix == ".svg":
        text = path.read_text()
        assert "nvrar (fell back to torch)" in text
        assert "2 nodes x 2 ranks on Some CPU" in text


def test_settings_refuse_what_cannot_be_measured() -> None:
    for wrong in ({"op": "mul"}, {"iterations": 0}, {"dtype": torch.int32, "op": "avg"}):
        with pytest.raises(ArgumentError):
            Settings(**wrong)
    assert Settings(dtype=torch.float64).num_elements(64) == 8
    for num_bytes in (0, 12):
        with pytest.raises(ArgumentError, match=str(num_bytes)):
            Settings(dtype=torch.float64).num_elements(num_bytes)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        (
            {
                "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "SLURM_PROCID": "0",
                "MASTER_ADDR": "a", "MASTER_PORT": "1",
            },
            Seat("torchrun", 3, 4, 1, "a", 1),
        ),
        (
            {
                "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1",
                "SLURM_STEP_NODELIST": "gpu[003-007,9],login1",
                "SLURM_JOB_ID": "100", "SLURM_STEP_ID": "2",
            },
            Seat("Slurm", 5, 8, 1, "gpu003", 23102),
        ),
        (
            {
                "SLURM_PROCID": "0", "SLURM_NTASKS": "9", "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_JOB_NODELIST": "a,b", "MASTER_PORT": "1234",
            },
            Seat("Slurm", 0, 2, 0, "a", 1234),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, None),  # a batch script, outside srun
        ({"SLURM_JOB_ID": "7"}, None),  # inside an allocation, outside srun
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, None),  # --pty bash
    ],
)  # fmt: skip
def test_seats_are_read_from_the_environment(variables: dict, expected: Seat | None) -> None:
    assert seat(variables) == expected


def test_an_ipv6_address_is_told_from_its_port() -> None:
    step = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "MASTER_ADDR": "::1"}
    place = seat(step | {"MASTER_PORT": "1234"})
    assert place is not None
    assert place.init_method == "tcp://[::1]:1234"
    assert place.address == "[::1]:1234"  # in errors


def test_malformed_seats_are_refused() -> None:
    with pytest.raises(ArgumentError, match="RANK is 'x'"):
        seat({"RANK": "x", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"})
    with pytest.raises(ArgumentError, match="MASTER_PORT"):
        seat({"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "a"})
    with pytest.raises(ArgumentError, match="MASTER_ADDR"):
        seat({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"})
    with pytest.raises(ArgumentError, match="rank 4 of 4"):
        seat({"RANK": "4", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[3-5,9]", "n3"),
        ("a-b[01,04]-x,z", "a-b01-x"),
        ("h.de", "h.de"),
    ],
)
def test_the_first_host_of_a_slurm_list(nodes: str, first: str) -> None:
    step = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}
    place = seat(step | {"SLURM_STEP_NODELIST": nodes})
    assert place is not None
    assert place.host == first


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("op", ["sum", "avg", "max"])
def test_the_bound_admits_every_plan_and_no_wrong_sum(dtype: torch.dtype, op: str) -> None:
    inputs = random_inputs(12, 2000, dtype)
    exact = exact_all_reduce(inputs, op)
    for plan in Plan.all(Topology(3, 4)):
        result = reference_all_reduce(inputs, plan, op)
        bound = error_bound(inputs, op, plan)
        assert ((result.double() - exact).abs() <= bound).all()
        assert (bound <= error_bound(inputs, op, None) * 1.1).all()
        without_one = reference_all_reduce(inputs[:11], Plan.parse("split:11"), op)
        if op != "max":
            assert ((without_one.double() - exact).abs() > bound).any()


def test_every_plan_can_be_drawn() -> None:
    for topology in (Topology(1, 1), Topology(5, 1), Topology(3, 4), Topology(1, 40)):
        for plan in Plan.all(topology):
            text = draw(plan, topology, 65536, MACHINES["gloo"])
            assert str(plan) in text
            assert text.count("predicted") == 1 + plan.num_steps
    wide = draw(Plan.named("nvrar", Topology(16, 8)), Topology(16, 8), 65536, MACHINES["gloo"])
    assert max(map(len, wide.splitlines())) < 170
    assert names_of(Plan.parse("split:4 exchange:3"), Topology(3, 4)) == ("nvrar", "direct")


def test_a_run_becomes_the_results_that_the_readme_shows(tmp_path: Path) -> None:
    scripts = str(Path(__file__).parents[2] / "scripts")
    sys.path.insert(0, scripts)
    try:
        from readme_table import from_bench
        from readme_table import table as readme_table
    finally:
        sys.path.remove(scripts)
    about = ABOUT | {
        "timestamp": "2026-11-23T08:00:00+00:00", "git_commit": "0123456789", "command": "nvrar bench",
        "cuda": "13.0", "driver": "580.1", "torch": "2.11", "nccl": None,
    }  # fmt: skip
    names = ("torch", "nccl pool", "symm_mem one-shot", "symm_mem two-shot", "auto")
    timed = [
        Measurement(name, 1024, None, (10.0 - i, 11.0 - i), timing=timing)
        for timing in ("graph", "interleaved")
        for i, name in enumerate(names)
    ]
    write_rows(rows(timed, about), tmp_path / "run.jsonl")
    results = from_bench((tmp_path / "run.jsonl").read_text().splitlines())
    assert results["columns"][0] == "bytes"
    assert results["rows"] == results["interleaved"]["rows"] == [[1024, 10.5, 9.5, 8.5, 7.5, 6.5]]
    assert (results["commit"], results["date"]) == ("0123456", "2026-11-23")
    shown = readme_table(results)
    assert "| 1 KiB | 10.50 | 9.50 | 8.50 | 7.50 | 6.50 | 1.62 |" in shown
    assert "CUDA 13.0, driver 580.1, torch 2.11." in shown
