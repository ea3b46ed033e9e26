"""More ranks than GPUs: they share them, so that one GPU does for what ranks must do right together.

Python imports this first in every process that has this folder on PYTHONPATH. SHARED_GPU_RANKS says how
many GPUs there seem to be. To NCCL, which refuses two ranks on one GPU of a host, each rank is a host: it
goes by sockets. Times mean nothing.

Ranks' kernels run in turns of milliseconds. With CUDA's MPS (`nvidia-cuda-mps-control -d`) they run at once,
which two ranks of nvrar can: those of more, or of an engine, may keep each other from a place on the GPU.
"""

import os
import sys

os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
os.environ |= {"NCCL_HOSTID": os.environ.get("RANK", ""), "NCCL_SOCKET_IFNAME": "lo"}

import torch

import yalis.device

_count, _set_device = torch.cuda.device_count, torch.cuda.set_device
_pick_device = yalis.device.pick_device


def device_count():
    is_torch = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] == "torch"
    return _count() if is_torch else int(os.environ["SHARED_GPU_RANKS"])


def set_device(device):
    index = device if isinstance(device, int) else torch.device(device).index
    _set_device((index or 0) % _count())


def pick_device(name, local_rank=0):
    if yalis.device.device_type(name) == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", local_rank % _count())


torch.cuda.device_count, torch.cuda.set_device = device_count, set_device
for _name, _module in list(sys.modules.items()):  # who imported it by name has it already
    if _name.startswith("yalis.") and vars(_module).get("pick_device") is _pick_device:
        _module.pick_device = pick_device
