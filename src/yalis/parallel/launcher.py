# SPDX-License-Identifier: Apache-2.0
"""Whether a launcher started this process as one of many, and as which. Pure: reads a mapping."""

from __future__ import annotations

from collections.abc import Mapping

from nvrar import NvrarError
from nvrar.launch import Seat, seat
from yalis.errors import ConfigError


def detect(env: Mapping[str, str]) -> Seat | None:
    """The place that torchrun or srun gave this process; None when it stands alone.

    A group of one counts as standing alone. Raises ConfigError when the variables contradict themselves.
    """
    try:
        place = seat(env)
    except NvrarError as error:
        raise ConfigError(str(error)) from error
    return place if place is not None and place.world_size > 1 else None
