# SPDX-License-Identifier: Apache-2.0
"""How processes come together: join the group that a launcher started, or start local workers.

torchrun and Slurm's srun tell a process its place by environment variables; :func:`seat` reads them and
:func:`join` makes the process group. Without a launcher, :func:`start_local_workers` is torchrun on this
machine alone.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from nvrar.errors import ArgumentError, PeerTimeout
from nvrar.topology import is_srun_task

_DEVICES = ("cpu", "cuda")
_FIRST_PORT = 20000
_NUM_PORTS = 20000  # below the ports that Linux gives to outgoing connections


@dataclass(frozen=True, slots=True)
class Seat:
    """This process's place in a job: what a launcher told it."""

    launcher: str  # "torchrun" or "Slurm"
    rank: int
    world_size: int
    local_rank: int
    host: str  # where the ranks meet
    port: int

    @property
    def address(self) -> str:
        """Where the ranks meet."""
        host = f"[{self.host}]" if ":" in self.host else self.host  # an IPv6 address
        return f"{host}:{self.port}"

    @property
    def init_method(self) -> str:
        """For ``init_process_group``: torchrun's agent has a store of its own there already."""
        return "env://" if self.launcher == "torchrun" else f"tcp://{self.address}"


def seat(environment: Mapping[str, str]) -> Seat | None:
    """The place that ``environment`` gives this process; None if no launcher started it. Pure.

    Raises:
        ArgumentError: a launcher's variable is missing or malformed.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        if not environment.get("MASTER_ADDR") or not environment.get("MASTER_PORT"):
            raise ArgumentError(
                "RANK and WORLD_SIZE are set, but not where the ranks meet: set MASTER_ADDR and "
                "MASTER_PORT too, as torchrun does, or unset RANK to start without a launcher"
            )
        found = Seat(
            "torchrun",
            _number(environment, "RANK"),
            _number(environment, "WORLD_SIZE"),
            _number(environment, "LOCAL_RANK", "0"),
            environment["MASTER_ADDR"],
            _number(environment, "MASTER_PORT"),
        )
    elif is_srun_task(environment):  # nobody else would come to a batch script
        total = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
        found = Seat(
            "Slurm",
            _number(environment, "SLURM_PROCID"),
            _number(environment, total),
            _number(environment, "SLURM_LOCALID", "0"),
            *_slurm_address(environment),
        )
    else:
        return None
    if found.rank >= found.world_size:
        raise ArgumentError(
            f"{found.launcher}'s variables say rank {found.rank} of {found.world_size}; unset RANK and "
            "WORLD_SIZE, or start with torchrun or srun"
        )
    return found


@contextmanager
def join(place: Seat, device: str = "cpu", timeout_s: float = 60.0) -> Iterator[dist.ProcessGroup]:
    """The default process group of the job, destroyed on leaving. Collective over the job.

    gloo carries CPU tensors; with ``device="cuda"`` NCCL carries CUDA tensors beside it, and the
    process's current device becomes the one of its local rank.

    Raises:
        ArgumentError: the device is unknown or not there.
        PeerTimeout: not all ranks of the job came within ``timeout_s``.
    """
    if device not in _DEVICES:
        raise ArgumentError(f"device is {device!r}; it must be one of {', '.join(_DEVICES)}")
    if device == "cuda":
        if place.local_rank >= torch.cuda.device_count():
            raise ArgumentError(
                f"local rank {place.local_rank} has no GPU of its own: torch sees "
                f"{torch.cuda.device_count()}; start fewer ranks a node, or use device cpu"
            )
        torch.cuda.set_device(place.local_rank)
    try:
        dist.init_process_group(
            "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
            init_method=place.init_method,
            rank=place.rank,
            world_size=place.world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    except dist.DistError as error:
        raise PeerTimeout(
            f"rank {place.rank} of {place.world_size} (by {place.launcher}) met no complete group at "
            f"{place.address} within {timeout_s:g} s: {str(error).splitlines()[0]}; check that all "
            "ranks started and that MASTER_ADDR and MASTER_PORT can be reached from every node",
            rank=place.rank,
            peers=(),
        ) from error
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def start_local_workers(
    num_workers: int, command: Sequence[str], variables: Mapping[str, str] | None = None
) -> int:
    """Runs ``command`` as ``num_workers`` ranks on this machine; the first exit code that is not 0.

    torch's own elastic agent starts and watches them: when one fails the others are ended, and so are
    all of them on SIGINT or SIGTERM. ``variables`` are added to their environment. To be called from
    the main thread of a command, since the agent installs signal handlers.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # A worker says itself what went wrong; the agent's account of which process it ended helps nobody.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # each has a level of its own
            logging.getLogger(name).setLevel(logging.CRITICAL)
    defaults = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": "1"}
    assignments = [f"{name}={value}" for name, value in {**defaults, **(variables or {})}.items()]
    with tempfile.TemporaryDirectory(prefix="nvrar-") as log_dir:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_workers,
            logs_specs=DefaultLogsSpecs(log_dir=log_dir),
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",  # a port that is free at that moment
            max_restarts=0,
            local_addr="127.0.0.1",  # the host's own name need not resolve
        )
        try:
            elastic_launch(config, "env")(*assignments, *command)
        except ChildFailedError as error:
            code = int(error.get_first_failure()[1].exitcode)
            return code if code > 0 else 128 - code
        except SignalException as signal:
            return 128 + int(signal.sigval)
    return 0


def _number(environment: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environment.get(name, default)
    if text is None or not text.isdigit():
        raise ArgumentError(f"{name} is {text!r} in the environment; it must be a whole number")
    return int(text)


def _slurm_address(environment: Mapping[str, str]) -> tuple[str, int]:
    """Where the ranks of a Slurm step meet: at rank 0's node, which is the list's first."""
    host = environment.get("MASTER_ADDR") or _first_host(
        environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    )
    if not host:
        raise ArgumentError(
            "SLURM_PROCID is set, but no SLURM_STEP_NODELIST or SLURM_JOB_NODELIST to find rank 0 by; "
            "set MASTER_ADDR to the host of rank 0"
        )
    if environment.get("MASTER_PORT"):
        return host, _number(environment, "MASTER_PORT")
    # Equal on all ranks, and different for the steps and jobs that may share a node.
    job, step = (_number(environment, f"SLURM_{what}_ID", "0") for what in ("JOB", "STEP"))
    return host, _FIRST_PORT + (job * 31 + step) % _NUM_PORTS


def _first_host(node_list: str) -> str:
    """The first name of Slurm's compressed list: ``gpu[003-007,9],login1`` begins with ``gpu003``."""
    item = re.match(r"(?:[^,\[]|\[[^\]]*\])*", node_list)
    return re.sub(r"\[([^,\-\]]+)[^\]]*\]", r"\1", item[0] if item else "").strip()
