# SPDX-License-Identifier: Apache-2.0
"""What is here: versions, devices, the topology this process would see, networks, executors.

Needs no process group and no GPU; what cannot be found out is said, not raised.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from nvrar import gpu, tables
from nvrar._version import __version__
from nvrar.cost import Machine, time_us
from nvrar.errors import NvrarError
from nvrar.gpu.disk_cache import cache_folder
from nvrar.host import DTYPES, OPS, type_name
from nvrar.launch import seat
from nvrar.record import checkout, host, software, variables
from nvrar.table import Table
from nvrar.topology import Topology, sighting
from nvrar.tune import Chooser

PACKAGES = (
    "nvidia-nccl-cu12", "nvidia-nccl-cu13", "nvidia-nvshmem-cu12", "nvidia-nvshmem-cu13",
    "nvshmem4py-cu12", "nvshmem4py-cu13", "cuda-core", "cuda-bindings",
)  # fmt: skip
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
SIZES = tuple(1 << power for power in range(10, 25, 2))


def collect(environment: Mapping[str, str], topology: Topology, machine: Machine) -> dict[str, Any]:
    """Everything that ``nvrar info`` shows, as JSON can carry it. ``topology`` and ``machine`` are the
    ones to choose plans for; what this process would detect stands beside them."""
    commit, is_dirty = checkout()
    executor = "host" if gpu.why_unavailable(None) else "gpu"
    found = tables.likely(environment, executor, str(topology))
    return {
        "versions": {
            "nvrar": __version__,
            "git_commit": commit,
            "git_dirty": is_dirty,
            **software(),
            **{name: _version(name) for name in PACKAGES},
        },
        "host": host(),
        "gpus": gpus(),
        "environment": variables(environment),
        "topology": detected(environment),
        "interfaces": interfaces(environment),
        "executors": executors(),
        "tuning_table": None if found is None else str(found.path),
        "choices": choices(topology, machine, None if found is None else found.table),
    }


def detected(environment: Mapping[str, str]) -> dict[str, str | None]:
    """What this process alone can say of the topology: who started it, which source tells the nodes
    apart, and on which node it is. The other ranks have their say when the group is made."""
    seen = sighting(environment)
    source = next(iter(seen))  # in the order of trust
    value = seen[source]
    if source == "NVRAR_RANKS_PER_NODE":
        meaning = f"nodes of {value} ranks each, whatever the hosts"
    elif source == "host name":
        meaning = f"ranks that see the host {value.partition('/')[0]} and its boot share a node"
    else:
        meaning = f"this process is on node {value}"
    try:
        place = seat(environment)
        started_by = (
            "no launcher"
            if place is None
            else f"{place.launcher}, rank {place.rank} of {place.world_size}"
        )
    except NvrarError as error:
        started_by = str(error)
    return {"started_by": started_by, "source": source, "value": value, "meaning": meaning}


def environment_topology(environment: Mapping[str, str]) -> Topology | None:
    """The topology that a launcher's variables amount to, if every node is like this one; else None."""
    place = seat(environment)
    if place is None:
        return None
    for name in ("NVRAR_RANKS_PER_NODE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE"):
        text = environment.get(name, "")
        if text.isdigit() and int(text) and place.world_size % int(text) == 0:
            return Topology(place.world_size // int(text), int(text))
    return None


def gpus() -> list[dict[str, Any]]:
    """The GPUs that torch sees."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "index": index,
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "compute_capability": f"{properties.major}.{properties.minor}",
                "peers": [
                    other
                    for other in range(torch.cuda.device_count())
                    if other != index and torch.cuda.can_device_access_peer(index, other)
                ],
                "nvlinks": _nvlinks(index),
            }
        )
    return found


def interfaces(environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """Network interfaces with an IPv4 address, and which of them gloo would take."""
    wanted = [n for n in environment.get("GLOO_SOCKET_IFNAME", "").split(",") if n]
    found = [{"name": name, "address": _address(name)} for _, name in socket.if_nameindex()]
    usable = [interface for interface in found if interface["address"]]
    try:
        own = socket.gethostbyname(socket.gethostname())
    except OSError:  # a name that does not resolve: gloo then takes the loopback
        own = "127.0.0.1"
    return [
        {
            **interface,
            "used_by_gloo": interface["name"] in wanted if wanted else interface["address"] == own,
        }
        for interface in usable
    ]


def executors() -> list[dict[str, Any]]:
    """What can carry out a plan here, and what is missing for what cannot."""
    types = ", ".join(sorted(type_name(t) for t in DTYPES))
    missing = gpu.why_unavailable(None)
    return [
        {
            "name": "host",
            "available": True,
            "about": f"point-to-point messages of the process group (gloo); {types}; {', '.join(OPS)}",
            "missing": [],
        },
        {
            "name": "gpu",
            "available": not missing,
            "about": "one fused kernel over NVSHMEM; float32, float16, bfloat16, int32; sum, max; compiled "
            f"kernels are kept in {cache_folder()}",
            "missing": [f"this machine {missing}; CUDA tensors go to torch.distributed"]
            if missing
            else [],
        },
    ]


def choices(topology: Topology, machine: Machine, table: Table | None) -> list[dict[str, Any]]:
    """What ``plan="auto"`` would run for each of :data:`SIZES`, in bfloat16; measured times where ``table``
    has that size."""
    chooser = Chooser(topology, machine, tables=() if table is None else (table,))
    rows = []
    for num_bytes in SIZES:
        link = "" if table is None else table.key.link
        choice = chooser.choose(num_bytes, "bfloat16", link)
        predicted_us = time_us(choice.plan, topology, num_bytes, machine)
        entry = None if table is None else table.entry_at(num_bytes)
        measured_us = None
        if entry is not None:
            ours_us = None if choice.measured is None else choice.measured.time_us
            measured_us = entry.torch_us if choice.by_torch else ours_us
        rows.append(
            {
                "num_bytes": num_bytes,
                "plan": "torch" if choice.by_torch else str(choice.plan),
                "predicted_us": None if choice.by_torch else round(predicted_us, 2),
                "measured_us": measured_us,
            }
        )
    return rows


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _address(interface: str) -> str | None:
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            return socket.inet_ntoa(fcntl.ioctl(sock.fileno(), _SIOCGIFADDR, request)[20:24])
        except OSError:  # it has none
            return None


def _nvlinks(index: int) -> list[int] | None:
    """How many NVLinks lead from GPU ``index`` to each GPU; None where torch cannot tell."""
    try:
        from torch._C._distributed_c10d import _detect_dma_connectivity  # type: ignore[attr-defined]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            matrix = _detect_dma_connectivity(torch._C._autograd.DeviceType.CUDA, "nvlink").matrix
        return list(matrix[index])
    except (ImportError, AttributeError, RuntimeError, IndexError):
        return None
