"""What all tests share: helpers next to this file can be imported by name."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
# What somebody tuned on this machine must not decide what the tests see.
os.environ["NVRAR_TUNE_TABLE"] = "off"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means. With GPUs one: kernels that wait for each other must not share theirs."""
    import torch  # not before the tests have said how many threads it gets

    return 1 if torch.cuda.is_available() else min(os.cpu_count() or 1, 8)
