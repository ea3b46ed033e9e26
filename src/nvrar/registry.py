# SPDX-License-Identifier: Apache-2.0
"""The communicators that live in this process, by name: operators of torch.compile are given strings."""

from __future__ import annotations

import atexit
import os
import weakref
from typing import TYPE_CHECKING

from nvrar.errors import ClosedError
from nvrar.meeting import is_destroyed

if TYPE_CHECKING:
    from nvrar.communicator import Communicator

# It keeps none of them alive.
by_name: weakref.WeakValueDictionary[str, Communicator] = weakref.WeakValueDictionary()


def find(name: str) -> Communicator:
    """Raises ClosedError where it is gone."""
    found = by_name.get(name)
    if found is None:
        raise ClosedError(
            f"no communicator {name!r} lives in this process: it was deleted after the graph was "
            "compiled; keep it alive as long as the compiled function"
        )
    return found


def end_in_child() -> None:
    """A call would wait for ever: the threads of gloo, whom its timeouts need, are not in a forked child."""
    for communicator in by_name.values():
        communicator.end_in_child()


os.register_at_fork(after_in_child=end_in_child)


@atexit.register
def let_go_of_groups() -> None:
    """Frees destroyed process groups while Python still runs. gloo's threads need it to free what they
    hold, and end the process ("terminate called without an active exception") where it is gone."""
    for communicator in by_name.values():
        if is_destroyed(communicator.group):
            communicator.let_go_of_group()
