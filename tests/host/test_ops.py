"""The torch operators: what torch.library checks, and torch.compile against eager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nvrar import ClosedError, Communicator, Topology
from ranks import run

pytestmark = pytest.mark.host


def checked(rank: int) -> None:
    comm = Communicator()
    for x in (
        torch.randn(4, 3),
        torch.randn(3, 4).t(),
        torch.ones(0),
        torch.ones((), dtype=torch.int64),
    ):
        for op in ("sum", "max"):
            torch.library.opcheck(torch.ops.nvrar.all_reduce.default, (x, comm.name, op))
            torch.library.opcheck(torch.ops.nvrar.all_reduce_.default, (x.clone(), comm.name, op))


@pytest.mark.parametrize("world_size", [1, 2])
def test_opcheck(world_size: int) -> None:
    run(checked, world_size, timeout_s=120)


def programs(comm: Communicator) -> dict[str, Callable[[Tensor], Tensor]]:
    """What models do around an all-reduce."""

    def new_tensor(x: Tensor) -> Tensor:
        return comm.all_reduce(x * 2) + x

    def in_place(x: Tensor) -> Tensor:
        y = x * 2
        comm.all_reduce(y, out=y)
        return y.relu()

    def into_out(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        result = comm.all_reduce(x.abs(), out=out)
        return result + out

    def twice(x: Tensor) -> Tensor:
        return comm.all_reduce(comm.all_reduce(x).neg(), op="max")

    def transposed(x: Tensor) -> Tensor:
        return comm.all_reduce(x.t(), op="avg").t() + 1

    def keeps_the_input(x: Tensor) -> Tensor:
        before = x + 0
        return comm.all_reduce(x) * (x - before)

    def all_in_one(x: Tensor) -> Tensor:
        for program in (new_tensor, in_place, into_out, twice, transposed):
            x = program(x)
        return x

    found = (new_tensor, in_place, into_out, twice, transposed, keeps_the_input, all_in_one)
    return {program.__name__: program for program in found}


def compiled(rank: int, backend: str, names: list[str]) -> None:
    comm = Communicator(topology=Topology(1, 2), plan="split:2")
    generator = torch.Generator().manual_seed(rank)
    for name in names:
        program = programs(comm)[name]
        torch._dynamo.reset()
        fast = torch.compile(program, fullgraph=True, backend=backend)
        for shape in ((4, 6), (4, 6), (5, 7)):
            x = torch.randn(shape, generator=generator)
            calls = comm.stats.calls
            want = program(x.clone())
            eager_calls = comm.stats.calls - calls
            found = fast(x.clone())
            assert torch.equal(found, want), (name, shape)
            assert comm.stats.calls - calls == 2 * eager_calls > 0, "the graph makes the same calls"


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_equals_eager(backend: str, tmp_path: object) -> None:
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    # Inductor calls a C++ compiler for every graph, so it gets one that has everything.
    names = ["all_in_one"] if backend == "inductor" else list(programs(None))  # type: ignore[arg-type]
    run(compiled, 2, backend, names, timeout_s=150, env=env)


def compiled_input_in_place(rank: int) -> None:
    comm = Communicator()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def program(x: Tensor) -> Tensor:
        return comm.all_reduce(x, out=x)

    x = torch.full((3,), float(rank + 1))
    y = program(x)
    assert x.tolist() == y.tolist() == [3.0] * 3


def test_compiled_writes_to_its_input() -> None:
    run(compiled_input_in_place, 2)


def compiled_wrongly(rank: int) -> list[str]:
    comm = Communicator()
    texts = []
    for out in (torch.ones(2, 3), torch.ones(3, dtype=torch.float64)):
        torch._dynamo.reset()

        @torch.compile(fullgraph=True, backend="aot_eager")
        def program(x: Tensor, out: Tensor) -> Tensor:
            return comm.all_reduce(x, out=out)

        with pytest.raises(Exception, match="they must be equal") as error:
            program(torch.ones(3), out)
        texts.append(str(error.value))
    return texts


def test_compiled_with_an_out_that_does_not_fit() -> None:
    """copy_ alone would broadcast or convert, where eager refuses."""
    run(compiled_wrongly, 2)


def names(rank: int) -> None:
    comm = Communicator()
    name, x = comm.name, torch.ones(2)
    assert torch.ops.nvrar.all_reduce(x, name).tolist() == [2.0, 2.0]
    torch.ops.nvrar.all_reduce_(x, name, "sum")
    assert x.tolist() == [2.0, 2.0]
    del comm
    with pytest.raises(ClosedError, match=f"no communicator '{name}' lives in this process"):
        torch.ops.nvrar.all_reduce(x, name)


def test_the_operator_finds_its_communicator_by_name() -> None:
    run(names, 2)
