# SPDX-License-Identifier: Apache-2.0
"""What several commands share: the layout of the ranks and the machine, as arguments."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console

from nvrar import gpu
from nvrar.cost import MACHINES, USUAL, Machine
from nvrar.errors import ArgumentError, NvrarError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Subparsers = Any


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is one --help away. Options are to be written out."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **({"allow_abbrev": False} | options))

    def parse_known_args(self, *args: Any, **options: Any) -> Any:
        """As argparse, but the subcommand itself refuses what it does not know, and so names its own help."""
        known, rest = super().parse_known_args(*args, **options)
        if rest:
            meant = get_close_matches(rest[0].split("=")[0], self._option_string_actions, 1)
            hint = f"; did you mean {meant[0]}?" if meant else ""
            self.error(f"unrecognized arguments: {shlex.join(rest)}{hint}")
        return known, rest

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number of at least ``least``, which is 0 or more."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return read


count = at_least(1)


def add_layout(parser: argparse.ArgumentParser, purpose: str) -> None:
    group = parser.add_argument_group("the ranks", purpose)
    group.add_argument("--nodes", type=count, metavar="N")
    group.add_argument("--ranks-per-node", type=count, metavar="G")
    group.add_argument(
        "--machine",
        help=f"what the cost model describes: {', '.join(MACHINES)}, a JSON object such as "
        '\'{"node_local": {"latency_us": 60, "bandwidth_gbps": 1.2}, "cross_node": {...}}\', '
        f"or a file that holds one (default: {USUAL['host'].name} on CPUs, {USUAL['gpu'].name} on GPUs)",
    )


def executor_here() -> str:
    """What would reduce this machine's tensors: ``"gpu"`` where nothing is missing for it."""
    return "host" if gpu.why_unavailable(None) else "gpu"


def machine_from(text: str | None, executor: str) -> Machine:
    """The machine of that name, or described by that JSON object, or by the file of that path; for None the
    usual one of ``executor``.

    Raises:
        ArgumentError: none of the three, or a description that does not read.
    """
    if text is None:
        return USUAL[executor]
    if text in MACHINES or text.lstrip().startswith("{"):
        return Machine.parse(text)
    try:
        described = Path(text).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(
            f"machine {text!r} is neither a name ({', '.join(MACHINES)}) nor a JSON object nor a file "
            f"that can be read ({error})"
        ) from error
    if not described.lstrip().startswith("{"):
        raise ArgumentError(f"{text} does not hold a JSON object that describes a machine")
    return Machine.parse(described)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What is done inside writes ``path``; where the system refuses (a full disk), NvrarError says which."""
    try:
        yield
    except OSError as error:
        raise NvrarError(f"{path} cannot be written: {error.strerror or error}") from error


def exit_code(error: NvrarError) -> int:
    """2 for arguments that cannot work, 1 for a run that failed."""
    return 2 if isinstance(error, ValueError) else 1


def complain(error: NvrarError) -> int:
    """Says on stderr, in one line, what went wrong; the exit code for it."""
    sys.stderr.write(f"nvrar: {error}\n")  # in one piece: several ranks may write to one terminal
    sys.stderr.flush()
    return exit_code(error)


def print_json(value: Any, console: Console) -> None:
    """Plain, so that a program can read it: no wrapping, no markup."""
    console.print(json.dumps(value, indent=2), soft_wrap=True, markup=False, highlight=False)
