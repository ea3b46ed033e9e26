# SPDX-License-Identifier: Apache-2.0
"""``nvrar bench``: plans beside ``torch.distributed.all_reduce``; as a table, as JSON lines, as a picture.

Under torchrun or srun it joins the job; otherwise it starts the ranks itself, on this machine, and they
run this same command.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from torch.distributed import ProcessGroup

from nvrar.bench import Measurement, measure, num_steps
from nvrar.commands import ranks
from nvrar.commands.common import Subparsers, add_layout, writing
from nvrar.commands.progress import Progress
from nvrar.commands.request import Request, add_options
from nvrar.commands.virtual import run_virtual
from nvrar.contenders import PlanContender, contenders
from nvrar.errors import ArgumentError
from nvrar.launch import seat
from nvrar.meeting import exchange_values
from nvrar.peers import available, leave
from nvrar.record import provenance, rows, write_rows
from nvrar.report import of_timing, picture, table


def add(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("bench", help="all-reduce times beside torch.distributed's")
    add_layout(
        parser,
        "default: as the launcher says; without a launcher 2 nodes of 2, or one of all GPUs, all here",
    )
    add_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> int:
    if options.virtual is not None:
        return run_virtual(options, console)
    request = Request.read(options)
    settings = request.settings
    place = seat(os.environ)
    if place is None:
        topology = ranks.local_topology(options, settings.device)
        request.check_plans(topology)
        refusal = request.check_paths()
        if refusal:
            raise ArgumentError(refusal)
        return ranks.start(topology, settings.device, max(request.sizes), options)

    def end(group: ProcessGroup, code: int) -> None:
        if request.with_peers:
            leave(group, code, settings.timeout_s)

    return ranks.run_as_rank(
        place,
        settings.device,
        settings.timeout_s,
        lambda group: _bench(options, request, group, console),
        end,
    )


def _bench(
    options: argparse.Namespace, request: Request, group: ProcessGroup, console: Console
) -> None:
    settings = request.settings
    refusal = request.check_paths() if group.rank() == 0 else ""  # nobody else writes
    refusal = exchange_values(group, "bench paths", refusal, settings.timeout_s)[0]
    if refusal:
        raise ArgumentError(refusal)
    topology = ranks.layout(options, group, settings.timeout_s)
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
        ours = (e for e in entrants if isinstance(e, PlanContender))
        about["link"] = next((e.link_for(settings.device) for e in ours), None)
        if request.with_peers:
            peers, lacking = available(group, settings.dtype, settings.op, settings.timeout_s)
            entrants += peers
            if lacking and group.rank() == 0:
                print(f"nvrar: not here, so not measured: {'; '.join(lacking)}", file=sys.stderr)
        measurements = measure(
            group, topology, entrants, request.sizes, settings, request.machine, progress.step
        )
    if group.rank() == 0:
        for timing in settings.timings:  # first: a disk may be full
            console.print(table(of_timing(measurements, timing), about, options.predict))
        _write(measurements, about, request)


def _write(measurements: Sequence[Measurement], about: Mapping[str, Any], request: Request) -> None:
    if request.rows_path:
        with writing(request.rows_path):
            write_rows(rows(measurements, about), request.rows_path)
    if request.picture_path:
        with writing(request.picture_path):
            picture(
                of_timing(measurements, request.settings.timings[0]), about, request.picture_path
            )
