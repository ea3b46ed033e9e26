# SPDX-License-Identifier: Apache-2.0
"""``nvrar bench --virtual NxG``: the plans of any topology on one GPU, checked bit for bit."""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table

from nvrar import gpu
from nvrar.commands.common import machine_from
from nvrar.commands.progress import Progress
from nvrar.commands.request import Request
from nvrar.draw import names_of
from nvrar.errors import ArgumentError
from nvrar.plan import Plan
from nvrar.topology import Topology
from nvrar.tune import choose
from nvrar.units import format_size

# What has no meaning where one process plays all ranks, with its default.
_OTHERS = {
    "nodes": None, "ranks_per_node": None, "out": None, "json": None, "plot": None, "eager": False,
    "interleaved": False, "max_bytes": None, "predict": False,
}  # fmt: skip


def run_virtual(options: argparse.Namespace, console: Console) -> int:
    for name, default in _OTHERS.items():
        if getattr(options, name) != default:
            raise ArgumentError(
                f"--{name.replace('_', '-')} and --virtual do not go together: --virtual plays all ranks on "
                "one GPU, and its times are not to be kept"
            )
    topology = Topology.parse(options.virtual)
    if topology.world_size < 2:
        raise ArgumentError(
            f"--virtual {options.virtual} is one rank; give two or more, such as 4x8"
        )
    options.device = "cuda"
    reason = gpu.why_unavailable(None)
    if reason:
        raise ArgumentError(
            f"--virtual runs the kernels of all ranks on one GPU, and this machine {reason}; on CPUs, "
            "nvrar bench --nodes N --ranks-per-node G plays nodes with local processes"
        )
    request = Request.read(options)
    request.check_plans(topology)
    machine = machine_from(options.machine, "gpu")
    plans = []
    for word in request.plans:
        if word == "auto":
            plans += [choose(topology, size, machine) for size in request.sizes]
        else:
            plans.append(Plan.resolve(word, topology))
    from nvrar.gpu.emulation import emulate, num_steps

    torch.cuda.set_device(0)
    with Progress(num_steps(plans), is_shown=True) as progress:
        found = emulate(topology, plans, request.sizes, request.settings, progress.step)
    cells = Table(
        title=f"{options.op} of {options.dtype}: {topology} virtual ranks on one "
        f"{torch.cuda.get_device_name()}",
        caption="every rank's bits are those of the plan's order of addition. Times are of one GPU that "
        "plays all ranks: they show no network's speed",
    )
    for heading in ("plan", "name", "packets", "size", "bits", "emulation us"):
        is_text = heading in ("plan", "name", "packets", "bits")
        cells.add_column(heading, justify="left" if is_text else "right")
    for one in found:
        cells.add_row(
            str(one.plan),
            ", ".join(names_of(one.plan, topology)),
            one.packets,
            format_size(one.num_bytes),
            "right",
            f"{one.time_us:.1f}",
        )
    console.print(cells)
    return 0
