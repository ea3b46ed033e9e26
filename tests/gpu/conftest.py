"""Compiles what the tests of the virtual cluster need on all cores, before the first of them."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from nvrar.gpu import jit, kernel
from nvrar.gpu.layout import FORMATS
from nvrar.plan import PLAN_NAMES, Plan
from nvrar.topology import Topology


def compile_one(spec: jit.KernelSpec) -> None:
    jit.cubin(spec)


def specs_of(topologies: set[str], arch: str) -> list[jit.KernelSpec]:
    plans = {Plan.named(name, Topology.parse(t)) for t in topologies for name in PLAN_NAMES}
    return [
        jit.KernelSpec(
            plan,
            packets,
            torch.bfloat16,
            "sum",
            arch,
            virtual=True,
            whole=whole,
            args_bytes=ctypes.sizeof(kernel.args_type_of(plan)),
        )
        for plan in plans
        for packets in FORMATS.values()
        for whole in (True, False)
    ]


@pytest.fixture(scope="session", autouse=True)
def compiled(request: pytest.FixtureRequest) -> None:
    wanted = {
        item.callspec.params.get("text")
        for item in request.session.items
        if hasattr(item, "callspec")
    }
    if not torch.cuda.is_available() or len(wanted - {None}) < 4:
        return
    properties = torch.cuda.get_device_properties(0)
    specs = specs_of(wanted - {None}, f"sm_{properties.major}{properties.minor}")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(32, os.cpu_count() or 1), mp_context=context) as pool:
        list(pool.map(compile_one, specs, chunksize=4))
