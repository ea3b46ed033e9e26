# SPDX-License-Identifier: Apache-2.0
"""Whether a launcher started this process as one of many, and as which. Pure: reads a mapping."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from yalis.errors import ConfigError

_FIRST_SLURM_PORT = 15000
_NUM_SLURM_PORTS = 20000


@dataclass(frozen=True)
class Place:
    """One process among those of a launcher, and where they meet."""

    rank: int
    world_size: int
    local_rank: int
    host: str
    port: int


def detect(env: Mapping[str, str]) -> Place | None:
    """The place that torchrun or srun gave this process; None when it stands alone.

    A group of one counts as standing alone. Raises ConfigError when the variables contradict themselves.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        place = Place(
            rank=_number(env, "RANK"),
            world_size=_number(env, "WORLD_SIZE"),
            local_rank=_number(env, "LOCAL_RANK", "0"),
            host=env.get("MASTER_ADDR", "127.0.0.1"),
            port=_number(env, "MASTER_PORT", "29500"),
        )
    elif "SLURM_PROCID" in env and _is_in_srun_step(env):
        total = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
        hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST") or "127.0.0.1"
        # All tasks of a step must find the same port without talking; two steps should not collide.
        shift = _number(env, "SLURM_JOB_ID", "0") * 7 + _number(env, "SLURM_STEP_ID", "0")
        place = Place(
            rank=_number(env, "SLURM_PROCID"),
            world_size=_number(env, total, "1"),
            local_rank=_number(env, "SLURM_LOCALID", "0"),
            host=env.get("MASTER_ADDR") or first_host(hosts),
            port=_number(env, "MASTER_PORT", str(_FIRST_SLURM_PORT + shift % _NUM_SLURM_PORTS)),
        )
    else:
        return None
    if not 0 <= place.rank < place.world_size:
        raise ConfigError(
            f"the launcher's variables say rank {place.rank} of {place.world_size}; unset RANK and "
            "WORLD_SIZE, or start with torchrun or srun"
        )
    return place if place.world_size > 1 else None


def first_host(node_list: str) -> str:
    """The first name of a Slurm node list: "gpu[007-009,12],login1" gives "gpu007"."""
    match = re.match(r"([^,\[]+)(?:\[([^\]]*)\])?([^,\[]*)", node_list)
    if not match:
        raise ConfigError(f"SLURM_NODELIST is {node_list!r}, which names no host; set MASTER_ADDR")
    head, numbers, tail = match.groups()
    return head + re.split("[-,]", numbers or "")[0] + tail


def _is_in_srun_step(env: Mapping[str, str]) -> bool:
    # A batch script has SLURM_PROCID=0 and SLURM_NTASKS too, but is no task of a step that srun made.
    return any(name in env for name in ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID", "SLURM_STEPID"))


def _number(env: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = env.get(name, default)
    if text is None or not text.strip().isdigit():
        raise ConfigError(f"environment variable {name} is {text!r}; it must be a number")
    return int(text)
