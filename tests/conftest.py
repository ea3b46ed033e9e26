"""What all tests share: helpers next to this file can be imported by name."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
# What somebody tuned on this machine must not decide what the tests see.
os.environ["NVRAR_TUNE_TABLE"] = "off"


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Kernels that wait for each other must not have to share a GPU with those of another test.
    for item in items:
        if item.get_closest_marker("gpu") or item.get_closest_marker("dist"):
            item.add_marker(pytest.mark.xdist_group("gpus"))
