# SPDX-License-Identifier: Apache-2.0
"""What joins this GPU to a peer's: NVLink keeps 128-byte lines whole, PCIe may tear them."""

from __future__ import annotations

import ctypes
import logging
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from nvrar.topology import boot_id

log = logging.getLogger("nvrar")

_NVML_P2P_CAPS_INDEX_NVLINK = 2
_NVML_P2P_STATUS_OK = 0


@dataclass(frozen=True)
class Device:
    """A GPU, by names that hold in every process: those that CUDA_VISIBLE_DEVICES hides are found too."""

    host: str  # which its containers share, whatever they call it
    bus: str  # of PCI, as NVML writes it

    @classmethod
    def current(cls) -> Device:
        from cuda.bindings import runtime

        status, bus = runtime.cudaDeviceGetPCIBusId(32, torch.cuda.current_device())
        name = bytes(bus).split(b"\0")[0].decode() if not status else ""
        return cls(boot_id() or socket.gethostname(), name)

    @classmethod
    def from_json(cls, value: dict[str, str]) -> Device:
        return cls(**value)

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    def keeps_lines_to(self, peers: Sequence[Device]) -> bool:
        """Whether stores of a line arrive whole at all ``peers``, whose memory must be mapped here."""
        # Memory of another host is mapped by nothing but a multi-node NVLink domain.
        here = [p for p in peers if p.host == self.host and p.bus != self.bus]
        if not here:
            return True
        try:
            return _joined_by_nvlink(self.bus, [p.bus for p in here])
        except OSError as error:
            log.warning(
                "nvrar cannot ask NVML about NVLink (%s) and keeps to its slower packets (LL) for large "
                "messages; in a container, allow the driver capability 'utility'",
                error,
            )
            return False


def _joined_by_nvlink(bus: str, peers: Sequence[str]) -> bool:
    nvml = ctypes.CDLL("libnvidia-ml.so.1")
    _call(nvml, "nvmlInit_v2")
    try:
        return all(_nvlink_status(nvml, bus, peer) == _NVML_P2P_STATUS_OK for peer in peers)
    finally:
        nvml.nvmlShutdown()


def _nvlink_status(nvml: ctypes.CDLL, bus: str, peer: str) -> int:
    handles = []
    for name in (bus, peer):
        handle = ctypes.c_void_p()
        _call(nvml, "nvmlDeviceGetHandleByPciBusId_v2", name.encode(), ctypes.byref(handle))
        handles.append(handle)
    found = ctypes.c_int(-1)
    caps = _NVML_P2P_CAPS_INDEX_NVLINK
    _call(nvml, "nvmlDeviceGetP2PStatus", *handles, caps, ctypes.byref(found))
    return found.value


def _call(nvml: ctypes.CDLL, name: str, *arguments: Any) -> None:
    status = getattr(nvml, name)(*arguments)
    if status:
        raise OSError(f"{name} returned {status}")
