# SPDX-License-Identifier: Apache-2.0
"""A measured table: for each size what was tried, how long it took, and how long torch's own took.

Pure. A table records measurements; what follows from them for a message is :meth:`Table.best`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nvrar.errors import NvrarError, PlanError
from nvrar.gpu.layout import FORMATS
from nvrar.plan import Plan
from nvrar.topology import Topology

FORMAT = 1


def bucket(num_bytes: int) -> int:
    """Sizes are told apart by this: their next power of two."""
    return 1 << max(num_bytes - 1, 0).bit_length()


class TableError(NvrarError, ValueError):
    """Text that is no table of measurements; the message says where it goes wrong."""


@dataclass(frozen=True, slots=True)
class Key:
    """What a table was measured on, and so what it holds for. All of it must match.

    Attributes:
        executor: ``"gpu"`` or ``"host"``.
        devices: names of what the ranks compute on, each once, sorted.
        topology: such as ``"2x4"``.
        link: how packets reach the peers: ``"nvlink"``, ``"peer"`` (mapped, but not by NVLink), ``"network"``
            (not all mapped) or ``"put"`` (forced); for the host executor the backend, such as ``"gloo"``.
        dtype: what is sent, such as ``"bfloat16"``.
    """

    executor: str
    devices: tuple[str, ...]
    topology: str
    link: str
    dtype: str

    def __str__(self) -> str:
        return (
            f"{self.dtype} on {self.topology} ranks of {', '.join(self.devices)} "
            f"({self.executor} executor, {self.link})"
        )


@dataclass(frozen=True, slots=True)
class Trial:
    """One way to reduce a size, and its time. ``packets``, ``blocks`` and ``threads`` are the GPU's."""

    plan: Plan
    time_us: float
    packets: str | None = None
    blocks: int | None = None
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """What was measured at one size. ``trials`` are in order of time."""

    num_bytes: int
    torch_us: float
    trials: tuple[Trial, ...]

    def best(self, radices: tuple[int, ...] | None = None) -> Trial | None:
        """The fastest; with ``radices``, of the plans that have these."""
        fitting = (t for t in self.trials if radices is None or t.plan.radices == radices)
        return next(fitting, None)

    @property
    def is_for_torch(self) -> bool:
        """Whether torch's own all-reduce was faster than all that was tried."""
        return not self.trials or self.torch_us < self.trials[0].time_us


@dataclass(frozen=True, slots=True)
class Table:
    """``entries`` by size. ``provenance`` says with what it was made; ``left_out`` what failed, and why."""

    key: Key
    entries: tuple[Entry, ...]
    provenance: Mapping[str, Any]
    left_out: Mapping[str, str]

    def entry_for(self, num_bytes: int) -> Entry:
        """Of the size that has the same next power of two; else of the next larger; beyond all, of the
        largest."""
        power = bucket(num_bytes)
        return next((e for e in self.entries if bucket(e.num_bytes) >= power), self.entries[-1])

    def entry_at(self, num_bytes: int) -> Entry | None:
        """Of the size that has the same next power of two."""
        entry = self.entry_for(num_bytes)
        return entry if bucket(entry.num_bytes) == bucket(num_bytes) else None

    def dumps(self) -> str:
        """As :meth:`loads` reads it: JSON, a line a trial."""
        head = {
            "format": FORMAT,
            "key": asdict(self.key),
            "provenance": dict(self.provenance),
            "left_out": dict(self.left_out),
        }
        lines = json.dumps(head, indent=1)[:-2]  # without the closing brace
        return f'{lines},\n "sizes": [\n' + ",\n".join(map(_entry_text, self.entries)) + "\n ]\n}\n"

    @classmethod
    def loads(cls, text: str) -> Table:
        """Raises TableError where ``text`` is not what :meth:`dumps` writes."""
        try:
            read = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise TableError(f"it is not JSON: {error}") from error
        if not isinstance(read, dict) or read.get("format") != FORMAT:
            found = read.get("format") if isinstance(read, dict) else None
            raise TableError(f"its format is {found!r}, and this version reads {FORMAT}")
        try:
            return _table(read)
        except TableError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TableError(
                f"it does not read as a table: {type(error).__name__} {error}"
            ) from error


def _table(read: Mapping[str, Any]) -> Table:
    fields = dict(read["key"])
    devices = fields.pop("devices")
    if not all(isinstance(v, str) for v in (*fields.values(), *devices)):
        raise TableError(f"its key {read['key']!r} is not made of words")
    key = Key(devices=tuple(devices), **fields)
    num_ranks = Topology.parse(key.topology).world_size
    entries = tuple(_entry(entry, num_ranks) for entry in read["sizes"])
    sizes = [entry.num_bytes for entry in entries]
    if not sizes or sizes != sorted(set(sizes)) or sizes[0] < 1:
        raise TableError(f"its sizes are {sizes}; they must be one or more, each once, ascending")
    return Table(key, entries, dict(read["provenance"]), dict(read["left_out"]))


def _entry(read: Mapping[str, Any], num_ranks: int) -> Entry:
    trials = [_trial(trial, num_ranks) for trial in read["trials"]]
    trials.sort(key=lambda trial: trial.time_us)
    num_bytes = read["num_bytes"]
    if not isinstance(num_bytes, int):
        raise TableError(f"num_bytes is {num_bytes!r}, which is no whole number")
    return Entry(num_bytes, _time(read["torch_us"]), tuple(trials))


def _trial(read: Mapping[str, Any], num_ranks: int) -> Trial:
    plan = Plan.parse(read["plan"])
    try:
        plan.check(num_ranks)
    except PlanError as error:
        raise TableError(str(error)) from error
    packets, blocks, threads = (read.get(name) for name in ("packets", "blocks", "threads"))
    if packets is not None:
        if packets not in FORMATS:
            raise TableError(f"packets are {packets!r}; they are one of {', '.join(FORMATS)}")
        if not (_is_count(blocks) and _is_count(threads)) or (threads or 0) % 32:
            raise TableError(f"a launch of {blocks!r} blocks of {threads!r} threads is none")
    return Trial(plan, _time(read["us"]), packets, blocks, threads)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 1


def _time(value: Any) -> float:
    time_us = float(value)
    if not 0 < time_us < math.inf:
        raise TableError(f"a time of {value!r} us is none")
    return time_us


def _entry_text(entry: Entry) -> str:
    head = (
        f'  {{"num_bytes": {entry.num_bytes}, "torch_us": {round(entry.torch_us, 3)}, "trials": ['
    )
    rows: Sequence[dict[str, Any]] = [
        {
            "plan": str(trial.plan),
            **({} if trial.packets is None else {"packets": trial.packets}),
            **({} if trial.blocks is None else {"blocks": trial.blocks, "threads": trial.threads}),
            "us": round(trial.time_us, 3),
        }
        for trial in entry.trials
    ]
    return head + ",".join("\n   " + json.dumps(row) for row in rows) + "]}"
