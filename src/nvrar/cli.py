# SPDX-License-Identifier: Apache-2.0
"""The ``nvrar`` command. Arguments in, functions elsewhere, text out.

Every error is one line on stderr that names the value, the bound and the remedy. Exit codes: 0 done,
1 a run that failed (a peer was lost, a result was wrong), 2 arguments that cannot work.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from rich.console import Console

from nvrar._version import __version__
from nvrar.commands import bench, info, plan, tune
from nvrar.commands.common import Parser, complain
from nvrar.errors import NvrarError

_PIPE_WIDTH = 160  # a table that goes to a file is not to be broken at 80 columns


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="nvrar", description="An all-reduce for tensor parallelism beyond one node.")
    top.add_argument("--version", action="version", version=f"nvrar {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (info, plan, bench, tune):
        command.add(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    options.command_line = ["nvrar", *given]
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPE_WIDTH)
    logging.basicConfig(
        format="%(levelname)s %(name)s: %(message)s"
    )  # the edge: libraries only log
    try:
        return int(options.run(options, console))
    except NvrarError as error:
        return complain(error)
    except OSError as error:  # the system refuses: no room for temporary files, no more processes
        return complain(NvrarError(str(error)))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":  # `python -m nvrar` is the shorter form
    sys.exit(main())
