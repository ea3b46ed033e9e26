"""What happens when a rank dies, stops, comes late, never comes, or makes another call."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import nvrar
from nvrar import ArgumentError, Communicator, Topology
from ranks import Outcome, Ranks, run, say

pytestmark = pytest.mark.host

TIMEOUT_S = 3.0
SLACK_S = 0.5  # for a loaded machine


def attempt(comm: Communicator, x: torch.Tensor, **options: Any) -> dict[str, Any]:
    """How one all-reduce ended."""
    began = time.monotonic()
    try:
        comm.all_reduce(x, **options)
    except nvrar.NvrarError as error:
        return {
            "kind": type(error).__name__,
            "peers": getattr(error, "peers", None),
            "text": str(error),
            "seconds": time.monotonic() - began,
        }
    return {"kind": "fine"}


def until_it_fails(
    rank: int, topology: str, plan: str, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """All-reduces without end, of changing sizes."""
    comm = Communicator(topology=Topology.parse(topology), plan=plan, timeout_s=TIMEOUT_S)
    say("ready")
    for i in range(10**6):
        result = attempt(comm, torch.ones(1 + 37 * i % 1500).to(dtype))
        if result["kind"] != "fine":
            return {**result, "again": attempt(comm, torch.ones(3))}
    raise AssertionError("no end came")


def assert_all_blame(outcomes: list[Outcome], culprit: int) -> None:
    for rank, outcome in enumerate(outcomes):
        if rank == culprit:
            continue
        assert not outcome.error, f"rank {rank}: {outcome.error}"
        assert outcome.exit_code == 0
        found = outcome.value
        assert found["kind"] == "PeerTimeout", f"rank {rank}: {found}"
        assert found["peers"] == (culprit,), f"rank {rank}: {found}"
        assert f"gave up on rank {culprit} " in found["text"]
        assert found["seconds"] < TIMEOUT_S + SLACK_S
        if "again" in found:  # broken for good, and at once
            assert found["again"]["text"] == found["text"]
            assert found["again"]["seconds"] < 0.1


MIDDLE = [
    ("SIGKILL", "2x2", "split:2 exchange:2", 3),
    ("SIGKILL", "2x2", "exchange:2 exchange:2", 1),
    ("SIGKILL", "2x2", "split:4", 2),
    ("SIGKILL", "1x5", "exchange:5", 2),
    ("SIGKILL", "2x3", "split:3 split:2", 4),
    ("SIGKILL", "4x2", "split:2 exchange:2 exchange:2", 5),
    ("SIGKILL", "4x2", "split:2 split:2 split:2", 7),
    ("SIGKILL", "3x3", "split:3 exchange:3", 4),
    ("SIGSTOP", "2x2", "split:2 split:2", 3),
    ("SIGSTOP", "1x5", "exchange:5", 2),
    ("SIGSTOP", "4x2", "split:2 exchange:2 exchange:2", 6),
]


@pytest.mark.parametrize(("how", "topology", "plan", "culprit"), MIDDLE)
def test_a_rank_ends_in_the_middle(how: str, topology: str, plan: str, culprit: int) -> None:
    world_size = Topology.parse(topology).world_size
    world = Ranks(until_it_fails, world_size, topology, plan)
    for rank in range(world_size):
        assert world.wait_for_word(rank) == "ready"
    time.sleep(0.4)
    world.signal(culprit, signal.Signals[how])
    if how == "SIGSTOP":
        time.sleep(TIMEOUT_S + SLACK_S)
        world.signal(culprit, signal.SIGKILL)
    assert_all_blame(world.join(), culprit)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize(
    ("store", "plan"), [("rank 0", "split:2 exchange:2"), ("parent", "split:4")]
)
def test_rank_0_ends(how: str, store: str, plan: str) -> None:
    """With the store on it, the survivors can tell each other nothing."""
    world = Ranks(until_it_fails, 4, "2x2", plan, store=store)
    for rank in range(4):
        world.wait_for_word(rank)
    time.sleep(0.3)
    world.signal(0, signal.Signals[how])
    if how == "SIGSTOP":
        time.sleep(TIMEOUT_S + SLACK_S)
        world.signal(0, signal.SIGKILL)
    assert_all_blame(world.join(), 0)


def test_a_rank_ends_in_the_fallback() -> None:
    world = Ranks(until_it_fails, 4, "2x2", "nvrar", torch.uint8)
    for rank in range(4):
        world.wait_for_word(rank)
    time.sleep(0.4)
    world.signal(2, signal.SIGKILL)
    assert_all_blame(world.join(), 2)


def absent(rank: int, culprit: int, plan: str, how: str) -> dict[str, Any]:
    comm = Communicator(topology=Topology(2, 2), plan=plan, timeout_s=TIMEOUT_S)
    assert attempt(comm, torch.ones(5))["kind"] == "fine"
    if rank == culprit:
        if how == "exits":
            return {}
        time.sleep(TIMEOUT_S + 1)
        if how == "never":
            return {}
    return attempt(comm, torch.ones(1000))


ABSENT = [
    (how, plan)
    for how in ("exits", "never", "late")
    for plan in ("split:2 exchange:2", "split:2 split:2", "exchange:4")
]


@pytest.fixture(scope="module")
def absent_worlds() -> Iterator[dict[tuple[str, str], Ranks]]:
    """They mostly wait, so all may wait at once."""
    worlds = {(how, plan): Ranks(absent, 4, 1, plan, how) for how, plan in ABSENT}
    yield worlds
    for world in worlds.values():
        world.end()


@pytest.mark.parametrize(("how", "plan"), ABSENT)
def test_a_rank_never_comes_or_comes_late(
    absent_worlds: dict[tuple[str, str], Ranks], how: str, plan: str
) -> None:
    outcomes = absent_worlds[how, plan].join()
    assert_all_blame(outcomes, 1)
    if how == "late":
        late = outcomes[1].value
        assert late["kind"] == "PeerTimeout"
        assert late["peers"] == (1,)
        assert "rank 1 came too late" in late["text"]


def late_in_the_grace(rank: int) -> dict[str, Any]:
    """Rank 2 comes when the others have given up, but not yet found out why."""
    comm = Communicator(topology=Topology(1, 3), plan="exchange:3", timeout_s=TIMEOUT_S)
    attempt(comm, torch.ones(1))
    if rank == 2:
        time.sleep(TIMEOUT_S - 0.75 / 2)
    return attempt(comm, torch.ones(4))


def test_a_rank_comes_while_the_others_look_for_it() -> None:
    outcomes = Ranks(late_in_the_grace, 3).join()
    assert [o.value["kind"] for o in outcomes] == ["PeerTimeout"] * 3
    assert [o.value["peers"] for o in outcomes] == [(2,)] * 3, [o.value for o in outcomes]


def differing(rank: int, culprit: int, what: str) -> dict[str, Any]:
    comm = Communicator(
        topology=Topology(2, 2), plan="split:2 exchange:2", timeout_s=2.0, max_bytes=4000
    )
    assert attempt(comm, torch.ones(5))["kind"] == "fine"
    odd = rank == culprit
    match what:
        case "size":
            return attempt(comm, torch.ones(100 if odd else 400))
        case "no elements":
            result = attempt(comm, torch.ones(0 if odd else 400))
            return attempt(comm, torch.ones(7)) if odd else result
        case "dtype":
            return attempt(comm, torch.ones(400, dtype=torch.int32 if odd else torch.float32))
        case "op":
            return attempt(comm, torch.ones(400), op="max" if odd else "sum")
        case "fallback or not":
            return attempt(comm, torch.ones(2000 if odd else 400))
        case "size in the fallback":
            return attempt(comm, torch.ones(200_000 if odd else 2000))
        case "another number of calls":
            if odd:
                attempt(comm, torch.ones(0))  # talks to nobody, but counts
            return attempt(comm, torch.ones(400))
    raise ValueError(what)


DIFFERING = [
    (what, culprit)
    for what in (
        "size",
        "no elements",
        "dtype",
        "op",
        "fallback or not",
        "size in the fallback",
        "another number of calls",
    )
    for culprit in (0, 3)
]


@pytest.fixture(scope="module")
def differing_worlds() -> Iterator[dict[tuple[str, int], Ranks]]:
    worlds = {(what, culprit): Ranks(differing, 4, culprit, what) for what, culprit in DIFFERING}
    yield worlds
    for world in worlds.values():
        world.end()


@pytest.mark.parametrize(("what", "culprit"), DIFFERING)
def test_ranks_make_different_calls(
    differing_worlds: dict[tuple[str, int], Ranks], what: str, culprit: int
) -> None:
    for rank, outcome in enumerate(differing_worlds[what, culprit].join()):
        assert not outcome.error, f"rank {rank}: {outcome.error}"
        found = outcome.value
        assert found["kind"] == "DisagreementError", f"rank {rank}: {found}"
        if rank != culprit:
            assert f"rank {culprit} was in call" in found["text"]
        assert found["seconds"] < 2.0 + SLACK_S


def refusing(rank: int, everyone: bool) -> dict[str, Any]:
    comm = Communicator(topology=Topology(2, 2), timeout_s=2.0)
    x = torch.ones(4)
    if everyone or rank == 2:
        with pytest.raises(
            ArgumentError, match="op is 'mean'; it must be one of sum, avg, max, min"
        ):
            comm.all_reduce(x, op="mean")
        result = attempt(comm, x)
    else:
        result = attempt(comm, x)
    return result


def test_one_rank_refuses_its_arguments_and_the_others_are_told() -> None:
    results = run(refusing, 4, False)
    for rank in (0, 1, 3):
        assert results[rank]["kind"] == "DisagreementError", results[rank]
        assert "rank 2 refused its arguments in call 1: op is 'mean'" in results[rank]["text"]
    assert results[2]["kind"] in ("DisagreementError", "PeerTimeout"), results[2]


def again(rank: int) -> tuple[str, str, float]:
    """After calls that differ: a communicator on the same group, and one on a new group."""
    found = attempt(Communicator(timeout_s=2.0), torch.ones(4 - rank))
    assert found["kind"] == "DisagreementError", found
    dist.barrier(dist.new_group())
    same = attempt(Communicator(timeout_s=2.0), torch.ones(4))
    new = Communicator(dist.new_group(), timeout_s=2.0)
    return found["text"], same["text"], new.all_reduce(torch.ones(1)).item()


def test_what_remains_of_a_gloo_group_is_said() -> None:
    results = run(again, 2)
    for said, _, total in results:
        assert "with gloo its process group too: torch.distributed.new_group makes another" in said
        assert total == 2
    # The first whose time ran out closed its end; the other may have seen it closed.
    assert any("gloo closed the connection; make a new process group" in r[1] for r in results)


def test_all_ranks_refuse_and_go_on() -> None:
    assert [r["kind"] for r in run(refusing, 4, True)] == ["fine"] * 4


def stale_refusal(rank: int) -> dict[str, Any]:
    """A refusal that all ranks made is no explanation of what goes wrong later."""
    comm = Communicator(topology=Topology(2, 2), timeout_s=2.0)
    with pytest.raises(ArgumentError):
        comm.all_reduce(torch.ones(4), op="mean")
    comm.all_reduce(torch.ones(4))
    if rank == 1:
        time.sleep(3)
        return {}
    return attempt(comm, torch.ones(4))


def test_a_refusal_of_the_past_is_over() -> None:
    results = run(stale_refusal, 4)
    for rank in (0, 2, 3):
        assert results[rank]["peers"] == (1,), results[rank]


def post_to_a_dead_peer(rank: int) -> tuple[int, ...] | None:
    """The connection is known to be broken before the call: posting fails, not waiting."""
    comm = Communicator(plan="exchange:3", timeout_s=2.0)
    comm.all_reduce(torch.ones(1))
    if rank == 2:
        return None
    time.sleep(0.7)
    found = attempt(comm, torch.ones(10))
    assert found["kind"] == "PeerTimeout", found
    return found["peers"]


def test_posting_to_a_dead_peer_blames_that_peer() -> None:
    assert run(post_to_a_dead_peer, 3) == [(2,), (2,), None]


def without_a_bound(rank: int) -> str:
    """An error that repeats must not hold more memory each time it is raised."""
    comm = Communicator(timeout_s=0.5)
    if rank == 0:
        return ""
    depths = []
    for _ in range(3):
        try:
            comm.all_reduce(torch.ones(4))
        except nvrar.PeerTimeout as error:
            trace, depth = error.__traceback__, 0
            while trace is not None:
                trace, depth = trace.tb_next, depth + 1
            depths.append(depth)
    return "grows" if depths[2] > depths[1] else "stays"


def test_raising_again_keeps_no_history() -> None:
    assert run(without_a_bound, 2)[1] == "stays"


def wrong_device_type(rank: int) -> dict[str, Any]:
    comm = Communicator(timeout_s=3.0)
    first = attempt(comm, torch.ones(5).to(torch.float8_e4m3fn))
    return {**first, "then": attempt(comm, torch.ones(5))["kind"]}


def test_a_type_that_nobody_has_is_refused_and_breaks_nothing() -> None:
    for found in run(wrong_device_type, 3):
        assert found["kind"] == "ArgumentError", found
        assert "float8_e4m3fn" in found["text"]
        assert found["then"] == "fine"


SCRIPT = """
import os, signal, sys, torch, torch.distributed as dist, nvrar
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=3)
comm = nvrar.Communicator(timeout_s=4)
for i in range(50):
    comm.all_reduce(torch.ones(100))
if comm.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
for i in range(10**6):
    comm.all_reduce(torch.ones(100))
"""


def test_an_uncaught_error_ends_the_process_with_its_message(tmp_path: Any) -> None:
    """As users meet it: the interpreter shuts down with broken connections, and must not hang."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "store")]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True, env=env)
        for rank in range(3)
    ]
    try:
        texts = [process.communicate(timeout=40)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, -signal.SIGKILL, 1], texts
    for text in (texts[0], texts[2]):
        assert "nvrar.errors.PeerTimeout" in text
        assert "gave up on rank 1 " in text


def caught_and_destroyed(rank: int) -> str:
    comm = Communicator(timeout_s=1.0)
    if rank == 1:
        time.sleep(1.5)
        return ""
    kind = attempt(comm, torch.ones(3))["kind"]
    dist.destroy_process_group()
    return kind


def test_the_group_can_be_destroyed_after_an_error() -> None:
    assert run(caught_and_destroyed, 3, timeout_s=20) == ["PeerTimeout", "", "PeerTimeout"]
