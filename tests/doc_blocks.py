"""The documentation's blocks of code: what they say, and a shell that runs them as a reader would.

A block of `sh` runs on any machine, after those before it on the page and in the same folder. A second
word behind `sh` says what it needs that is not everywhere, and then it is only read. A block of `text` behind
one that runs is what that prints: lines in this order, among others, with `...` for what differs.
"""

from __future__ import annotations

import logging
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed.run

import nvrar.cli
import yalis.cli

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
README = ROOT / "README.md"
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDS = ("install", "gpu", "nodes", "root")


def _python(words: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        runpy.run_path(words[0], run_name="__main__")


MAINS: dict[str, Callable[[list[str]], int | None]] = {
    "nvrar": nvrar.cli.main,
    "yalis": yalis.cli.main,
    "torchrun": torch.distributed.run.main,
    "python": _python,
}
_MODULES = {
    "nvrar": ["-m", "nvrar"],
    "yalis": ["-m", "yalis"],
    "torchrun": ["-m", "torch.distributed.run"],
    "python": [],
}


@dataclass(frozen=True)
class Block:
    language: str
    needs: str
    text: str

    @property
    def lines(self) -> list[str]:
        """The commands of a block of `sh`."""
        found = (line.strip() for line in self.text.replace("\\\n", " ").splitlines())
        return [line for line in found if line and not line.startswith("#")]

    @property
    def file_name(self) -> str:
        """Of a block of `python` that a reader saves under the name in its first line; else empty."""
        match = re.match(r"# (\w+\.py)\b", self.text)
        return match[1] if match else ""


def blocks(page: Path) -> list[Block]:
    found = re.finditer(r"^```(\w+)(?: (\w+))?\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [Block(match[1], match[2] or "", match[3]) for match in found]


def split_command(line: str) -> tuple[dict[str, str], list[str]]:
    """The variables in front of a command, and its words."""
    words = shlex.split(line, comments=True)
    count = next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words))
    return dict(word.split("=", 1) for word in words[:count]), words[count:]


def missing_lines(said: str, wanted: str) -> str:
    """The first line of `wanted` that does not come in its turn; empty if all do."""
    left = iter(" ".join(line.split()) for line in said.splitlines())
    for line in wanted.splitlines():
        pattern = re.escape(" ".join(line.split())).replace(r"\.\.\.", ".*")
        if not any(re.fullmatch(pattern, other) for other in left):
            return line
    return ""


class Shell:
    """Runs command lines in ``folder``, where the examples lie too, by this interpreter and these sources."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self._folder, self._capture = folder, capture
        programs = folder / "bin"
        programs.mkdir()
        for name, arguments in _MODULES.items():
            path = programs / name
            path.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, *arguments])} "$@"\n')
            path.chmod(0o755)
        (folder / "examples").symlink_to(ROOT / "examples")
        self._environment = {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(SRC),
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PORT": "0",  # of examples/two_nodes.sh: any that is free
        }

    def run(self, line: str) -> str:
        """What the command prints, errors first. It must end well."""
        variables, words = split_command(line)
        with _environment(self._environment | variables), _as_if_alone(self._folder):
            main = MAINS.get(words[0])
            # Ours run in this process: most of a command's time is importing torch.
            code = (
                subprocess.run(words, timeout=100).returncode if main is None else main(words[1:])
            )
        output, errors = self._capture.readouterr()
        assert not code, f"{line}: exit code {code}\n{errors}{output}"
        return errors + output


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


@contextmanager
def _as_if_alone(folder: Path) -> Iterator[None]:
    """For what a command does to its process: pytest's log handlers are out of its way, and its own and its
    signal handlers are gone afterwards."""
    root, back = logging.getLogger(), Path.cwd()
    handlers, level = root.handlers[:], root.level
    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    signals = [signal.getsignal(number) for number in watched]
    root.handlers[:] = []
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(back)
        root.handlers[:] = handlers
        root.setLevel(level)
        for number, handler in zip(watched, signals, strict=True):
            signal.signal(number, handler)


def read_options(words: Sequence[str]) -> None:
    """Exits where a program would refuse its options; runs nothing. For programs that we know."""
    program, *arguments = words
    if program == "nvrar":
        nvrar.cli.parser().parse_args(arguments)
    elif program == "yalis":
        yalis.cli._parser().parse_args(arguments)
    elif program == "torchrun":
        torch.distributed.run.get_args_parser().parse_args(arguments)
    elif "/" in program:  # one of the examples, which takes a command
        assert (ROOT / program).exists(), f"{program} is not there"
        command = [word for word in arguments if word != "--netns"]
        if command:
            read_options(command)
    elif program == "sbatch":
        first = next(i for i, word in enumerate(arguments) if not word.startswith("-"))
        read_options(arguments[first:])
    else:
        assert program in ("python", "python3", "pip"), f"{program} is unknown here"
