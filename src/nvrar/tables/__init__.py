# SPDX-License-Identifier: Apache-2.0
"""Where measured tables are kept, and which of them hold here.

``NVRAR_TUNE_TABLE``, a table or a folder of them, goes before all; ``off`` means none. Else the user's cache,
where ``nvrar tune`` writes, and then this folder: what we measured and ship. Only rank 0 of a communicator
looks; the others are given what it found.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from nvrar.gpu.disk_cache import cache_folder
from nvrar.hardware import device_name
from nvrar.table import Table, TableError

log = logging.getLogger("nvrar")

VARIABLE = "NVRAR_TUNE_TABLE"
OFF = "off"
SHIPPED = Path(__file__).parent


@dataclass(frozen=True)
class Found:
    """A table and the file that it is from."""

    table: Table
    path: Path


def user_folder() -> Path:
    """Where ``nvrar tune`` keeps its tables: in the user's cache."""
    return cache_folder() / "tables"


def file_name(table: Table) -> str:
    """Equal for tables of equal keys."""
    key = table.key
    words = [key.executor, *key.devices, key.topology, key.link, key.dtype]
    return "-".join(re.sub(r"[^a-z0-9]+", "-", w.lower()).strip("-") for w in words) + ".json"


def holding(
    environment: Mapping[str, str], executor: str, devices: tuple[str, ...], topology: str
) -> list[Found]:
    """The tables that hold for these ranks: at most one for each link and type, the first of the places'.

    What does not read is left out with a warning that names the file.
    """
    found: dict[tuple[str, str], Found] = {}
    wanted = (executor, devices, topology)
    for path, is_asked_for in _files(environment):
        table = _read(path)
        if table is None:
            continue
        key = table.key
        if (key.executor, key.devices, key.topology) == wanted:
            found.setdefault((key.link, key.dtype), Found(table, path))
        elif is_asked_for:
            log.warning(
                "%s=%s holds for %s, and here are %s ranks of %s (%s executor): plans are chosen by the cost "
                "model; run nvrar tune here, or unset %s",
                VARIABLE, path, key, topology, ", ".join(devices), executor, VARIABLE,
            )  # fmt: skip
    return list(found.values())


def likely(environment: Mapping[str, str], executor: str, topology: str) -> Found | None:
    """The table that bfloat16 would be reduced by on ranks like this one, as far as it can tell alone: how
    the peers are linked is seen only together with them."""
    forced = executor == "gpu" and environment.get("NVRAR_TRANSPORT") == "put"
    found = holding(environment, executor, (device_name(executor),), topology)
    fitting = (f for f in found if f.table.key.dtype == "bfloat16")
    return next((f for f in fitting if (f.table.key.link == "put") == forced), None)


def write(table: Table, path: Path) -> None:
    """All or nothing; makes the folder. Raises OSError where it cannot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(table.dumps())
        os.chmod(
            temporary, 0o644
        )  # mkstemp's are the user's alone, and a cluster may share a folder
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def _files(environment: Mapping[str, str]) -> Iterator[tuple[Path, bool]]:
    """In order of precedence, and whether the user asked for that very file."""
    given = environment.get(VARIABLE, "")
    if given == OFF:
        return
    if given:
        if os.path.isdir(given):
            yield from ((file, False) for file in _files_in(Path(given)))
        else:
            yield Path(given), True
        return
    for folder in (user_folder(), SHIPPED):
        yield from ((file, False) for file in _files_in(folder))


def _files_in(folder: Path) -> list[Path]:
    """None where it may not be read: a container's user may have the home of another."""
    try:
        return sorted(folder / name for name in os.listdir(folder) if name.endswith(".json"))
    except FileNotFoundError:
        return []
    except OSError as error:
        log.warning("tuning tables in %s are left out: %s", folder, error.strerror)
        return []


def _read(path: Path) -> Table | None:
    try:
        return Table.loads(path.read_text())
    except FileNotFoundError:
        log.warning("there is no tuning table %s; correct %s, or unset it", path, VARIABLE)
        return None
    except (OSError, UnicodeDecodeError, TableError) as error:
        log.warning(
            "the tuning table %s is left out: %s; delete it, or make it anew with nvrar tune (%s=%s ignores "
            "all tables)",
            path, error, VARIABLE, OFF,
        )  # fmt: skip
        return None
