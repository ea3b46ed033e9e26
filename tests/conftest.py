"""What all tests share: helpers next to this file can be imported by name."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
# What somebody tuned on this machine must not decide what the tests see.
os.environ["NVRAR_TUNE_TABLE"] = "off"

with suppress(ImportError):  # those of GPUs do without
    from hypothesis import settings

    settings.register_profile("busy machine", deadline=None)
    settings.load_profile("busy machine")


def is_for_gpus(config: pytest.Config) -> bool:
    """Whether only tests of GPUs were asked for. They run apart: all others want CPUs, whatever there is."""
    paths = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    of_gpus = (HERE / "gpu", HERE / "dist")
    return bool(paths) and all(any(p.is_relative_to(f) for f in of_gpus) for p in paths)


def pytest_configure(config: pytest.Config) -> None:
    # Jobs in a script's background ignore SIGINT, and so would the commands that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not is_for_gpus(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """What `-n auto` means. On GPUs one: kernels that wait for each other must not share theirs."""
    return 1 if is_for_gpus(config) else min(os.cpu_count() or 1, 8)
