"""Several communicators in one process: on different, overlapping and identical groups, interleaved."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist

from nvrar import Communicator, Plan, Topology
from nvrar.testing import reference_all_reduce
from ranks import run

pytestmark = pytest.mark.host

GROUPS = ((0, 1, 2, 3), (0, 1), (2, 3), (1, 2), (0, 2, 3), (3, 1), (0, 1, 2, 3))


def inputs_for(ranks: list[int], seed: int, length: int) -> torch.Tensor:
    """One row for each of ``ranks``; a rank's row depends on the rank, not on who else takes part."""
    rows = [
        torch.randn(length, generator=torch.Generator().manual_seed(100 * seed + r)) for r in ranks
    ]
    return torch.stack(rows)


def interleaved(rank: int) -> int:
    """Calls on all of this rank's communicators, in an order that is random but the same for all."""
    comms: list[Communicator | None] = []
    for i, ranks in enumerate(GROUPS):
        group = None if i == 0 else dist.new_group(list(ranks))
        comms.append(Communicator(group, timeout_s=20.0) if rank in ranks else None)
    # More on the same groups: the default once more, and one with another plan on the last.
    last = comms[-1]
    again = Communicator(plan="one-shot")
    other = Communicator(last.group if last else None, plan="two-shot")
    assert (
        len({c.name for c in (*comms, again, other) if c}) == sum(c is not None for c in comms) + 2
    )
    choice, calls = random.Random(3), 0
    for turn in range(150):
        at = choice.randrange(len(GROUPS) + 2)
        length = choice.choice([1, 5, 64, 301])
        comm = (*comms, again, other)[at]
        if comm is None:
            continue
        ranks = dist.get_process_group_ranks(comm.group)
        inputs = inputs_for(ranks, turn, length)
        x = inputs[comm.rank].clone()
        y = comm.all_reduce(x, out=x if turn % 2 else None)
        assert torch.equal(y, reference_all_reduce(inputs, comm.plan_for(x.nbytes, x.dtype))), turn
        calls += 1
    assert sum(c.stats.calls for c in (*comms, again, other) if c) == calls
    return calls


def test_interleaved_communicators() -> None:
    assert min(run(interleaved, 4)) > 50


def nested(rank: int) -> None:
    """A communicator of a node within one of all, the topologies those of the subgroups."""
    whole = Communicator()
    assert whole.topology == Topology(2, 3)
    for first in (0, 3):
        node = dist.new_group([first, first + 1, first + 2])
        if rank in range(first, first + 3):
            local = Communicator(node)
            assert local.topology == Topology(1, 3)
    for lane in range(3):
        across = dist.new_group([lane, lane + 3])
        if rank % 3 == lane:
            cross = Communicator(across)
            assert cross.topology == Topology(2, 1)
    x = torch.full((7,), float(rank))
    assert torch.equal(cross.all_reduce(local.all_reduce(x)), whole.all_reduce(x))


def test_detection_on_subgroups() -> None:
    env = [{"TORCHELASTIC_RUN_ID": "none", "GROUP_RANK": str(r // 3)} for r in range(6)]
    run(nested, 6, env=env)
    run(nested, 6, env={"NVRAR_RANKS_PER_NODE": "3"})


def one_breaks(rank: int) -> None:
    """A closed communicator leaves the others on the same group alone; so does one that refuses."""
    first, second = Communicator(), Communicator()
    first.close()
    with pytest.raises(ValueError, match="op is"):
        second.all_reduce(torch.ones(1), op="xor")
    assert second.all_reduce(torch.ones(1)).item() == 3
    assert dist.get_world_size() == 3
    x = torch.ones(4)
    dist.all_reduce(x)  # torch's own calls may go between
    assert torch.equal(second.all_reduce(torch.ones(4)), x)


def test_communicators_do_not_disturb_each_other() -> None:
    run(one_breaks, 3)


def many(rank: int) -> None:
    """Communicators come and go; the registry of names keeps none of them alive."""
    import gc

    from nvrar.registry import by_name

    for i in range(60):
        comm = Communicator(plan=Plan.parse("exchange:2" if i % 2 else "split:2"))
        assert comm.all_reduce(torch.full((3,), float(i))).tolist() == [2.0 * i] * 3
    name = comm.name
    assert by_name[name] is comm
    del comm
    gc.collect()
    assert name not in by_name
    assert len(by_name) == 0


def test_many_communicators_one_after_the_other() -> None:
    run(many, 2)


def left_behind(rank: int) -> bool:
    """What the end of the interpreter finds of a group that the user destroyed, while a communicator on
    it, closed or not, still has a name."""
    import gc
    import weakref

    from nvrar.registry import let_go_of_groups

    group = dist.new_group([0, 1])
    closed, used = Communicator(group), Communicator(group)
    closed.close()
    used.all_reduce(torch.ones(3))
    found = weakref.ref(group)
    dist.destroy_process_group(group)
    del group
    other = Communicator()
    let_go_of_groups()
    gc.collect()
    assert other.all_reduce(torch.ones(1)).item() == 2  # its group lives: nothing was taken from it
    return found() is None


def test_no_destroyed_group_outlives_the_interpreter() -> None:
    assert run(left_behind, 2) == [True, True]
