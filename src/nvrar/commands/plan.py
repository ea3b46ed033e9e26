# SPDX-License-Identifier: Apache-2.0
"""``nvrar plan``: the plans for a topology and a size by predicted time, and one of them drawn."""

from __future__ import annotations

import argparse
import os
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nvrar import tables
from nvrar.commands.common import (
    Subparsers,
    add_layout,
    count,
    executor_here,
    machine_from,
    print_json,
)
from nvrar.cost import level_costs
from nvrar.draw import draw, names_of
from nvrar.plan import PLAN_NAMES, Plan
from nvrar.topology import Topology
from nvrar.tune import Chooser, ranking
from nvrar.units import format_size, format_time, parse_size


def add(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("plan", help="the plans with predicted costs, and one drawn")
    add_layout(parser, "default: 2 nodes of 4")
    parser.add_argument(
        "--bytes", default="256K", metavar="SIZE", help="the message, such as 4096, 256K or 2M"
    )
    parser.add_argument("--top", type=count, default=10, help="plans to list (%(default)s)")
    parser.add_argument(
        "--plan", help=f"the one to draw: {', '.join(PLAN_NAMES)}, or a word; default: the chosen"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> int:
    topology = Topology(options.nodes or 2, options.ranks_per_node or 4)
    machine = machine_from(options.machine, executor_here())
    num_bytes = parse_size(options.bytes)
    found = tables.likely(os.environ, executor_here(), str(topology))
    measured = () if found is None else (found.table,)
    link = "" if found is None else found.table.key.link
    choice = Chooser(topology, machine, tables=measured).choose(num_bytes, "bfloat16", link)
    chosen, torch_us, times_us = choice.plan, None, {}
    if found is not None:
        entry = found.table.entry_at(num_bytes)
        if entry is not None:
            torch_us = entry.torch_us
            times_us = {trial.plan: trial.time_us for trial in reversed(entry.trials)}
    drawn = Plan.resolve(options.plan, topology) if options.plan else chosen
    ranked = ranking(topology, num_bytes, machine)
    rows: list[dict[str, Any]] = [
        {
            "plan": str(plan),
            "names": names_of(plan, topology),
            "predicted_us": round(predicted_us, 3),
            "measured_us": times_us.get(plan),
            "steps": plan.num_steps,
            "cross_node_bytes": sum(
                cost.cross_node_bytes for cost in level_costs(plan, topology, num_bytes, machine)
            ),
        }
        for plan, predicted_us in ranked[: options.top]
    ]
    if options.json:
        print_json(
            {
                "topology": str(topology),
                "num_bytes": num_bytes,
                "machine": machine.name,
                "chosen": str(chosen),
                "tuning_table": None if found is None else str(found.path),
                "torch_us": torch_us,
                "left_to_torch": choice.by_torch,
                "num_plans": len(ranked),
                "plans": rows,
            },
            console,
        )
        return 0
    table = Table(
        title=f"{len(rows)} of {len(ranked)} plans for {format_size(num_bytes)} on {topology} ranks",
        caption="cross-node: what a rank sends to other nodes, on the wire"
        + (f"\npredicted for {machine.name}: {machine.source}" if machine.source else ""),
    )
    # As few columns as will do: a plan broken over lines of a narrow terminal reads as several.
    table.add_column("plan")
    headings = ("predicted", *(["measured"] if times_us else []), "steps", "cross-node")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        names = f" ({', '.join(row['names'])})" if row["names"] else ""
        measured_us = row["measured_us"]
        cells = {
            "predicted": format_time(row["predicted_us"]),
            "measured": "" if measured_us is None else format_time(measured_us),
            "steps": str(row["steps"]),
            "cross-node": format_size(row["cross_node_bytes"]),
        }
        table.add_row(row["plan"] + names, *(cells[heading] for heading in headings))
    console.print(table)
    if found is not None:
        told = "" if torch_us is None else f"; torch.distributed took {format_time(torch_us)}"
        told += ", and 'auto' leaves this size to it" if choice.by_torch else ""
        console.print(Text(f"measured: {found.path}{told}"), soft_wrap=True)
    console.print(Text("\n" + draw(drawn, topology, num_bytes, machine)), soft_wrap=True)
    return 0
