# SPDX-License-Identifier: Apache-2.0
"""How a command comes to its ranks: joins a launcher's job, or starts them on this machine."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping

import torch
from torch.distributed import ProcessGroup

from nvrar.commands.common import complain, exit_code
from nvrar.errors import ArgumentError, NvrarError, TopologyError
from nvrar.hardware import num_cores
from nvrar.launch import Seat, join, start_local_workers
from nvrar.meeting import store_of
from nvrar.topology import Topology
from nvrar.units import format_size

# An interrupt ends a rank at once, even while it imports: Python's way, an exception in whatever code runs,
# can be swallowed there, and the others then wait for that rank.
_AS_RANK = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "runpy.run_module('nvrar', run_name='__main__', alter_sys=True)"
)


def local_topology(options: argparse.Namespace, device: str) -> Topology:
    """What to start here without a launcher: as asked for, else a rank for each GPU, or 2 nodes of 2."""
    asked = options.ranks_per_node or _ranks_per_node(os.environ)
    if device == "cuda" and asked is None and options.nodes is None:
        return Topology(1, max(torch.cuda.device_count(), 1))
    return Topology(options.nodes or 2, asked or 2)


def start(topology: Topology, device: str, largest_bytes: int, options: argparse.Namespace) -> int:
    """Runs this command as the ranks of ``topology``, all here; its exit code.

    Raises:
        ArgumentError: this machine cannot hold them with messages of ``largest_bytes``.
    """
    # What checking a result takes on each rank: the input, the result, and a copy or two of each.
    needed = 4 * largest_bytes * topology.world_size
    present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > present:
        raise ArgumentError(
            f"{topology.world_size} ranks with messages of {format_size(largest_bytes)} need about "
            f"{format_size(needed)} of memory, and this machine has {format_size(present)}; measure "
            "smaller sizes, or fewer ranks"
        )
    if device == "cuda" and not torch.cuda.device_count():
        raise ArgumentError("--device cuda, and torch sees no GPU here; give --device cpu")
    if device == "cuda" and topology.world_size > torch.cuda.device_count():
        raise ArgumentError(
            f"{topology.world_size} ranks need a GPU each, and torch sees {torch.cuda.device_count()} "
            "here; give a smaller --nodes or --ranks-per-node, or --device cpu"
        )
    if topology.world_size > num_cores():
        print(
            f"nvrar: {topology.world_size} ranks share {num_cores()} cores; the times include waiting "
            "for one",
            file=sys.stderr,
        )
    return start_local_workers(
        topology.world_size,
        [sys.executable, "-c", _AS_RANK, *options.command_line[1:]],
        {"NVRAR_RANKS_PER_NODE": str(topology.ranks_per_node)},
    )


def run_as_rank(
    place: Seat,
    device: str,
    timeout_s: float,
    body: Callable[[ProcessGroup], None],
    leave: Callable[[ProcessGroup, int], None] = lambda group, code: None,
) -> int:
    """Runs ``body`` as one rank of the job; the exit code. One rank tells an error that all of them have.

    ``leave`` is called at the end, before the group is destroyed.
    """
    with join(place, device, timeout_s) as group:
        if place.rank > 0:  # what is logged on all ranks is read on one
            logging.getLogger("nvrar").setLevel(logging.ERROR)
        code = 0
        try:
            body(group)
        except NvrarError as error:
            code = complain(error) if _is_first_to_tell(group) else exit_code(error)
        leave(group, code)
    return code


def layout(options: argparse.Namespace, group: ProcessGroup, timeout_s: float) -> Topology:
    """As the options say, else as the ranks see themselves. Collective where it must ask them."""
    nodes, ranks = options.nodes, options.ranks_per_node
    if nodes is None and ranks is None:
        return Topology.detect(group, timeout_s)
    nodes = nodes or max(group.size() // ranks, 1)
    ranks = ranks or max(group.size() // nodes, 1)
    if nodes * ranks != group.size():
        raise TopologyError(
            f"{nodes} nodes of {ranks} ranks are {nodes * ranks}, and the job has {group.size()}; "
            "give --nodes and --ranks-per-node that multiply to it, or leave them out"
        )
    return Topology(nodes, ranks)


def _ranks_per_node(environment: Mapping[str, str]) -> int | None:
    text = environment.get("NVRAR_RANKS_PER_NODE")
    if not text:
        return None
    if not text.isdigit() or int(text) < 1:
        raise TopologyError(
            f"NVRAR_RANKS_PER_NODE is {text!r}; it must be a whole number of at least 1"
        )
    return int(text)


def _is_first_to_tell(group: ProcessGroup) -> bool:
    """Whether this rank is the one to report an error that all of them have."""
    try:
        return bool(store_of(group).add("nvrar/error/told", 1) == 1)
    except (RuntimeError, NvrarError):  # nobody to ask: better twice than never
        return True
