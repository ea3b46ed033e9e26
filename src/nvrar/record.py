# SPDX-License-Identifier: Apache-2.0
"""What a measurement must say about itself to be repeated: where, with what, by which command.

Every row of JSON carries all of it, so that a row cut from its file still tells its story.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup

from nvrar._version import __version__
from nvrar.bench import Measurement, Settings
from nvrar.contenders import BASELINE
from nvrar.cost import Machine
from nvrar.hardware import cpu_name, driver_version, num_cores
from nvrar.host import backend_of, type_name
from nvrar.meeting import exchange_values
from nvrar.topology import Topology

_VARIABLES = ("NVRAR_", "NCCL_", "NVSHMEM_", "GLOO_", "OMP_")


def provenance(
    group: ProcessGroup,
    topology: Topology,
    settings: Settings,
    command: Sequence[str],
    machine: Machine | None = None,
) -> dict[str, Any]:
    """Everything about a run that is not a number of it, as JSON can carry it; the environment is this
    rank's. Collective over ``group``."""
    hosts = exchange_values(group, "provenance", host(settings.device), settings.timeout_s)
    commit, is_dirty = checkout()
    return {
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "git_commit": commit,
        "git_dirty": is_dirty,
        "nvrar": __version__,
        **software(),
        "topology": str(topology),
        "rank_order": list(topology.order) or None,
        "hosts": _distinct(hosts),
        "world_size": group.size(),
        "backend": backend_of(group, settings.device),
        "environment": variables(os.environ),
        "machine_model": None if machine is None else asdict(machine),
        "dtype": type_name(settings.dtype),
        "op": settings.op,
        "device": settings.device,
        "iterations": settings.iterations,
        "rounds": settings.rounds,
        "warmup": settings.warmup,
    }


def without_names(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The same without what names hosts, interfaces or folders: for a file that is passed on."""
    hosts = [{k: v for k, v in host.items() if k != "name"} for host in provenance["hosts"]]
    named = ("environment", "rank_order", "kernel")
    return {k: v for k, v in provenance.items() if k not in named} | {"hosts": hosts}


def rows(
    measurements: Sequence[Measurement], provenance: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """A row for each measurement. ``speedup`` is torch's median over this one's."""
    baseline_us = {
        (m.timing, m.num_bytes): m.median_us for m in measurements if m.contender == BASELINE
    }
    for m in measurements:
        reference_us = baseline_us.get((m.timing, m.num_bytes))
        yield {
            "contender": m.contender,
            "num_bytes": m.num_bytes,
            "timing": m.timing,
            "plan": m.plan,
            "executor": executor_of(m),
            "fallbacks": dict(m.fallbacks),
            "num_samples": len(m.samples_us),
            "median_us": round(m.median_us, 2),
            "p10_us": round(m.percentile_us(10), 2),
            "p90_us": round(m.percentile_us(90), 2),
            "min_us": round(m.min_us, 2),
            "speedup": None if reference_us is None else round(reference_us / m.median_us, 3),
            "predicted_us": None if m.predicted_us is None else round(m.predicted_us, 2),
            **provenance,
            "samples_us": [round(t, 1) for t in m.samples_us],
        }


def refusal_of_path(path: Path) -> str:
    """Why no file could be written there; empty if it can be. To be asked before anything is measured."""
    if path.is_dir():
        return f"{path} cannot be written: it is a directory; name a file in it"
    if path.exists() and not os.access(path, os.W_OK):
        return f"{path} cannot be written: it is not yours to write"
    if path.exists():
        return ""
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        return f"{path} cannot be written: {path.parent} is no directory that may be written to"
    return ""


def write_rows(rows: Iterator[dict[str, Any]], path: Path) -> None:
    """One JSON object a line; replaces what was there."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def executor_of(measurement: Measurement) -> str:
    """What did the work of the timed calls."""
    fallen = sum(measurement.fallbacks.values())
    if fallen == len(measurement.samples_us):
        return "torch.distributed"
    return "mixed" if fallen else measurement.executor


def host(device: str = "cpu") -> dict[str, Any]:
    """This rank's machine."""
    return {
        "name": socket.gethostname(),
        "cpu": cpu_name(),
        "num_cores": num_cores(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


def software() -> dict[str, str | None]:
    """Versions of what lies below."""
    with_nccl = torch.distributed.is_nccl_available() and torch.version.cuda is not None
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "nccl": _nccl_version() if with_nccl else None,
        "driver": driver_version(),
        "kernel": platform.release(),
    }


def _nccl_version() -> str:
    found: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(map(str, found))


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that steer us and the libraries below."""
    return {k: v for k, v in sorted(environment.items()) if k.startswith(_VARIABLES)}


def checkout(source: Path = Path(__file__)) -> tuple[str | None, bool | None]:
    """The commit that ``source`` is of, and whether any file of it was changed; None if it is of none, as
    where the package is installed. Files that git does not track count beside the source only."""
    here = source.parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may lie inside somebody else's checkout.
    if git("ls-files", "--error-unmatch", source.name) is None:
        return None, None
    changed = git("status", "--porcelain", "--untracked-files=no")
    added = git("ls-files", "--others", "--exclude-standard")  # in the source's folder
    return git("rev-parse", "HEAD"), bool(changed or added)


def _distinct(hosts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The hosts in order of first rank, each with how many ranks it holds."""
    counts: dict[str, int] = {}
    for found in hosts:
        key = json.dumps(found)
        counts[key] = counts.get(key, 0) + 1
    return [{**json.loads(key), "num_ranks": count} for key, count in counts.items()]
