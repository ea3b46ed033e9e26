# SPDX-License-Identifier: Apache-2.0
"""``nvrar tune``: measures what is worth trying on this machine, and keeps the table for ``plan="auto"``.

Ranks come together as those of ``nvrar bench`` do.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table as Columns
from torch.distributed import ProcessGroup

from nvrar import gpu, tables
from nvrar.bench import Settings
from nvrar.commands import ranks
from nvrar.commands.common import Subparsers, add_layout, count, machine_from, writing
from nvrar.commands.progress import Progress
from nvrar.commands.request import DTYPE_NAMES, add_sizes, read_sizes
from nvrar.cost import Machine
from nvrar.errors import ArgumentError, NvrarError
from nvrar.gpu.jit import TYPES
from nvrar.lab import HostLab
from nvrar.launch import seat
from nvrar.meeting import exchange_values
from nvrar.record import provenance, without_names
from nvrar.table import Entry, Table, Trial
from nvrar.topology import Topology
from nvrar.tune import ranking, worth_trying
from nvrar.tuner import Lab, tune
from nvrar.units import format_size, format_time

_SIZES = "1K,2K,4K,8K,16K,32K,64K,128K,256K,512K,1M,2M,4M,8M,16M"


def add(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "tune", help="measures plans and launches, and keeps the fastest for plan='auto'"
    )
    add_layout(
        parser,
        "default: as the launcher says; without a launcher one node of all GPUs, or 2 nodes of 2, all here",
    )
    what = parser.add_argument_group("what")
    add_sizes(what, _SIZES)
    what.add_argument(
        "--dtype",
        default="bfloat16",
        metavar="TYPES",
        help=f"one or more of {', '.join(sorted(DTYPE_NAMES))}; a table each (default: %(default)s)",
    )
    what.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--budget", type=float, default=300.0, metavar="SECONDS", help="for all of it (%(default)g)"
    )
    how.add_argument(
        "--most-plans", type=count, default=4, help="tried of a size, best predicted (%(default)s)"
    )
    how.add_argument("--timeout", type=float, default=30.0, help="seconds for any wait (30)")
    how.add_argument("--dry-run", action="store_true", help="say what would be measured, and stop")
    how.add_argument(
        "--output",
        metavar="PATH",
        help=f"a folder, or a .json file (default: {tables.user_folder()})",
    )
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class _Request:
    sizes: tuple[int, ...]
    settings: tuple[Settings, ...]  # one for each type
    machine: Machine
    output: Path

    @property
    def device(self) -> str:
        return self.settings[0].device

    @property
    def timeout_s(self) -> float:
        return self.settings[0].timeout_s

    @classmethod
    def read(cls, options: argparse.Namespace) -> _Request:
        """Raises ArgumentError for the first option that cannot work."""
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if options.budget <= 0:
            raise ArgumentError(f"--budget is {options.budget:g} s; it must be above 0")
        names = list(dict.fromkeys(n for n in options.dtype.split(",") if n))
        fitting = [name for name, t in DTYPE_NAMES.items() if device == "cpu" or t in TYPES]
        unknown = [name for name in names if name not in fitting]
        if unknown or not names:
            raise ArgumentError(
                f"--dtype is {options.dtype!r}; on {device} it must be of {', '.join(sorted(fitting))}"
            )
        on_gpu = device == "cuda"
        settings = tuple(
            Settings(
                DTYPE_NAMES[name],
                device=device,
                iterations=8 if on_gpu else 5,
                rounds=4,
                warmup=2,
                timeout_s=options.timeout,
                timings=("graph",) if on_gpu else ("host",),
            )
            for name in names
        )
        sizes = read_sizes(options)
        for one in settings:
            for size in sizes:
                one.num_elements(size)
        output = Path(options.output) if options.output else tables.user_folder()
        if output.suffix == ".json" and len(names) > 1:
            raise ArgumentError(
                f"--output {output} is one file, and {len(names)} types make {len(names)} tables; give a "
                "folder"
            )
        return cls(
            sizes, settings, machine_from(options.machine, "gpu" if on_gpu else "host"), output
        )

    def refusal_of_output(self) -> str:
        """Why the tables could not be written; empty if they can be. Makes the folder."""
        folder = self.output.parent if self.output.suffix == ".json" else self.output
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return f"--output: {folder} cannot be made: {error.strerror}"
        return "" if os.access(folder, os.W_OK) else f"--output: {folder} may not be written to"

    def path_of(self, table: Table) -> Path:
        if self.output.suffix == ".json":
            return self.output
        return self.output / tables.file_name(table)


def run(options: argparse.Namespace, console: Console) -> int:
    request = _Request.read(options)
    place = seat(os.environ)
    if options.dry_run:
        topology = ranks.local_topology(options, request.device)
        console.print(_forecast(request, topology, options.most_plans))
        return 0
    if place is None:
        topology = ranks.local_topology(options, request.device)
        if topology.world_size == 1 and (request.device == "cpu" or torch.cuda.device_count()):
            raise ArgumentError(
                "one rank has nothing to reduce with; tune on as many ranks as will run (--nodes, "
                "--ranks-per-node, or under torchrun or srun)"
            )
        refusal = request.refusal_of_output()
        if refusal:
            raise ArgumentError(refusal)
        return ranks.start(topology, request.device, max(request.sizes), options)
    return ranks.run_as_rank(
        place,
        request.device,
        request.timeout_s,
        lambda group: _tune(options, request, group, console),
    )


def _tune(
    options: argparse.Namespace, request: _Request, group: ProcessGroup, console: Console
) -> None:
    refusal = request.refusal_of_output() if group.rank() == 0 else ""  # nobody else writes
    refusal = exchange_values(group, "tune output", refusal, request.timeout_s)[0]
    if refusal:
        raise ArgumentError(refusal)
    topology = ranks.layout(options, group, request.timeout_s)
    is_first = group.rank() == 0
    steps = len(request.settings) * len(request.sizes)
    budget_s = options.budget / len(request.settings)
    made: list[tuple[Table, NvrarError | None]] = []  # and why it was not kept
    with Progress(steps, is_first) as progress:
        for settings in request.settings:
            about = provenance(group, topology, settings, _shareable(options), request.machine)
            with closing(_lab(group, topology, request, settings, options.most_plans)) as lab:
                table = tune(
                    group,
                    lab,
                    request.sizes,
                    settings,
                    budget_s,
                    without_names(about),
                    progress.step,
                )
            if is_first:  # at once: what is measured is kept even if a later type fails
                made.append((table, _keep(table, request.path_of(table))))
    for table, problem in made:
        console.print(_outcome(table))
        _say_what_is_missing(table, request.sizes, console)
        if problem is None:
            console.print(f"written to {request.path_of(table)}", soft_wrap=True)
    for _, problem in made:
        if problem is not None:
            raise problem


def _keep(table: Table, path: Path) -> NvrarError | None:
    """Writes the table; what kept it from that, once all that was measured has been shown."""
    try:
        with writing(path):
            tables.write(table, path)
    except NvrarError as error:
        return error
    return None


def _lab(
    group: ProcessGroup, topology: Topology, request: _Request, settings: Settings, most_plans: int
) -> Lab:
    if settings.device == "cpu":
        return HostLab(group, topology, request.machine, settings, most_plans)
    reason = gpu.open_for(group, settings.timeout_s)
    reasons = exchange_values(group, "gpu lack", reason, settings.timeout_s)
    lacking = [(rank, other) for rank, other in enumerate(reasons) if other]
    if lacking:
        raise ArgumentError(
            f"rank {lacking[0][0]} {lacking[0][1]}; without the GPU executor there is nothing to tune on "
            "GPUs (--device cpu tunes the host executor)"
        )
    from nvrar.gpu.lab import GpuLab

    return GpuLab(group, topology, request.machine, settings, most_plans)


def _shareable(options: argparse.Namespace) -> list[str]:
    """The command line, without where its output went."""
    line = list(options.command_line)
    if "--output" in line:
        at = line.index("--output")
        del line[at : at + 2]
    return [word for word in line if not word.startswith("--output=")]


def _forecast(request: _Request, topology: Topology, most_plans: int) -> Columns:
    cells = Columns(title=f"to be measured on {topology} ranks ({request.device})")
    for heading in ("size", "plan", "predicted"):
        cells.add_column(heading, justify="left" if heading == "plan" else "right")
    for size in request.sizes:
        predicted = dict(ranking(topology, size, request.machine))
        for plan in worth_trying(topology, size, request.machine, most_plans):
            cells.add_row(format_size(size), str(plan), format_time(predicted[plan]))
    return cells


def _outcome(table: Table) -> Columns:
    cells = Columns(title=str(table.key), caption="x: torch's time over ours")
    for heading in ("size", "torch us", "ours us", "x", "plan", "launch", "auto takes"):
        is_text = heading in ("plan", "launch", "auto takes")
        cells.add_column(heading, justify="left" if is_text else "right")
    for entry in table.entries:
        best = entry.best()
        ours = ("-", "-", "-", "-") if best is None else _cells_of(best, entry)
        cells.add_row(
            format_size(entry.num_bytes),
            f"{entry.torch_us:.2f}",
            *ours,
            "torch" if entry.is_for_torch else "ours",
        )
    return cells


def _cells_of(best: Trial, entry: Entry) -> tuple[str, str, str, str]:
    launch = "" if best.packets is None else f"{best.packets} {best.blocks}x{best.threads}"
    speedup = entry.torch_us / best.time_us
    return f"{best.time_us:.2f}", f"{speedup:.2f}", str(best.plan), launch


def _say_what_is_missing(table: Table, sizes: Sequence[int], console: Console) -> None:
    for name, reason in table.left_out.items():
        console.print(f"left out: {name}: {reason}", soft_wrap=True, markup=False)
    have = {entry.num_bytes for entry in table.entries}
    missing = [format_size(size) for size in sizes if size not in have]
    if missing:
        console.print(
            f"the budget was spent before {', '.join(missing)}: these take the next larger size's plan; "
            "raise --budget",
            soft_wrap=True,
        )
