# SPDX-License-Identifier: Apache-2.0
"""What a bench is asked for: its options, read and checked as far as one process can."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from nvrar.bench import Settings
from nvrar.commands.common import at_least, count, machine_from
from nvrar.contenders import BASELINE
from nvrar.cost import Machine
from nvrar.errors import ArgumentError
from nvrar.host import DTYPES, OPS, type_name
from nvrar.plan import PLAN_NAMES, Plan
from nvrar.record import refusal_of_path
from nvrar.report import PICTURES
from nvrar.topology import Topology
from nvrar.units import parse_size

DTYPE_NAMES = {type_name(dtype): dtype for dtype in DTYPES}
_MOST_CONTENDERS = 7  # beside torch: as many as can be told apart in a picture


def add_sizes(group: argparse._ArgumentGroup, default: str) -> None:
    group.add_argument("--sizes", default=default, help="default: %(default)s")
    group.add_argument("--min", metavar="SIZE", help="with --max: all doublings from here")
    group.add_argument("--max", metavar="SIZE")


def add_options(parser: argparse.ArgumentParser) -> None:
    default = "default: %(default)s"
    sizes = parser.add_argument_group("what")
    add_sizes(sizes, "1K,4K,16K,64K,256K,1M")
    sizes.add_argument(
        "--plans",
        default="auto,nvrar,one-shot,two-shot",
        help=f"auto, {', '.join(PLAN_NAMES)} or words such as 'split:2 exchange:2'; torch is always "
        "there (default: %(default)s)",
    )
    sizes.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPE_NAMES), help=default)
    sizes.add_argument("--op", default="sum", choices=OPS, help=default)
    sizes.add_argument(
        "--virtual",
        metavar="NxG",
        help="N nodes of G ranks, all on one GPU: whether each plan's kernels are right; no network's times",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help=default)
    how.add_argument(
        "--eager",
        action="store_true",
        help="on GPUs: the host's time to queue a call; default there: CUDA graphs of calls, back to back",
    )
    how.add_argument(
        "--interleaved",
        action="store_true",
        help="on GPUs: also graphs in which another kernel runs between the calls",
    )
    how.add_argument(
        "--no-peers",
        action="store_true",
        help="on GPUs: leave out NCCL on a registered pool and torch's symmetric-memory all-reduces",
    )
    how.add_argument("--iterations", type=count, default=20, help="samples a round (20)")
    how.add_argument("--rounds", type=count, default=4, help="rounds of all contenders (4)")
    how.add_argument(
        "--warmup", type=at_least(0), default=5, help="calls before the first round (5)"
    )
    how.add_argument("--max-bytes", metavar="SIZE", help="of the communicators; default: no limit")
    how.add_argument("--executor", default="auto", choices=("auto", "host"), help=default)
    how.add_argument("--timeout", type=float, default=60.0, help="seconds for any wait (60)")
    out = parser.add_argument_group("where to")
    out.add_argument("--out", metavar="DIR", help="bench.jsonl and bench.svg go there")
    out.add_argument("--json", metavar="FILE", help="JSON lines, a row a contender and size")
    out.add_argument("--plot", metavar="FILE", help=f"a picture: {', '.join(PICTURES)}")
    out.add_argument("--predict", action="store_true", help="the cost model's times in the table")


@dataclass(frozen=True)
class Request:
    """See :func:`add_options`."""

    sizes: tuple[int, ...]
    plans: tuple[str, ...]
    settings: Settings
    machine: Machine
    max_bytes: int
    directory: Path | None
    rows_path: Path | None
    picture_path: Path | None
    with_peers: bool

    @classmethod
    def read(cls, options: argparse.Namespace) -> Request:
        """Raises ArgumentError for the first option that cannot work."""
        settings = Settings(
            DTYPE_NAMES[options.dtype],
            options.op,
            options.device,
            options.iterations,
            options.rounds,
            options.warmup,
            options.timeout,
            _timings(options),
        )
        sizes = read_sizes(options)
        for size in sizes:
            settings.num_elements(size)
        named = (word.strip() for word in options.plans.split(","))
        plans = tuple(dict.fromkeys(word for word in named if word and word != BASELINE))
        if len(plans) > _MOST_CONTENDERS:
            raise ArgumentError(
                f"{len(plans)} plans; at most {_MOST_CONTENDERS} are compared in one run, so that their "
                "turns stay close and a picture readable"
            )
        directory, rows_path, picture_path = _paths(options)
        return cls(
            sizes,
            plans,
            settings,
            machine_from(options.machine, "gpu" if options.device == "cuda" else "host"),
            parse_size(options.max_bytes) if options.max_bytes else max(sizes),
            directory,
            rows_path,
            picture_path,
            with_peers=options.device == "cuda" and not options.no_peers and not options.eager,
        )

    def check_plans(self, topology: Topology) -> None:
        """Raises PlanError for a plan that does not fit."""
        for word in self.plans:
            if word != "auto":
                Plan.resolve(word, topology)

    def check_paths(self) -> str:
        """Why a result could not be written; empty if it can be. Makes the directory of ``--out``."""
        try:
            if self.directory is not None:
                self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return f"--out {self.directory} cannot be made: {error.strerror}"
        paths = (path for path in (self.rows_path, self.picture_path) if path is not None)
        return next(filter(None, map(refusal_of_path, paths)), "")


def _timings(options: argparse.Namespace) -> tuple[str, ...]:
    if options.device == "cpu":
        if options.eager or options.interleaved:
            raise ArgumentError(
                "--eager and --interleaved are about CUDA graphs; give --device cuda"
            )
        return ("host",)
    if options.eager and options.interleaved:
        raise ArgumentError("--interleaved is about CUDA graphs, which --eager does without")
    if options.eager:
        return ("host",)
    return ("graph", "interleaved") if options.interleaved else ("graph",)


def read_sizes(options: argparse.Namespace) -> tuple[int, ...]:
    """What :func:`add_sizes` asked for, in bytes, each once.

    Raises:
        ArgumentError: none, or one that does not read.
    """
    if options.min is None and options.max is None:
        words = [word for word in options.sizes.split(",") if word.strip()]
        if not words:
            raise ArgumentError(f"sizes are {options.sizes!r}; give at least one, such as 64K")
        return tuple(dict.fromkeys(parse_size(word) for word in words))
    if options.min is None or options.max is None:
        raise ArgumentError("--min and --max go together, such as --min 1K --max 1M")
    least, most = parse_size(options.min), parse_size(options.max)
    if least > most:
        raise ArgumentError(f"--min {options.min} is above --max {options.max}; swap them")
    return tuple(least << i for i in range((most // least).bit_length()))


def _paths(options: argparse.Namespace) -> tuple[Path | None, Path | None, Path | None]:
    """The directory to make, and where the rows and the picture go."""
    directory = Path(options.out) if options.out else None
    rows_path = Path(options.json) if options.json else directory and directory / "bench.jsonl"
    picture_path = Path(options.plot) if options.plot else directory and directory / "bench.svg"
    if picture_path is not None and picture_path.suffix not in PICTURES:
        raise ArgumentError(
            f"plot file {str(picture_path)!r} ends in {picture_path.suffix!r}; it must end in one of "
            f"{', '.join(PICTURES)}"
        )
    return directory, rows_path, picture_path
