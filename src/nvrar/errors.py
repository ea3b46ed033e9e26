# SPDX-License-Identifier: Apache-2.0
"""What can go wrong, by name. Every message gives the value, the bound and the remedy."""

from __future__ import annotations


class NvrarError(RuntimeError):
    """Base of every error that nvrar raises on purpose."""


class TopologyError(NvrarError, ValueError):
    """The ranks cannot be laid out as asked."""


class PlanError(NvrarError, ValueError):
    """A plan word is malformed, or does not fit the number of ranks."""


class ArgumentError(NvrarError, ValueError):
    """A call or a constructor got a value it cannot work with."""


class ClosedError(NvrarError):
    """The communicator was closed, or its process group was destroyed."""


class DisagreementError(NvrarError):
    """Ranks called the same collective with different arguments, or one of them refused its own."""


class GpuUnavailable(NvrarError):
    """What the GPU executor needs is not here, on some rank; calls are left to torch instead."""


class WrongResultError(NvrarError):
    """A result that is not the reduction of the inputs, or not the same on all ranks."""


class PeerTimeout(NvrarError, TimeoutError):
    """A peer died, came too late, or never came. The communicator is broken from here on.

    Attributes:
        rank: group rank that raises.
        peers: group ranks that are to blame, as far as this rank can tell.
        epoch: the call in which it happened (1 is the communicator's first; 0 is its creation).
        level: index of the plan's level that was waiting, or None outside a call.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int,
        peers: tuple[int, ...],
        epoch: int = 0,
        level: int | None = None,
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.peers = peers
        self.epoch = epoch
        self.level = level
