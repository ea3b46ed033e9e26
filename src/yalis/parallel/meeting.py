# SPDX-License-Identifier: Apache-2.0
"""Ranks wait for each other through their group's store, however slow one is, and learn if one failed.

Collectives have a short patience and end without a reason. This is for phases in which ranks do different
work, such as reading their weights from disks of different speed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from nvrar.meeting import store_of
from yalis.errors import WorkerError

# Bounds a rank that hangs; one that dies is its launcher's business, or its driver's.
_PATIENCE_S = 3600.0
_POLL_S = 0.05
_DONE = "done"


@contextmanager
def together(
    group: dist.ProcessGroup, phase: str, patience_s: float = _PATIENCE_S
) -> Iterator[None]:
    """Leave the block when all ranks have come to its end. Collective over `group`.

    A rank on which it raises tells the others, and raises at once; they raise WorkerError, which names it, as
    soon as they have come to the end. So does a rank that has waited for `patience_s`.
    """
    store, rank = store_of(group), group.rank()
    turn = store.add(f"yalis/{phase}/turns/{rank}", 1)  # the n-th here meets the n-th elsewhere
    keys = [f"yalis/{phase}/{turn}/{r}" for r in range(group.size())]
    try:
        yield
    except BaseException as error:
        with suppress(RuntimeError):  # without a store nobody is left to tell
            store.set(keys[rank], f"{type(error).__name__}: {error}")
        raise
    missing = {r: key for r, key in enumerate(keys) if r != rank}
    deadline_s = time.monotonic() + patience_s
    try:
        store.set(keys[rank], _DONE)
        while True:
            for r in [r for r, key in missing.items() if store.check([key])]:
                said = store.get(missing.pop(r)).decode()
                if said != _DONE:
                    raise WorkerError(f"rank {r} failed while {phase}: {said}")
            if not missing:
                return
            if time.monotonic() > deadline_s:
                raise WorkerError(
                    f"rank {rank} waited {patience_s:g} s for ranks {sorted(missing)} to end {phase}; "
                    "see what they are doing there"
                )
            time.sleep(_POLL_S)
    except RuntimeError as error:
        if isinstance(error, WorkerError):
            raise
        raise WorkerError(
            f"rank {rank} lost the store that the ranks meet in while {phase}; look first at what the rank "
            f"that hosts it said, usually 0 ({str(error).splitlines()[0]})"
        ) from None
