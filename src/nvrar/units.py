# SPDX-License-Identifier: Apache-2.0
"""Sizes and times as people write them: ``256K`` in, ``256 KiB`` and ``1.2 ms`` out. Pure."""

from __future__ import annotations

import re

from nvrar.errors import ArgumentError

_SIZE = re.compile(r"(\d+)\s*(?:([KMG])(?:i?B)?|B)?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3}


def parse_size(text: str) -> int:
    """Bytes; K, M and G are powers of 1024, as in nccl-tests (``256K``, ``2M``, ``4KiB``, ``1000``).

    Raises:
        ArgumentError: not a size, or not above 0.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or int(match[1]) == 0:
        raise ArgumentError(
            f"size {text!r} is not a whole number of bytes above 0, with K, M or G for powers of 1024, "
            "such as 4096, 256K or 2M"
        )
    return int(match[1]) << 10 * _POWERS[(match[2] or "").upper()]


def format_size(num_bytes: float) -> str:
    """``256 KiB``: the largest unit that leaves at least 1, with up to three digits."""
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{_three_digits(value)} {unit}"


def format_time(time_us: float) -> str:
    """``850 us``, ``1.2 ms``, ``3.4 s``."""
    if time_us < 1e3:
        return f"{_three_digits(time_us)} us"
    return f"{_three_digits(time_us / 1e3)} ms" if time_us < 1e6 else f"{time_us / 1e6:.3g} s"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
