"""Local workers: they start by themselves, fail loudly, and never stay behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from yalis import LLM, SamplingParams, WorkerError
from yalis.core import Batch, NewBlocks
from yalis.testing import make_checkpoint
from yalis.workers import WorkerGroup

pytestmark = pytest.mark.host

LONG = SamplingParams(max_tokens=1000, temperature=0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


@pytest.fixture(autouse=True)
def _one_thread_and_no_process_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = children()
    yield
    assert children() == before


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("m"), num_hidden_layers=2))


def start(model: str, num_ranks: int = 2, all_reduce: str = "torch") -> tuple[LLM, list[int]]:
    llm = LLM(model, tensor_parallel_size=num_ranks, all_reduce=all_reduce)
    assert isinstance(llm._executor, WorkerGroup)
    return llm, llm._executor.pids


def children() -> set[int]:
    return {
        pid
        for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
        if parent(pid) == os.getpid()
    }


def parent(pid: int) -> int | None:
    """The parent of a living process; None for one that is gone, or dead and waiting for its parent."""
    try:
        state, ppid = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state == "Z" else int(ppid)


def assert_gone(pids: list[int], within_s: float) -> None:
    deadline_s = time.monotonic() + within_s
    while any(parent(pid) for pid in pids):
        assert time.monotonic() < deadline_s, f"still there: {[p for p in pids if parent(p)]}"
        time.sleep(0.02)


def signal_at(pid: int, number: signal.Signals, num_tokens: int) -> Callable[[str, int, int], None]:
    def on_progress(phase: str, done: int, total: int) -> None:
        if done == num_tokens:
            os.kill(pid, number)

    return on_progress


@pytest.mark.parametrize("all_reduce", ["torch", "nvrar"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_killed_in_the_middle_is_named_and_none_stays(
    rank: int, all_reduce: str, model: str
) -> None:
    llm, pids = start(model, 4 if rank == 2 else 2, all_reduce)
    begin_s = time.monotonic()
    with pytest.raises(
        WorkerError, match=rf"rank {rank} \(pid {pids[rank]}\) was killed by signal 9, SIGKILL"
    ):
        llm.generate("x", LONG, on_progress=signal_at(pids[rank], signal.SIGKILL, 10))
    assert time.monotonic() - begin_s < 6
    assert_gone(pids, within_s=0)
    with pytest.raises(WorkerError, match="SIGKILL"):  # and it stays said
        llm.generate("x", SHORT)
    llm.close()


def test_a_rank_that_raises_is_quoted_while_its_peer_waits_for_it(model: str) -> None:
    llm, pids = start(model)
    # An interrupt in one rank raises there and nowhere else: rank 0 is left in an all-reduce.
    with pytest.raises(WorkerError, match="rank 1 failed: KeyboardInterrupt") as caught:
        llm.generate("x", LONG, on_progress=signal_at(pids[1], signal.SIGINT, 10))
    assert "Traceback (most recent call last)" in str(caught.value)
    assert_gone(pids, within_s=0)


def test_an_error_in_the_model_is_quoted(model: str) -> None:
    llm, pids = start(model)
    far_outside = Batch(0, (0,), (0,), (1,), (5,), (True,), new_blocks=(NewBlocks(0, 0, (10**7,)),))
    llm._executor.submit(far_outside)
    with pytest.raises(WorkerError, match=r"rank [01] failed: IndexError: index") as caught:
        llm._executor.result()
    assert "sdpa.py" in str(caught.value)
    assert_gone(pids, within_s=0)


def test_a_rank_that_cannot_load_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path, num_hidden_layers=1)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    # As if the file went bad after the driver had looked at it.
    monkeypatch.setattr("yalis.llm.check_checkpoint", lambda *_: shard.write_bytes(b"\0" * 50))
    with pytest.raises(
        WorkerError, match=r"failed: CheckpointError: .*00001.* is truncated or damaged"
    ):
        LLM(str(tmp_path), tensor_parallel_size=2)


def test_a_rank_that_dies_while_idle_is_noticed_then_named(model: str) -> None:
    llm, pids = start(model)
    os.kill(pids[1], signal.SIGTERM)
    assert_gone(pids, within_s=5)  # nobody has called anything
    with pytest.raises(
        WorkerError, match=rf"rank 1 \(pid {pids[1]}\) was killed by signal 15, SIGTERM"
    ):
        llm.generate("x", SHORT)


def test_an_interrupt_in_the_driver_stops_the_workers(model: str) -> None:
    llm, pids = start(model)

    def interrupt(phase: str, done: int, total: int) -> None:
        # While a step is under way, as from the terminal: the signal comes during the next receive.
        if done == 5:
            threading.Timer(0.05, signal.raise_signal, [signal.SIGINT]).start()

    with pytest.raises(KeyboardInterrupt):
        llm.generate("x", LONG, on_progress=interrupt)
    llm.close()
    assert_gone(pids, within_s=0)


def test_workers_do_not_need_the_thread_that_made_them(model: str) -> None:
    made: list[tuple[LLM, list[int]]] = []
    thread = threading.Thread(target=lambda: made.append(start(model)))
    thread.start()
    thread.join()
    llm, pids = made[0]
    time.sleep(0.5)  # a parent-death signal of the ended thread would have come by now
    with llm:
        assert len(llm.generate("x", SHORT)[0].token_ids) == 8
    assert_gone(pids, within_s=0)


def test_an_llm_that_nobody_holds_takes_its_workers_along(model: str) -> None:
    llm, pids = start(model)
    del llm
    assert_gone(pids, within_s=2)


def test_two_worker_groups_at_once(model: str) -> None:
    with start(model)[0] as one, start(model, all_reduce="nvrar")[0] as two:
        said = [llm.generate("x", SHORT) for llm in (one, two, one, two)]
    assert said[0] == said[1] == said[2] == said[3]


PLAIN_SCRIPT = """
from yalis import LLM, SamplingParams
llm = LLM({model!r}, tensor_parallel_size=2, all_reduce="torch")
print("pids", *llm._executor.pids, flush=True)
params = SamplingParams(max_tokens={max_tokens}, temperature=0, ignore_eos=True)
print("tokens", *llm.generate("x", params)[0].token_ids, flush=True)
"""


def test_a_script_needs_no_main_guard_and_no_close(model: str, tmp_path: Path) -> None:
    # From standard input, as a notebook's kernel has no file to import again either; and from a folder
    # with a module that hides one of Python's own.
    (tmp_path / "queue.py").write_text("raise RuntimeError('the wrong queue')")
    script = PLAIN_SCRIPT.format(model=model, max_tokens=8)
    env = os.environ | {"PYTHONSAFEPATH": "1"}
    ran = subprocess.run(
        [sys.executable, "-"],
        input=script,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env=env,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    pids, tokens = (line.split()[1:] for line in ran.stdout.splitlines())
    assert len(tokens) == 8
    assert_gone([int(pid) for pid in pids], within_s=2)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_do_not_outlive_a_killed_driver(number: signal.Signals, model: str) -> None:
    script = PLAIN_SCRIPT.format(model=model, max_tokens=2000)
    driver = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    pids = [int(pid) for pid in driver.stdout.readline().split()[1:]]
    assert len(pids) == 2
    time.sleep(0.3)
    driver.send_signal(number)
    driver.wait(10)
    driver.stdout.close()
    assert_gone(pids, within_s=3)
