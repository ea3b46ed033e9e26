"""Imports run one way, scalebench -> yalis -> nvrar, and importing does nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"
FORBIDDEN = {
    "nvrar": {"yalis", "scalebench", "transformers"},
    "yalis": {"scalebench", "transformers"},
    "scalebench": {"transformers"},
}


def imported(source: str) -> set[str]:
    """The top-level packages that a module names in any import, wherever it stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").partition(".")[0])
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", getattr(node.func, "attr", ""))
            in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.add(str(node.args[0].value).partition(".")[0])
    return found


def test_the_arrows() -> None:
    modules = [path for package in FORBIDDEN for path in (SRC / package).rglob("*.py")]
    assert {path.relative_to(SRC).parts[0] for path in modules} >= {"nvrar", "yalis"}
    for path in modules:
        package = path.relative_to(SRC).parts[0]
        wrong = imported(path.read_text()) & FORBIDDEN[package]
        assert not wrong, f"{path.relative_to(SRC)} imports {wrong}"


@pytest.mark.parametrize(
    "source",
    [
        "import yalis.llm",
        "def f():\n    from yalis import LLM",
        "import importlib\nimportlib.import_module('yalis.core')",
        "import os, yalis as y",
    ],
)
def test_an_arrow_is_seen_wherever_it_stands(source: str) -> None:
    assert "yalis" in imported(source)


def test_the_pure_modules_import_without_torch() -> None:
    """Plans can be read and costed where torch cannot run; each file is loaded on its own."""
    for module in ("topology", "plan", "cost", "table", "tune", "errors"):
        path = SRC / "nvrar" / f"{module}.py"
        outside = [
            name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in imported(ast.unparse(node))
        ]
        assert "torch" not in outside, f"{module}.py imports torch"


PROBE = """
import sys, threading, os
import torch, torch.distributed as dist
loaded = set(sys.modules)
before = (set(threading.enumerate()), torch.get_num_threads(), torch.get_default_dtype(), dict(os.environ))
import nvrar
after = (set(threading.enumerate()), torch.get_num_threads(), torch.get_default_dtype(), dict(os.environ))
assert before == after, (before, after)
assert not torch.cuda.is_initialized()
assert not dist.is_initialized()
heavy = {"matplotlib", "transformers", "tokenizers", "rich", "triton", "cuda"} & (set(sys.modules) - loaded)
assert not heavy, heavy
for name in nvrar.__all__:
    getattr(nvrar, name)
"""


def test_importing_nvrar_has_no_side_effects() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""
