"""The commands on all the GPUs of this machine, small, as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gpus
import pytest

from nvrar.table import Table

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(gpus.COUNT < 2, reason="needs two CUDA GPUs, as it measures"),
    pytest.mark.skipif(bool(gpus.WHY_NO_RANKS), reason=gpus.WHY_NO_RANKS),
    pytest.mark.timeout(300),
]


def nvrar(line: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "nvrar", *line.split()],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **variables},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_was_tuned_is_what_a_bench_runs(tmp_path: Path) -> None:
    nvrar(f"tune --sizes 4K,1M --budget 120 --output {tmp_path / 'tables'}")
    (path,) = (tmp_path / "tables").iterdir()
    table = Table.loads(path.read_text())
    assert table.key.topology == f"1x{gpus.COUNT}"
    assert not table.left_out
    for entry in table.entries:
        best = entry.best()
        assert best is not None
        assert best.packets in ("LL", "LL128")
    rows_path = tmp_path / "rows.jsonl"
    line = f"bench --device cuda --interleaved --sizes 4K,1M --plans auto --json {rows_path}"
    nvrar(line, NVRAR_TUNE_TABLE=str(path))
    rows = [json.loads(text) for text in rows_path.read_text().splitlines()]
    assert {row["timing"] for row in rows} == {"graph", "interleaved"}
    assert {"torch", "auto"} <= {row["contender"] for row in rows}
    for row in rows:
        assert 0 < row["median_us"] < 1000
        if row["contender"] == "auto":
            entry = table.entry_at(row["num_bytes"])
            expected = None if entry.is_for_torch else str(entry.best().plan)
            assert row["plan"] == expected


def test_host_time_and_a_fallback_that_does_not_block(tmp_path: Path) -> None:
    rows_path = tmp_path / "rows.jsonl"
    line = f"bench --device cuda --eager --plans auto --sizes 16K,64M --max-bytes 1M --json {rows_path}"
    nvrar(line, NVRAR_TUNE_TABLE="off")
    rows = [json.loads(text) for text in rows_path.read_text().splitlines()]
    times = {(row["contender"], row["num_bytes"]): row["median_us"] for row in rows}
    assert times["auto", 64 << 20] < times["torch", 64 << 20] + 15, (
        "NCCL itself takes 200 us and more"
    )


def test_virtual_ranks() -> None:
    said = nvrar("bench --virtual 3x2 --sizes 1K,100002 --plans auto,nvrar,one-shot")
    assert "3x2 virtual ranks on one" in said
    assert said.count("right") == 2 * 2 * 2  # two plans differ, two formats, two sizes
