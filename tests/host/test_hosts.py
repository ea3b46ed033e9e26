"""Ranks on several hosts, each a network namespace of its own: what a cluster does, on one machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from hosts_script import digest, inputs
from netns import Hosts, why_not
from nvrar import Plan, Topology
from nvrar.testing import reference_all_reduce

pytestmark = [pytest.mark.root, pytest.mark.host]

REASON = why_not()
if REASON:
    pytest.skip(f"network namespaces: {REASON}", allow_module_level=True)

SCRIPT = str(Path(__file__).parents[1] / "hosts_script.py")
PLANS = ("nvrar", "two-shot", "exchange:2 split:2", "halving-doubling")


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[Hosts]:
    with Hosts(2) as hosts:
        yield hosts


def torchrun(num_ranks: Sequence[int], *command: str) -> list[list[str]]:
    """A command for each host: ``num_ranks[i]`` ranks there, meeting on host0."""
    return [
        [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", str(len(num_ranks)), "--nproc-per-node", str(count)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "host0:29500"),
            *command,
        ]
        for count in num_ranks
    ]


def json_lines(outputs: Sequence[str]) -> list[dict]:
    lines = (line for output in outputs for line in output.splitlines())
    return [json.loads(line) for line in lines if line.startswith("{")]


def expected_bits(plan: str, num_ranks: int) -> str:
    result = reference_all_reduce(inputs(num_ranks), Plan.parse(plan))
    return digest(result.view(torch.uint8))


def test_detects_the_hosts_and_gives_the_bits_of_one_process(two_hosts: Hosts) -> None:
    said = json_lines(two_hosts.run(torchrun([2, 2], SCRIPT, *PLANS)))
    assert sorted(s["rank"] for s in said) == [0, 1, 2, 3]
    assert {s["host"] for s in said} == {"host0", "host1"}
    assert {s["topology"] for s in said} == {"2x2"}
    assert {s["topology_by_host_name"] for s in said} == {"2x2"}
    words = {str(Plan.resolve(plan, Topology(2, 2))) for plan in PLANS}
    for s in said:
        assert words <= s["bits"].keys()
        assert s["bits"] == {plan: expected_bits(plan, 4) for plan in s["bits"]}


def test_uneven_hosts_get_a_flat_plan_and_are_told(two_hosts: Hosts) -> None:
    outputs = two_hosts.run(torchrun([2, 1], SCRIPT, "nvrar"))
    said = json_lines(outputs)
    assert {s["topology"] for s in said} == {"3x1"}
    assert {s["topology_by_host_name"] for s in said} == {"3x1"}
    for s in said:
        assert s["bits"] == {plan: expected_bits(plan, 3) for plan in s["bits"]}
    assert all("nodes hold unequal numbers of ranks" in output for output in outputs)


def test_generates_the_tokens_of_one_host(two_hosts: Hosts, tmp_path: Path) -> None:
    model = str(tmp_path / "model")
    yalis = "import sys; from yalis.cli import main; sys.exit(main())"
    here = [sys.executable, "-c", yalis]
    subprocess.run([*here, "make-checkpoint", model, "--layers", "2"], check=True, timeout=60)
    script = tmp_path / "yalis_script.py"
    script.write_text(yalis)
    arguments = ["generate", model, "--prompt", "Once upon a time", "--max-tokens", "16"]
    arguments += ["--ignore-eos", "--all-reduce-plan", "nvrar", "--json"]
    alone = subprocess.run(
        [*here, *arguments], check=True, capture_output=True, text=True, timeout=120
    )
    launched = two_hosts.run(torchrun([2, 2], str(script), *arguments, "--verbose"))
    (one,), (many,) = json_lines([alone.stdout]), json_lines(launched)
    assert many["token_ids"] == one["token_ids"]
    assert len(many["token_ids"]) == 16
    [about] = [output for output in launched if "'backend'" in output]  # said once in a job
    assert "'backend': 'nvrar'" in about  # and not torch's all-reduce in its place:
    assert "'fallbacks': {}" in about


def test_joins_a_slurm_step_from_its_variables(two_hosts: Hosts) -> None:
    slurm = (
        "SLURM_PROCID=$HOST_RANK SLURM_NODEID=$HOST_RANK SLURM_NTASKS=2 SLURM_LOCALID=0 "
        "SLURM_JOB_ID=4711 SLURM_STEP_ID=3 SLURM_STEP_NODELIST=host[0-1] exec "
    )
    command = ["sh", "-c", f"{slurm} {sys.executable} {SCRIPT} two-shot"]
    said = json_lines(two_hosts.run([command, command]))
    assert [s["rank"] for s in said] == [0, 1]
    assert {s["topology"] for s in said} == {"2x1"}


def test_on_slow_links_a_hierarchical_plan_beats_the_flat_ones(tmp_path: Path) -> None:
    # 1 MiB on 2x2 at 100 Mbit/s: what a host must send over its link is 1 MiB by nvrar, 2 MiB by
    # two-shot, 4 MiB by one-shot; the margins asked for leave half of each advantage to chance.
    machine = {
        "name": "100 Mbit/s between hosts",
        "node_local": {"latency_us": 300, "bandwidth_gbps": 1.0},
        "cross_node": {"latency_us": 500, "bandwidth_gbps": 0.006},
    }
    rows_path = tmp_path / "rows.jsonl"
    bench = [
        *("-m", "nvrar", "bench", "--sizes", "1M", "--plans", "auto,two-shot,one-shot"),
        *("--iterations", "3", "--rounds", "2", "--warmup", "1"),
        *("--machine", json.dumps(machine), "--predict", "--json", str(rows_path)),
    ]
    with Hosts(2, rate="100mbit") as hosts:
        outputs = hosts.run(torchrun([2, 2], *bench))
    rows = {row["contender"]: row for row in json_lines([rows_path.read_text()])}
    # The least of the times: the link bounds it from below, and a busy machine only the others.
    time_us = {name: row["min_us"] for name, row in rows.items()}
    assert rows["auto"]["plan"] == "split:2 exchange:2"  # chosen by the description of the machine
    assert time_us["two-shot"] > 1.4 * time_us["auto"]
    assert time_us["one-shot"] > 2 * time_us["auto"]
    assert [h["name"] for h in rows["auto"]["hosts"]] == ["host0", "host1"]
    assert all(row["topology"] == "2x2" for row in rows.values())
    print(outputs[0])


def test_leaves_nothing_behind_when_it_fails() -> None:
    with Hosts(2) as hosts, pytest.raises(RuntimeError, match=r"host0 \(exit code 3\)") as failure:
        hosts.run([["sh", "-c", "exit 3"], ["sleep", "1000"]])
    assert "host1 (exit code -15)" in str(failure.value)
    interrupted = Hosts(1)
    process = None
    try:
        with interrupted:
            process = interrupted.start(0, ["sleep", "1000"])
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert process is not None
    assert process.poll() is not None
    listing = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert hosts.namespace("host0") not in listing
    assert interrupted.namespace("host0") not in listing
