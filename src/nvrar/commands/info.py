# SPDX-License-Identifier: Apache-2.0
"""``nvrar info``: what is here, what is missing, and what would be chosen."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nvrar import tables
from nvrar.commands.common import Subparsers, add_layout, executor_here, machine_from, print_json
from nvrar.info import PACKAGES, collect, environment_topology
from nvrar.topology import Topology
from nvrar.units import format_size, format_time

_DEFAULT = Topology(2, 4)


def add(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "info", help="versions, devices, topology, networks, executors, and the plan for each size"
    )
    add_layout(parser, "the plans to show; default: as the launcher says, else 2 nodes of 4")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> int:
    default = environment_topology(os.environ) or _DEFAULT
    topology = Topology(
        options.nodes or default.num_nodes, options.ranks_per_node or default.ranks_per_node
    )
    machine = machine_from(options.machine, executor_here())
    facts = collect(os.environ, topology, machine)
    if options.json:
        print_json(facts, console)
        return 0
    for title, lines in _sections(facts):
        console.print(Text(title, "bold"))
        for name, value in lines:
            console.print(Text(f"  {name:<22}{value}"), soft_wrap=True)
    measured = facts["tuning_table"]
    by = f"the model of {machine.name}" if measured is None else "what was measured (nvrar tune)"
    console.print(Text(f"plan 'auto' on {topology} ranks, by {by}", "bold"), soft_wrap=True)
    table = Table()
    table.add_column("size", justify="right")
    table.add_column("plan")
    headings = ("predicted",) if measured is None else ("predicted", "measured")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in facts["choices"]:
        times = (row[f"{heading}_us"] for heading in headings)
        cells = ("" if t is None else format_time(t) for t in times)
        table.add_row(format_size(row["num_bytes"]), row["plan"], *cells)
    console.print(table)
    return 0


def _sections(facts: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The facts as titled lists of name and value."""
    versions = {
        name: ("yes" if value is True else str(value))
        for name, value in facts["versions"].items()
        if value not in (None, False)
    }
    absent = [n for n, value in facts["versions"].items() if value is None and n in PACKAGES]
    host_facts, topology = facts["host"], facts["topology"]
    gpu_lines = [
        (
            f"GPU {gpu['index']}",
            f"{gpu['name']}, {gpu['memory_gib']} GiB, sm_{gpu['compute_capability'].replace('.', '')}, "
            f"peers {gpu['peers']}, NVLinks {gpu['nvlinks'] or 'unknown'}",
        )
        for gpu in facts["gpus"]
    ]
    return [
        ("versions", [*versions.items(), ("not installed", ", ".join(absent) or "nothing")]),
        (
            "devices",
            [
                ("host", host_facts["name"]),
                ("CPU", f"{host_facts['cpu']}, {host_facts['num_cores']} cores"),
                *(gpu_lines or [("GPU", "none that torch sees")]),
            ],
        ),
        (
            "topology",
            [
                ("started by", topology["started_by"]),
                ("by", f"{topology['source']}: {topology['meaning']}"),
                ("to override", "NVRAR_RANKS_PER_NODE=G plays nodes of G ranks on any hosts"),
            ],
        ),
        (
            "networks",
            [
                (i["name"], i["address"] + (", taken by gloo" if i["used_by_gloo"] else ""))
                for i in facts["interfaces"]
            ]
            + [("to choose", "GLOO_SOCKET_IFNAME=name")],
        ),
        (
            "executors",
            [
                line
                for e in facts["executors"]
                for line in (
                    (e["name"], ("yes: " if e["available"] else "not yet: ") + e["about"]),
                    *((f"{e['name']} needs", need) for need in e["missing"]),
                )
            ],
        ),
        (
            "tuning",
            [
                ("table", facts["tuning_table"] or "none holds here: the cost model chooses"),
                ("to make one", "nvrar tune, on the ranks that will run"),
                ("to choose", f"{tables.VARIABLE}=FILE, a folder of them, or {tables.OFF}"),
            ],
        ),
        ("environment", list(facts["environment"].items()) or [("", "no NVRAR_, NCCL_, ... set")]),
    ]
