"""``nvrar bench``: plans beside ``torch.distributed.all_reduce``; as a table, as JSON lines, as a picture.

Under torchrun or srun it joins the job; otherwise it starts the ranks itself, on this machine, and they
run this same command.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from torch.distributed import ProcessGroup

from nvrar.bench import Measurement, measure, num_steps
from nvrar.commands.common import Subparsers, add_layout, complain, exit_code
from nvrar.commands.progress import Progress
from nvrar.commands.request import Request, add_options
from nvrar.contenders import contenders
from nvrar.errors import ArgumentError, NvrarError, TopologyError
from nvrar.launch import join, seat, start_local_workers
from nvrar.peers import available, leave
from nvrar.record import provenance, rows, write_rows
from nvrar.report import of_timing, picture, table
from nvrar.sideband import exchange_values, store_of
from nvrar.topology import Topology
from nvrar.units import format_size


def add(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("bench", help="all-reduce times beside torch.distributed's")
    add_layout(parser, "default: as the launcher says; without a launcher 2 nodes of 2, all here")
    add_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> int:
    request = Request.read(options)
    place = seat(os.environ)
    if place is None:
        return _start(options, request)
    with join(place, request.settings.device, request.settings.timeout_s) as group:
        if place.rank > 0:  # what is logged on all ranks is read on one
            logging.getLogger("nvrar").setLevel(logging.ERROR)
        code = 0
        try:
            _bench(options, request, group, console)
        except NvrarError as error:
            code = complain(error) if _is_first_to_tell(group) else exit_code(error)
        if request.with_peers:
            leave(group, code, request.settings.timeout_s)
    return code


def _start(options: argparse.Namespace, request: Request) -> int:
    ranks_per_node = options.ranks_per_node or _ranks_per_node(os.environ) or 2
    topology = Topology(options.nodes or 2, ranks_per_node)
    request.check_plans(topology)
    refusal = request.check_paths()
    if refusal:
        raise ArgumentError(refusal)
    # What checking a result takes on each rank: the input, the result, and a copy or two of each.
    needed = 4 * max(request.sizes) * topology.world_size
    present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > present:
        raise ArgumentError(
            f"{topology.world_size} ranks with messages of {format_size(max(request.sizes))} need about "
            f"{format_size(needed)} of memory, and this machine has {format_size(present)}; measure "
            "smaller sizes, or fewer ranks"
        )
    if options.device == "cuda" and topology.world_size > torch.cuda.device_count():
        raise ArgumentError(
            f"{topology.world_size} ranks need a GPU each, and torch sees {torch.cuda.device_count()} "
            "here; give a smaller --nodes or --ranks-per-node, or --device cpu"
        )
    num_cores = len(os.sched_getaffinity(0))
    if topology.world_size > num_cores:
        print(
            f"nvrar: {topology.world_size} ranks share {num_cores} cores; the times include waiting "
            "for one",
            file=sys.stderr,
        )
    return start_local_workers(
        topology.world_size,
        [sys.executable, "-m", "nvrar.cli", *options.command_line[1:]],
        {"NVRAR_RANKS_PER_NODE": str(ranks_per_node)},
    )


def _bench(
    options: argparse.Namespace, request: Request, group: ProcessGroup, console: Console
) -> None:
    settings = request.settings
    refusal = request.check_paths() if group.rank() == 0 else ""  # nobody else writes
    refusal = exchange_values(group, "bench paths", refusal, settings.timeout_s)[0]
    if refusal:
        raise ArgumentError(refusal)
    topology = _layout(options, group, settings.timeout_s)
    request.check_plans(topology)
    about = provenance(group, topology, settings, options.command_line, request.machine)
    with (
        contenders(
            group,
            topology,
            request.plans,
            max_bytes=request.max_bytes,
            timeout_s=settings.timeout_s,
            machine=request.machine,
            executor=options.executor,
        ) as entrants,
        Progress(num_steps(len(request.sizes), settings), group.rank() == 0) as progress,
    ):
        if request.with_peers:
            peers, lacking = available(group, settings.dtype, settings.op, settings.timeout_s)
            entrants += peers
            if lacking and group.rank() == 0:
                print(f"nvrar: not here, so not measured: {'; '.join(lacking)}", file=sys.stderr)
        measurements = measure(
            group, topology, entrants, request.sizes, settings, request.machine, progress.step
        )
    if group.rank() == 0:
        _write(measurements, about, request)
        for timing in settings.timings:
            console.print(table(of_timing(measurements, timing), about, options.predict))


def _write(measurements: Sequence[Measurement], about: Mapping[str, Any], request: Request) -> None:
    if request.rows_path:
        write_rows(rows(measurements, about), request.rows_path)
    if request.picture_path:
        picture(of_timing(measurements, request.settings.timings[0]), about, request.picture_path)


def _layout(options: argparse.Namespace, group: ProcessGroup, timeout_s: float) -> Topology:
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
