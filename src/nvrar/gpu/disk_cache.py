# SPDX-License-Identifier: Apache-2.0
"""Machine code kept on disk between processes, by a key that says all it depends on."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

log = logging.getLogger("nvrar")

_DIGEST_BYTES = 32  # an entry is the digest of what follows, then the code


def kept(key: str, make: Callable[[], bytes]) -> bytes:
    """What was kept under ``key``; else what ``make`` gives, which is kept."""
    path = cache_folder() / f"{key}.cubin"
    found = _read(path)
    if found is None:
        found = make()
        _publish(path, found)
    return found


def cache_folder() -> Path:
    """``NVRAR_CACHE_DIR``, else ``nvrar`` in the user's cache folder."""
    chosen = os.environ.get("NVRAR_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "nvrar"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # no HOME, and a user that the system has no entry for
        return Path("/nonexistent")


def _read(path: Path) -> bytes | None:
    try:
        entry = path.read_bytes()
    except OSError:
        return None
    digest, code = entry[:_DIGEST_BYTES], entry[_DIGEST_BYTES:]
    if hashlib.sha256(code).digest() == digest:
        return code
    log.warning(
        "compile cache entry %s is corrupt and is made anew; if this comes again, delete %s or set "
        "NVRAR_CACHE_DIR to a folder on a local disk",
        path, path.parent,
    )  # fmt: skip
    return None


def _publish(path: Path, code: bytes) -> None:
    """All or nothing, whoever else writes the same entry: the last rename wins, and all are equal."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        _say_once(path.parent, error.strerror)


@cache
def _say_once(folder: Path, reason: str) -> None:
    log.warning(
        "compiled kernels cannot be kept in %s (%s): every process compiles its own; set "
        "NVRAR_CACHE_DIR to a folder that can be written",
        folder, reason,
    )  # fmt: skip
