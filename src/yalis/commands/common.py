# SPDX-License-Identifier: Apache-2.0
"""What several commands ask about the model and its ranks."""

from __future__ import annotations

import argparse
import os
from typing import Any

from nvrar.commands.common import count
from nvrar.plan import PLAN_NAMES
from nvrar.units import parse_size
from yalis.llm import LLM
from yalis.options import DEVICES, LOAD_FORMATS
from yalis.parallel.all_reduce import ALL_REDUCES
from yalis.parallel.launcher import detect
from yalis.weights.loader import Progress


def add_model_options(
    parser: argparse.ArgumentParser, *, load_format: str = "auto", compares: bool = False
) -> None:
    """`compares`: `--all-reduce` may be given several times, and is a list or None."""
    parser.add_argument("model", help="folder of a checkpoint in the Hugging Face layout")
    _add_ranks(parser, compares)
    add = parser.add_argument_group("the model").add_argument
    add(
        "--dtype",
        default="auto",
        help="auto, float32, bfloat16 or float16 (default: auto, the checkpoint's)",
    )
    add(
        "--load-format",
        choices=LOAD_FORMATS,
        default=load_format,
        help=f"dummy: random weights (default: {load_format})",
    )
    add("--device", choices=DEVICES, default="auto", help="default: a GPU where there is one")
    add(
        "--max-model-len",
        type=count,
        metavar="N",
        help="longest prompt and output together (default: the model's)",
    )
    add(
        "--gpu-memory-utilization",
        type=float,
        default=0.9,
        metavar="SHARE",
        help="of a GPU's memory that weights, steps and the cache may take (default: 0.9)",
    )
    add(
        "--kv-cache-memory-bytes",
        type=_size,
        metavar="SIZE",
        help="of the cache on a rank, e.g. 4G (default: 4G on a CPU, on a GPU what the rest leaves)",
    )
    add("--enforce-eager", action="store_true", help="no CUDA graphs")
    add(
        "--batch-invariant",
        action="store_true",
        help="a request's tokens do not depend on what runs beside it; slower",
    )
    add("--seed", type=int, default=0, help="of the draws, and of dummy weights (default: 0)")


def _add_ranks(parser: argparse.ArgumentParser, compares: bool) -> None:
    add = parser.add_argument_group("the ranks").add_argument
    add(
        "--tensor-parallel-size",
        type=count,
        metavar="N",
        help="ranks (default: the launcher's, or 1)",
    )
    add(
        "--num-nodes",
        type=count,
        default=1,
        metavar="N",
        help="nodes that local ranks play; leave it out under a launcher, where nvrar finds out who "
        "shares one (default: 1)",
    )
    several: dict[str, Any] = {"action": "append"} if compares else {"default": "nvrar"}
    add(
        "--all-reduce",
        **several,
        choices=ALL_REDUCES,
        metavar="NAME",
        help="what sums over the ranks: nvrar; torch, which is gloo or NCCL; or on GPUs of one node "
        f"torch's symm-one-shot or symm-two-shot{'; again for more, in turns' if compares else ''} "
        "(default: nvrar)",
    )
    add(
        "--all-reduce-plan",
        default="auto",
        metavar="WORD",
        help=f"of nvrar, for all sizes: {', '.join(PLAN_NAMES)}, or levels such as "
        '"split:2 exchange:2", as nvrar plan shows them (default: auto, which chooses for each size)',
    )


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:  # of which argparse would show the parser's name
        raise argparse.ArgumentTypeError(str(error)) from None


def is_first_rank() -> bool:
    """Whether this process, of those that a launcher started, is the one to speak."""
    place = detect(os.environ)
    return place is None or place.rank == 0


def make_llm(
    args: argparse.Namespace, all_reduce: str, progress: Progress, **options: object
) -> LLM:
    """The model that `add_model_options` describes. `options` are more of `LLM`'s, or replace its."""
    place = detect(os.environ)
    asked = {
        "tensor_parallel_size": args.tensor_parallel_size or (place.world_size if place else 1),
        "num_nodes": args.num_nodes,
        "all_reduce": all_reduce,
        "all_reduce_plan": args.all_reduce_plan,
        "dtype": args.dtype,
        "load_format": args.load_format,
        "device": args.device,
        "max_model_len": args.max_model_len,
        "gpu_memory_utilization": args.gpu_memory_utilization,
        "kv_cache_memory_bytes": args.kv_cache_memory_bytes,
        "enforce_eager": args.enforce_eager,
        "batch_invariant": args.batch_invariant,
        "seed": args.seed,
    }
    return LLM(args.model, on_progress=progress, **(asked | options))
