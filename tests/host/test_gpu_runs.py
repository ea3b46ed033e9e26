"""Which tests see the GPUs of a machine."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.host

TESTS = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["tests/gpu", "tests/dist"], True),
        (["tests/gpu/test_virtual.py::test_x[a::b]"], True),
        (["tests/gpu", "tests/tiny"], False),
        (["tests/gpus.py"], False),
        (["tests"], False),
        ([], False),
    ],
)
def test_gpus_are_for_runs_of_their_tests_alone(
    arguments: list[str], wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (link := tmp_path / "link").symlink_to(TESTS.parent)
    spec = importlib.util.spec_from_file_location(
        "conftest_by_link", link / "tests" / "conftest.py"
    )
    assert spec and spec.loader
    spec.loader.exec_module(conftest := importlib.util.module_from_spec(spec))
    for root in (link, TESTS.parent):
        config = SimpleNamespace(args=[f"{root}/{argument}" for argument in arguments])
        assert conftest.is_for_gpus(config) == wanted
    monkeypatch.chdir(TESTS.parent)
    assert conftest.is_for_gpus(SimpleNamespace(args=arguments)) == wanted
