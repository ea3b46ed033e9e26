"""A step that all ranks take or none: what each is told when one cannot."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from nvrar.errors import ArgumentError, GpuUnavailable, NvrarError, PeerTimeout
from nvrar.meeting import Meeting, stay_out, together
from ranks import run

pytestmark = pytest.mark.host


def attempt(purpose: str, failure: Exception | None, value: object = None) -> str:
    """How the step ended on this rank."""

    def action() -> object:
        if failure is not None:
            raise failure
        return value

    try:
        return str(together(dist.group.WORLD, purpose, action, 5.0))
    except NvrarError as error:
        return f"{type(error).__name__}: {error}"


def every_way(rank: int) -> dict[str, str]:
    last = rank == 2
    return {
        "all can": attempt("a", None, rank),
        "one lacks": attempt("b", GpuUnavailable("no driver") if last else None),
        "one is wrong": attempt("c", ArgumentError("size is -1") if last else None),
        "one breaks": attempt("d", ZeroDivisionError("by zero") if last else None),
        "one lacks, one is wrong": attempt(
            "e", (GpuUnavailable("no driver"), None, ArgumentError("size is -1"))[rank]
        ),
    }


def test_all_ranks_end_alike() -> None:
    first, second, third = run(every_way, 3)
    assert first["all can"] == second["all can"] == third["all can"] == "[0, 1, 2]"
    lacks = "GpuUnavailable: rank 2: no driver"
    assert first["one lacks"] == second["one lacks"] == third["one lacks"] == lacks
    assert third["one is wrong"] == "ArgumentError: size is -1"
    assert (
        first["one is wrong"] == second["one is wrong"] == "DisagreementError: rank 2: size is -1"
    )
    assert "ZeroDivisionError" in third["one breaks"]
    assert first["one breaks"].startswith("DisagreementError: rank 2: d: ZeroDivisionError")
    wrong = "DisagreementError: rank 2: size is -1"
    assert first["one lacks, one is wrong"] == second["one lacks, one is wrong"] == wrong
    assert third["one lacks, one is wrong"] == "ArgumentError: size is -1"


def staying_out(rank: int) -> str:
    if rank == 1:
        stay_out(dist.group.WORLD, "heap", "has no GPU")
        return ""
    return attempt("heap", None)


def test_who_stays_out_is_not_waited_for() -> None:
    first, _, third = run(staying_out, 3, timeout_s=20)
    assert first == third == "GpuUnavailable: rank 1: has no GPU"


def missing(rank: int) -> None:
    if rank == 0:
        with pytest.raises(PeerTimeout) as caught:
            together(dist.group.WORLD, "arena", lambda: None, 0.5)
        assert caught.value.peers == (1,)


def test_a_missing_rank_is_named() -> None:
    run(missing, 2)


def anew(rank: int) -> list[list[int]]:
    """One communicator that rank 1 never came to make, then another on the same group."""
    if rank == 0:
        with pytest.raises(PeerTimeout, match="to take part in 'pe of first'"):
            Meeting(dist.group.WORLD, "first", 0.3).exchange("pe", -1)
    second = Meeting(dist.group.WORLD, "second", 5.0)
    return [second.exchange("pe", rank), second.together("zeroed", lambda: rank)]


def test_what_is_left_of_a_communicator_that_was_given_up_is_not_met() -> None:
    assert run(anew, 2) == [[[0, 1], [0, 1]]] * 2
