"""What the user holds: detection, agreement, fallback, counts, and errors that say what to do."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import socket
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import nvrar
from nvrar import (
    ArgumentError,
    ClosedError,
    Communicator,
    DisagreementError,
    Link,
    Machine,
    NvrarError,
    PeerTimeout,
    Plan,
    PlanError,
    Topology,
    TopologyError,
)
from nvrar.testing import reference_all_reduce
from ranks import run

pytestmark = pytest.mark.host


class Lines(logging.Handler):
    """The messages of nvrar's log."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logging.getLogger("nvrar").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


# -- detection -------------------------------------------------------------------------------------


def detected(rank: int) -> tuple[Topology, int]:
    log = Lines()
    comm = Communicator()
    assert Topology.detect() == comm.topology
    assert comm.all_reduce(torch.ones(3)).tolist() == [dist.get_world_size()] * 3
    return comm.topology, len(log.lines)


def torchrun(node: int) -> dict[str, str]:
    return {"TORCHELASTIC_RUN_ID": "none", "GROUP_RANK": str(node)}


def slurm(node: int) -> dict[str, str]:
    return {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NODEID": str(node)}


@pytest.mark.parametrize(
    ("env", "topology"),
    [
        ([{}] * 4, Topology(1, 4)),
        ([torchrun(n) for n in (0, 0, 1, 1)], Topology(2, 2)),
        ([torchrun(n) for n in (1, 1, 0, 0)], Topology(2, 2)),
        ([slurm(n) for n in (0, 1, 0, 1)], Topology(2, 2, (0, 2, 1, 3))),  # --distribution=cyclic
        ([torchrun(0), *[torchrun(0) | slurm(n) for n in (0, 1, 1)]], Topology(1, 4)),
        ([{}, *[torchrun(n) for n in (1, 2, 3)]], Topology(1, 4)),
        ([{"NVRAR_RANKS_PER_NODE": "2"} | torchrun(0)] * 4, Topology(2, 2)),
        ([{"NVRAR_RANKS_PER_NODE": "1"}] * 4, Topology(4, 1)),
    ],
)
def test_detection(env: list[dict[str, str]], topology: Topology) -> None:
    assert run(detected, len(env), env=env) == [(topology, 0)] * len(env)


def test_uneven_nodes_are_flat_and_said() -> None:
    env = [torchrun(n) for n in (0, 0, 1)]
    # By one rank, once for each of the two detections.
    assert run(detected, 3, env=env) == [(Topology(3, 1), said) for said in (2, 0, 0)]


def misled(rank: int) -> str:
    errors = []
    for attempt in (Communicator, Topology.detect):
        with pytest.raises(TopologyError) as error:
            attempt()
        errors.append(str(error.value))
    assert errors[0] == errors[1]
    return errors[0]


def test_an_override_that_differs_is_an_error_on_every_rank() -> None:
    texts = set(run(misled, 3, env=[{"NVRAR_RANKS_PER_NODE": k} for k in "121"]))
    assert len(texts) == 1
    assert "NVRAR_RANKS_PER_NODE differs between ranks ('1', '2')" in texts.pop()


TORCHRUN_SCRIPT = """
import os, torch, torch.distributed as dist, nvrar
dist.init_process_group("gloo")
with nvrar.Communicator() as comm:
    y = comm.all_reduce(torch.ones(5) * (comm.rank + 1))
    seen = f"SEEN {comm.topology} {comm.plan_for(20)} {y.tolist()}"
    os.write(1, seen.encode() + b"\\n")  # in one piece: all ranks share the pipe
dist.destroy_process_group()
"""


def test_two_agents_of_torchrun_are_two_nodes(tmp_path: Any) -> None:
    script = tmp_path / "script.py"
    script.write_text(TORCHRUN_SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=seen"]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command += ["--local-addr=127.0.0.1", str(script)]
    agents = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        for _ in range(2)
    ]
    try:
        outputs = [agent.communicate(timeout=90) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    lines = [line for out, _ in outputs for line in out.splitlines() if line.startswith("SEEN")]
    assert len(lines) == 4, outputs
    assert set(lines) == {f"SEEN 2x2 exchange:4 {[10.0] * 5}"}


# -- agreement at creation -------------------------------------------------------------------------

DIFFERENCES: dict[str, tuple[Any, Any]] = {
    "topology": (Topology(1, 3), Topology(3, 1)),
    "plan": ("one-shot", "two-shot"),
    "max_bytes": (1 << 20, 1 << 21),
    "timeout_s": (5.0, 6.0),
    "deterministic": (False, True),
    "wire_dtype": (None, torch.float32),
    "machine": (None, "perlmutter"),
    "executor": ("auto", "host"),
}


def disagreeing(rank: int, odd: int) -> dict[str, str]:
    texts = {}
    for key, (usual, other) in DIFFERENCES.items():
        options = {"timeout_s": 5.0, key: other if rank == odd else usual}
        began = time.monotonic()
        with pytest.raises(DisagreementError) as error:
            Communicator(**options)
        assert time.monotonic() - began < 2, "nobody waits for a timeout"
        texts[key] = str(error.value)
    assert Communicator(timeout_s=5.0).all_reduce(torch.ones(1)).item() == 3
    return texts


@pytest.mark.parametrize("odd", [0, 2])
def test_each_option_that_differs_is_named_on_every_rank(odd: int) -> None:
    first, *others = run(disagreeing, 3, odd)
    assert others == [first, first]
    for key, text in first.items():
        assert text.startswith(f"{key} is "), text
        assert f"on rank {odd or 1}" in text
        assert "give the same arguments" in text


BAD: list[tuple[dict[str, Any], type[NvrarError], str]] = [
    ({"timeout_s": 0}, ArgumentError, "timeout_s is 0; it must be a time above 0"),
    ({"timeout_s": float("inf")}, ArgumentError, "timeout_s is inf; it must be"),
    ({"timeout_s": "5"}, ArgumentError, "timeout_s is '5'; it must be"),
    ({"timeout_s": True}, ArgumentError, "timeout_s is True; it must be"),
    ({"max_bytes": True}, ArgumentError, "max_bytes is True; it must be 0 or more bytes"),
    ({"deterministic": "no"}, ArgumentError, "deterministic is 'no'; it must be True or False"),
    ({"max_bytes": -1}, ArgumentError, "max_bytes is -1; it must be 0 or more bytes"),
    ({"max_bytes": object}, ArgumentError, "max_bytes is <class 'object'>; it must be"),
    (
        {"wire_dtype": torch.float16},
        ArgumentError,
        "wire_dtype is torch.float16; it must be torch.float32",
    ),
    ({"executor": "gpu"}, ArgumentError, "executor is 'gpu'; it must be 'auto' or 'host'"),
    ({"machine": "frontier"}, ArgumentError, "no machine is named 'frontier'; the names are"),
    ({"machine": 3}, ArgumentError, "machine is 3; it must be a name or a Machine"),
    ({"plan": 3}, ArgumentError, "plan is 3; it must be a name, a word or a Plan"),
    ({"plan": "ring"}, PlanError, "'ring' in plan 'ring' is not a level"),
    (
        {"plan": "split:4"},
        PlanError,
        "is for 4 ranks, the group has 3; the radices must multiply to 3",
    ),
    (
        {"topology": Topology(2, 2)},
        TopologyError,
        "topology 2x2 has 4 ranks, the group has 3; num_nodes",
    ),
    ({"topology": "1x3"}, ArgumentError, "topology is '1x3'; it must be a Topology"),
]


def refused(rank: int, culprits: tuple[int, ...]) -> None:
    for options, kind, text in BAD:
        began = time.monotonic()
        if rank in culprits:
            with pytest.raises(kind) as own:
                Communicator(**options)
            assert text in str(own.value)
        else:
            with pytest.raises(DisagreementError) as told:
                Communicator()
            assert f"rank {culprits[0]} refused its arguments: " in str(told.value)
            assert text in str(told.value)
        assert time.monotonic() - began < 2
    assert Communicator().all_reduce(torch.ones(1)).item() == 3


@pytest.mark.parametrize("culprits", [(1,), (0, 2), (0, 1, 2)])
def test_a_bad_option_is_an_error_on_every_rank(culprits: tuple[int, ...]) -> None:
    run(refused, 3, culprits)


def left_alone(rank: int) -> tuple[tuple[int, ...], str]:
    if rank in (1, 3):
        time.sleep(1.8)
        return (), ""
    with pytest.raises(PeerTimeout) as error:
        Communicator(timeout_s=1.0)
    return error.value.peers, str(error.value)


def test_ranks_that_do_not_come_to_the_creation_are_named() -> None:
    outcomes = run(left_alone, 4)
    for rank in (0, 2):
        peers, text = outcomes[rank]
        assert peers == (1, 3)
        assert f"rank {rank} waited 1 s for ranks 1, 3 to take part in 'communicator'" in text


def late_once(rank: int) -> None:
    time.sleep(
        1.5 * rank
    )  # so that rank 1 finds what rank 0 brought, and then waits for more of it
    with pytest.raises(PeerTimeout):
        Communicator(timeout_s=0.5)
    dist.barrier()
    assert Communicator().all_reduce(torch.ones(2)).tolist() == [2, 2]


def test_a_creation_that_a_rank_was_late_for_can_be_tried_again() -> None:
    run(late_once, 2)


def by_value_or_name(rank: int) -> None:
    """The same thing said in two ways is the same."""
    topology = Topology(1, 2)
    Communicator(plan=Plan.parse("split:2") if rank else "split:2", topology=topology)
    machine = Machine("mine", Link(1.0, 1.0), Link(2.0, 2.0))
    assert Communicator(machine=machine).machine == machine


def test_a_plan_may_be_a_word_or_a_value() -> None:
    run(by_value_or_name, 2)


# -- calls -----------------------------------------------------------------------------------------


def falling_back(rank: int) -> None:
    log = Lines()
    comm = Communicator(max_bytes=100)
    inputs = torch.arange(3 * 60).view(3, 60) % 7
    for _ in range(3):
        for x in (inputs.float(), inputs.to(torch.uint8), inputs.bfloat16()):
            for op in ("sum", "max", "min"):
                want = {"sum": x.sum(0), "max": x.amax(0), "min": x.amin(0)}[op].to(x.dtype)
                assert torch.equal(comm.all_reduce(x[rank], op=op), want)
    x = inputs[rank].float()
    assert torch.equal(comm.all_reduce(x, op="avg"), inputs.float().sum(0) / 3)
    assert torch.equal(x, inputs[rank].float()), "the input is left alone"
    matrix = inputs[rank].float().view(6, 10)
    assert comm.all_reduce(matrix.t(), out=matrix.t()).shape == (10, 6)
    assert torch.equal(matrix.flatten(), inputs.float().sum(0)), "in place, transposed"
    columns = torch.zeros(60, 2)
    comm.all_reduce(inputs[rank].float(), out=columns[:, 1])
    assert torch.equal(columns[:, 1], inputs.float().sum(0))
    assert torch.equal(columns[:, 0], torch.zeros(60))
    phase = comm.all_reduce(torch.full((2,), 1j * (rank + 1)))
    assert torch.equal(phase, torch.full((2,), 6j))
    mirrored = torch.full((2,), 1j * (rank + 1)).conj()
    assert torch.equal(comm.all_reduce(mirrored, out=mirrored), torch.full((2,), -6j))
    assert comm.stats.fallbacks == {
        "messages above max_bytes (100)": 9 + 9 + 3,
        "dtype torch.uint8": 9,
        "dtype torch.complex64": 2,
    }
    assert len(log.lines) == (3 if rank == 0 else 0), "each reason is said once, on one rank"
    if rank == 0:
        assert log.lines[0] == (
            "nvrar leaves calls to torch.distributed.all_reduce: messages above max_bytes (100)"
        )
    assert comm.stats.calls == 32
    another = Communicator(max_bytes=100)
    another.all_reduce(torch.ones(25))  # exactly max_bytes
    assert another.stats.fallbacks == {}


def test_fallback_is_right_and_logged_once_and_counted() -> None:
    run(falling_back, 3)


def negated(rank: int) -> None:
    """Tensors whose memory holds their elements with the other sign, as the imaginary part of a conjugate."""
    shown = torch.arange(8).expand(2, 8) * torch.tensor([[-1.0], [-2.0]])
    for options in ({"plan": "two-shot"}, {"plan": "one-shot"}, {"max_bytes": 4}):
        comm = Communicator(**options)
        for op, want in (("sum", shown.sum(0)), ("max", shown.amax(0))):
            x = torch._neg_view(-shown[rank])
            assert torch.equal(comm.all_reduce(x, op=op), want)
            assert torch.equal(comm.all_reduce(x, out=x, op=op), want)
            out = torch._neg_view(torch.ones(8))
            assert torch.equal(comm.all_reduce(shown[rank], out=out, op=op), want)


def test_a_negated_view_is_reduced_by_what_it_shows() -> None:
    run(negated, 2)


def counting(rank: int) -> None:
    comm = Communicator()
    assert (comm.stats.calls, comm.stats.bytes) == (0, 0)
    comm.all_reduce(torch.ones(10, dtype=torch.float64))
    comm.all_reduce(torch.ones(3, dtype=torch.bfloat16))
    comm.all_reduce(torch.ones(0))
    with pytest.raises(ArgumentError):
        comm.all_reduce(torch.ones(3), op="prod")
    assert (comm.stats.calls, comm.stats.bytes) == (3, 86)
    assert comm.rank == rank
    assert comm.world_size == 2
    assert f"rank {rank} of 2" in repr(comm)
    assert "host executor over gloo (no GPU executor: rank 0 " in repr(comm)
    assert repr(Communicator(executor="host")).endswith("host executor over gloo>")
    assert [comm.link_for(device) for device in ("cpu", "cuda")] == ["gloo", "gloo"]
    dist.destroy_process_group()
    assert "process group destroyed" in repr(comm)


def test_stats_count_what_was_done() -> None:
    run(counting, 2)


def wrong_arguments(rank: int) -> None:
    from torch.distributed.tensor import DTensor  # takes long

    comm = Communicator(timeout_s=2.0)
    x = torch.ones(6)
    spread = DTensor.from_local(x, init_device_mesh("cpu", (2,)))
    big = torch.ones(20)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"x": [1.0]}, "x is list, not a torch.Tensor"),
        ({"x": x.to_sparse()}, "x has layout torch.sparse_coo; .* call x.to_dense"),
        ({"x": spread}, r"x is a DTensor, which lies on several ranks; .* x.to_local\(\)"),
        ({"x": x, "out": spread}, r"out is a DTensor, .* out.to_local\(\)"),
        ({"x": torch.nested.nested_tensor([x, x])}, r"x is a nested tensor; .* x.values\(\)"),
        ({"x": torch.nested.nested_tensor([x, x], layout=torch.jagged)}, "x is a nested tensor"),
        ({"x": x, "op": "product"}, "op is 'product'; it must be one of sum, avg, max, min"),
        ({"x": x, "op": dist.ReduceOp.SUM}, "op is .*SUM.*; it must be one of sum, avg, max, min"),
        (
            {"x": x.int(), "op": "avg"},
            "op 'avg' needs a floating type and x is torch.int32; use 'sum'",
        ),
        ({"x": x, "out": x.numpy()}, "out is ndarray, not a torch.Tensor"),
        ({"x": x, "out": torch.ones(5)}, "out has shape .*5.*, x has .*6.*; they must be equal"),
        ({"x": x, "out": x.double()}, "out has dtype torch.float64, x has torch.float32"),
        ({"x": x, "out": x.to("meta")}, "out has device meta, x has cpu"),
        ({"x": x, "out": torch.ones(1).expand(6)}, "elements of out share memory"),
        ({"x": big[:6], "out": big[3:9]}, "x and out share part of their memory; give out=x"),
        ({"x": big[3:9], "out": big[:6]}, "x and out share part of their memory; give out=x"),
    ]
    for arguments, text in wrong:
        with pytest.raises(ArgumentError, match=text):
            comm.all_reduce(**arguments)
    assert isinstance(ArgumentError("x"), ValueError)
    assert comm.all_reduce(big[:6], out=big[6:12]).tolist() == [2.0] * 6  # side by side is fine
    assert comm.all_reduce(x).tolist() == [2.0] * 6, "the communicator goes on"


def test_wrong_arguments_on_all_ranks() -> None:
    run(wrong_arguments, 2)


def autograd(rank: int) -> None:
    comm = Communicator()
    x = torch.ones(3, requires_grad=True)
    y = comm.all_reduce(x * 2)
    assert not y.requires_grad
    with torch.inference_mode():
        assert comm.all_reduce(x).tolist() == [2.0] * 3
    leaf = torch.ones(3, requires_grad=True)
    assert comm.all_reduce(leaf, out=leaf).tolist() == [2.0] * 3
    x.grad = None
    doubled = x * 2
    comm.all_reduce(doubled, out=doubled).sum().backward()
    assert x.grad.tolist() == [2.0] * 3, "in place, the gradient of doubled stays as it was"


def test_no_gradient_flows() -> None:
    run(autograd, 2)


# -- plans -----------------------------------------------------------------------------------------


def choosing(rank: int) -> None:
    topology = Topology(2, 2)
    fixed = Communicator(topology=topology, plan="nvrar")
    assert str(fixed.plan_for(10)) == str(fixed.plan_for(10**9)) == "split:2 exchange:2"
    auto = Communicator(topology=topology, machine=LATENCY)
    assert str(auto.plan_for(4)) == "exchange:4"
    assert str(auto.plan_for(8 << 20)) != "exchange:4"
    wide = Communicator(topology=topology, machine=LATENCY, wire_dtype=torch.float32)
    change = next(1 << k for k in range(30) if auto.plan_for(1 << k) != auto.plan_for(4))
    # fp32 on the wire doubles the bytes of 16-bit types, and leaves the others alone.
    assert wide.plan_for(change // 2, torch.bfloat16) == auto.plan_for(change)
    for dtype in (torch.float32, torch.float64, torch.int32, torch.int64):
        for size in (change // 2, change, 2 * change):
            assert wide.plan_for(size, dtype) == auto.plan_for(size, dtype)


LATENCY = Machine("latency", Link(10.0, 1.0), Link(10.0, 1.0))


def test_the_plan_for_a_size() -> None:
    run(choosing, 4)


def batch_invariance(rank: int) -> bool:
    """Bits of the first elements, alone and as part of ever larger messages."""
    slow_network = Machine("slow network", Link(10.0, 100.0), Link(10.0, 1.0))
    comm = Communicator(topology=Topology(2, 2), machine=slow_network, deterministic=True)
    free = Communicator(topology=Topology(2, 2), machine=slow_network)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 300_000, generator=generator).bfloat16()
    plans, first, free_first = set(), [], []
    for length in (64, 1000, 5000, 300_000):
        x = inputs[rank, :length]
        plans.add(comm.plan_for(x.nbytes))
        y = comm.all_reduce(x)
        assert torch.equal(y, reference_all_reduce(inputs[:, :length], comm.plan_for(x.nbytes)))
        first.append(y[:64])
        free_first.append(free.all_reduce(x)[:64])
    assert len(plans) > 1, "modes change with size, radices do not"
    assert all(torch.equal(y, first[0]) for y in first)
    return all(torch.equal(y, free_first[0]) for y in free_first)


def test_deterministic_bits_do_not_depend_on_the_size() -> None:
    assert run(batch_invariance, 4) == [False] * 4, "without it they do, or the test shows nothing"


# -- life and death --------------------------------------------------------------------------------


def closing(rank: int) -> None:
    x = torch.ones(2)
    with Communicator() as comm:
        comm.all_reduce(x)
    with pytest.raises(ClosedError, match="was closed; make a new one"):
        comm.all_reduce(x)
    comm.close()  # again
    with pytest.raises(ClosedError):
        comm.all_reduce(x)
    with pytest.raises(KeyError), Communicator() as inner:
        raise KeyError
    with pytest.raises(ClosedError):
        inner.all_reduce(x)
    # A closed communicator takes nothing with it.
    assert Communicator().all_reduce(x).tolist() == [2.0, 2.0]


def test_close_and_context_manager() -> None:
    run(closing, 2)


def copying(rank: int) -> None:
    comm = Communicator()
    module = torch.nn.Linear(2, 2)
    module.comm = comm  # type: ignore[assignment]
    for copied in (copy.copy(comm), copy.deepcopy(module).comm):
        assert copied is comm
    with pytest.raises(
        TypeError, match="belongs to its process and cannot be pickled; leave it out"
    ):
        pickle.dumps(module)
    assert comm.all_reduce(torch.ones(1)).item() == 2


def test_a_copy_is_itself_and_it_is_not_pickled() -> None:
    run(copying, 2)


def forked(rank: int) -> None:
    comm = Communicator()
    comm.all_reduce(torch.ones(1))
    child = os.fork()
    if child == 0:
        try:
            comm.all_reduce(torch.ones(1))
        except ClosedError as error:
            os._exit(0 if "make a process group and a communicator here" in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert comm.all_reduce(torch.ones(1)).item() == 2, "it goes on where it was made"


def test_it_ends_in_a_forked_process() -> None:
    run(forked, 2)


def destroyed(rank: int) -> None:
    group = dist.new_group([0, 1])
    comm = Communicator(group, timeout_s=2.0)
    assert comm.all_reduce(torch.ones(2)).tolist() == [2.0, 2.0]
    dist.destroy_process_group(group)
    for _ in range(2):
        with pytest.raises(ClosedError, match=r"process group of communicator .* was destroyed"):
            comm.all_reduce(torch.ones(2))
    with pytest.raises(ArgumentError, match="group was destroyed; make a new one"):
        Communicator(group)
    with pytest.raises(ArgumentError, match="group was destroyed"):
        Topology.detect(group)
    whole = Communicator()
    dist.destroy_process_group()
    with pytest.raises(ClosedError, match="was destroyed"):
        whole.all_reduce(torch.ones(2))
    with pytest.raises(ArgumentError, match=r"call torch.distributed.init_process_group first"):
        Communicator()


def test_a_destroyed_group() -> None:
    run(destroyed, 2)


def uninitialised(rank: int) -> None:
    for attempt in (Communicator, Topology.detect):
        with pytest.raises(
            ArgumentError, match=r"torch.distributed is not initialised; call torch"
        ):
            attempt()


def test_without_a_process_group() -> None:
    run(uninitialised, 1, store=None)


def outside(rank: int) -> None:
    group = dist.new_group([0, 1])
    if rank == 2:
        for attempt in (Communicator, Topology.detect):
            with pytest.raises(
                ArgumentError, match="does not hold rank 2; use it only on the ranks"
            ):
                attempt(group)
    else:
        assert Communicator(group).all_reduce(torch.ones(1)).item() == 2


def test_a_group_without_this_rank() -> None:
    run(outside, 3)


def no_group(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for wrong, name in ((mesh, "DeviceMesh"), ([0, 1], "list")):
        with pytest.raises(
            ArgumentError, match=f"group is {name}, not a torch.distributed.ProcessGroup"
        ):
            Communicator(wrong)  # type: ignore[arg-type]
    assert Communicator(mesh.get_group()).all_reduce(torch.ones(1)).item() == 2


def test_what_is_no_group() -> None:
    run(no_group, 2)


def alone(rank: int) -> None:
    comm = Communicator()
    x = torch.arange(5.0)
    y = comm.all_reduce(x)
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()
    assert comm.all_reduce(x, out=x, op="avg") is x
    assert str(comm.plan_for(10)) == "identity"
    for wrong in (-1, 1e3, "1"):
        with pytest.raises(ArgumentError, match="whole number, 0 or more"):
            comm.plan_for(wrong)  # type: ignore[arg-type]
    without_backend = Communicator(dist.new_group(backend="cuda:gloo"))
    assert torch.equal(without_backend.all_reduce(x), x), "nothing is to be carried"


def test_one_rank() -> None:
    run(alone, 1)


def test_every_error_is_an_nvrar_error() -> None:
    for name in nvrar.__all__:
        value = getattr(nvrar, name)
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, NvrarError)


def without_a_backend_for_cpus(rank: int) -> tuple[str, bool]:
    """What a call says where torch has nothing that carries tensors of CPUs, as in a group of NCCL alone."""
    comm = Communicator(dist.new_group(backend="cuda:gloo"), timeout_s=20.0)
    with pytest.raises(ArgumentError) as caught:
        comm.all_reduce(torch.ones(3))
    with pytest.raises(ArgumentError):
        comm.all_reduce_add_rms_norm(torch.ones(3), torch.ones(3), torch.ones(3))
    return str(caught.value), "cuda:gloo" in repr(comm)


def test_tensors_that_the_group_cannot_carry_are_refused() -> None:
    for text, is_named in run(without_a_backend_for_cpus, 2):
        assert text.startswith("x is on cpu, and the process group carries tensors of cuda alone")
        assert is_named
