"""The commands in one process: what they show, and the one line they say when they cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nvrar import MACHINES, Plan, Topology
from nvrar.cli import main
from nvrar.tune import choose, ranking


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "NVRAR_RANKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)


def test_info_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--nodes", "2", "--ranks-per-node", "2"]) == 0
    out = capsys.readouterr().out
    for heading in ("versions", "devices", "topology", "networks", "executors", "environment"):
        assert f"\n{heading}\n" in f"\n{out}"
    assert "NVRAR_RANKS_PER_NODE" in out
    assert "GLOO_SOCKET_IFNAME" in out
    assert str(choose(Topology(2, 2), 1 << 20, MACHINES["gloo"])) in out


def test_info_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVRAR_RANKS_PER_NODE", "3")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    layout = ["--nodes", "3", "--ranks-per-node", "4", "--machine", "perlmutter"]
    assert main(["info", "--json", *layout]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["topology"]["source"] == "NVRAR_RANKS_PER_NODE"
    assert facts["environment"]["NVRAR_RANKS_PER_NODE"] == "3"
    assert facts["host"]["num_cores"] >= 1
    loopback = next(i for i in facts["interfaces"] if i["name"] == "lo")
    assert loopback == {"name": "lo", "address": "127.0.0.1", "used_by_gloo": True}
    gpu = next(e for e in facts["executors"] if e["name"] == "gpu")
    assert gpu["available"] or gpu["missing"]  # what is not here says how to get it
    for row in facts["choices"]:
        plan = choose(Topology(3, 4), row["num_bytes"], MACHINES["perlmutter"])
        assert row["plan"] == str(plan)


def test_info_reads_the_launchers_layout(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    for name, value in {**variables, "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "torchrun, rank 5 of 8" in out
    assert "plan 'auto' on 2x4 ranks" in out


def test_plan_draws_who_works_with_whom(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--nodes", "3", "--ranks-per-node", "4", "--bytes", "262144"]
    assert main([*arguments, "--plan", "nvrar", "--machine", "h100-ndr"]) == 0
    out = capsys.readouterr().out
    assert "plan  split:4 exchange:3   (nvrar, direct)" in out
    rows = {line.split()[1]: line.split() for line in out.splitlines() if line[:1].isdigit()}
    assert rows["exchange:3"]
    assert "A  A  A  A    B  B  B  B    C  C  C  C" in out
    assert "A  B  C  D    A  B  C  D    A  B  C  D" in out
    assert "rank 0 with 4, 8; cross-node" in out
    assert "cuts its block of 256 KiB into 4 parts of 64 KiB" in out


def test_plan_ranks_by_predicted_time(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--nodes", "3", "--ranks-per-node", "4", "--bytes", "256K", "--top", "3"]
    assert main(["plan", "--json", *arguments]) == 0
    said = json.loads(capsys.readouterr().out)
    expected = ranking(Topology(3, 4), 262144, MACHINES["gloo"])
    assert said["num_bytes"] == 262144
    assert said["num_plans"] == len(expected)
    assert [row["plan"] for row in said["plans"]] == [str(plan) for plan, _ in expected[:3]]
    for row in said["plans"]:
        assert Plan.parse(row["plan"]).num_steps == row["steps"]


def test_the_plans_of_two_large_nodes_fit_a_terminal_in_a_line_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVRAR_TUNE_TABLE", "off")
    assert main(["plan", "--nodes", "2", "--ranks-per-node", "8", "--top", "38"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert len(rows) == 38
    assert max(len(row) for row in rows) <= 80
    assert any(row.startswith("│ split:8 exchange:2 (nvrar, direct)") for row in rows)


def test_a_machine_may_be_described(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    described = json.dumps(
        {
            "name": "two cans and a string",
            "node_local": {"latency_us": 1, "bandwidth_gbps": 100},
            "cross_node": {"latency_us": 1, "bandwidth_gbps": 0.001, "inflation": 2},
        }
    )
    path = tmp_path / "machine.json"
    path.write_text(described)
    chosen = []
    for machine in (described, str(path), "gloo"):
        assert main(["plan", "--json", "--bytes", "1M", "--machine", machine]) == 0
        chosen.append(json.loads(capsys.readouterr().out))
    assert chosen[0] == chosen[1]
    assert chosen[0]["machine"] == "two cans and a string"
    assert chosen[0]["chosen"].startswith("split:4")  # as little as can be over the string
    assert chosen[0]["chosen"] != chosen[2]["chosen"]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("plan --bytes 12X", ["'12X'", "256K"]),
        ("plan --bytes 0", ["'0'", "above 0"]),
        ("plan --nodes 0", ["--nodes", "'0'", "at least 1"]),
        ("plan --nodes two", ["--nodes", "'two'", "whole number"]),
        ("plan --plan exchange:3", ["exchange:3", "3 ranks", "8", "multiply"]),
        ("plan --plan fast", ["'fast'", "one-shot"]),
        ("plan --machine summit", ["'summit'", "perlmutter"]),
        ('plan --machine {"node_local":3}', ["node_local", "3", "latency_us"]),
        ('plan --machine {"node_local"', ["not JSON"]),
        ('plan --machine {"nodes":3}', ["'nodes'", "cross_node"]),
        ("bench --sizes 1K,,4Q", ["'4Q'"]),
        ("bench --sizes ,", ["','", "at least one"]),
        ("bench --sizes 1001", ["1001", "multiple of the 2 bytes", "bfloat16"]),
        ("bench --min 1K", ["--max"]),
        ("bench --min 1M --max 1K", ["1M", "1K", "swap"]),
        ("bench --plans nvrar,split:3", ["split:3", "3 ranks", "4"]),
        ("bench --plans faster", ["'faster'", "halving-doubling"]),
        ("bench --plans split:2+split:2", ["'split:2+split:2'"]),
        ("bench --dtype int4", ["int4", "bfloat16"]),
        ("bench --dtype int32 --op avg", ["avg", "int32", "floating"]),
        ("bench --warmup -1", ["warmup", "-1", "at least 0"]),
        ("bench --iterations 0", ["--iterations", "'0'"]),
        ("bench --device cuda --nodes 99", ["GPU", "--device cpu"]),
        ("bench --sizes 4000G", ["4000 GiB", "memory", "smaller"]),
        ("bench --timeout 0", ["timeout", "0 s", "above 0"]),
        ("bench --plot x.gif", ["x.gif", ".svg"]),
        ("bench --json /nowhere/x.jsonl", ["/nowhere/x.jsonl", "directory"]),
        ("bench --json /", ["/ cannot be written", "name a file in it"]),
        ("bench --node 3", ["unrecognized", "--node", "mean --nodes?", "see nvrar bench --help"]),
        ("plan 2x4", ["unrecognized", "2x4 (see nvrar plan --help)"]),
        ("bench --eager", ["--eager", "--device cuda"]),
        ("bench --device cuda --eager --interleaved", ["--interleaved", "--eager"]),
        ("tune --sizes 1001", ["1001", "multiple of the 2 bytes"]),
        ("tune --dtype bfloat16,int4", ["int4", "float32"]),
        ("tune --device cuda --dtype float64", ["float64", "bfloat16"]),
        ("tune --budget 0", ["--budget", "0 s", "above 0"]),
        ("tune --device cpu --nodes 1 --ranks-per-node 1", ["one rank", "--ranks-per-node"]),
        ("tune --dtype bfloat16,float32 --output x.json", ["x.json", "2 types", "folder"]),
        ("tune --output /proc/x", ["/proc/x", "cannot be made"]),
        ("turn", ["turn", "tune"]),
        ("", ["COMMAND"]),
    ],
)
def test_what_cannot_work_is_one_line(
    command: str, says: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(command.split())
    except SystemExit as stopped:  # argparse's way
        code = stopped.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    for word in says:
        assert word in captured.err


def test_tuning_and_playing_gpus_need_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for command, says in [
        ("tune --device cuda", "torch sees no GPU here"),
        ("bench --device cuda", "torch sees no GPU here"),
        ("bench --virtual 4x8", "this machine sees no GPU"),
        ("bench --virtual 4", "'4'"),
        ("bench --virtual 1x1", "one rank"),
        ("bench --virtual 4x8 --json x.jsonl", "--json and --virtual"),
    ]:
        assert main(command.split()) == 2
        said = capsys.readouterr()
        assert says in said.err
        assert said.err.count("\n") == 1
        assert said.out == ""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, dict[str, str]]]:
    """What ``nvrar bench`` would start, instead of starting it."""
    calls: list[tuple[int, dict[str, str]]] = []

    def start(num_workers: int, command: list[str], variables: dict[str, str]) -> int:
        calls.append((num_workers, variables))
        return 7

    monkeypatch.setattr("nvrar.commands.ranks.start_local_workers", start)
    return calls


def test_more_ranks_than_cores_are_warned_of(
    started: list, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--nodes", "50", "--ranks-per-node", "40"]) == 7
    assert started == [(2000, {"NVRAR_RANKS_PER_NODE": "40"})]
    assert "2000 ranks share" in capsys.readouterr().err


def test_a_bench_plays_the_nodes_that_the_environment_says(
    started: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NVRAR_RANKS_PER_NODE", "3")
    assert main(["bench"]) == 7
    assert main(["bench", "--ranks-per-node", "1"]) == 7
    assert [num_workers for num_workers, _ in started] == [6, 2]
    monkeypatch.setenv("NVRAR_RANKS_PER_NODE", "many")
    assert main(["bench"]) == 2
    assert "'many'" in capsys.readouterr().err
