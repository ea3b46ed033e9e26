# SPDX-License-Identifier: Apache-2.0
"""`yalis bench latency` and `yalis bench throughput`: a line for each measurement, as text and as JSON.

Without weights: a model of the checkpoint's shape is enough. `--all-reduce` given several times measures all
of them in turns, with the same weights in the same processes.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import nvrar
from nvrar import record
from nvrar.commands.common import Parser, at_least, count, writing
from yalis.bench import Run, Workload, percentile, run
from yalis.commands.common import add_model_options, is_first_rank, make_llm
from yalis.device import device_type
from yalis.errors import ConfigError
from yalis.llm import LLM
from yalis.parallel.launcher import detect
from yalis.progress import TerminalProgress
from yalis.roofline import Work, measured_read_gbps

Row = dict[str, Any]
Subparsers = Any  # argparse's own type is private


def add(commands: Subparsers, common: Parser) -> None:
    text = "measure latency or throughput"
    kinds = commands.add_parser("bench", help=text, description=text).add_subparsers(
        required=True, metavar="KIND"
    )
    text = "time to the first token and between tokens, for requests that arrive together"
    group = _add_kind(kinds, "latency", text, _latency, common)
    add = group.add_argument
    add("--batch-size", type=count, action="append", metavar="N", help="default 1; again for more")
    add("--prompt-len", type=count, default=128, metavar="N", help="tokens (default: 128)")
    add("--output-len", type=count, default=128, metavar="N", help="tokens (default: 128)")
    add("--iterations", type=count, default=3, metavar="N", help="runs of each (default: 3)")
    add("--memory-gbps", type=_speed, metavar="GB/s", help="to compare with (default: measured)")
    _add_shared(group)

    text = "tokens a second, for many requests of random lengths"
    group = _add_kind(kinds, "throughput", text, _throughput, common)
    add = group.add_argument
    add("--num-prompts", type=count, default=256, metavar="N", help="requests (default: 256)")
    add("--prompt-len", type=count, default=512, metavar="N", help="mean tokens (default: 512)")
    add("--output-len", type=count, default=128, metavar="N", help="mean tokens (default: 128)")
    add(
        "--range-ratio",
        type=_share,
        default=0.5,
        metavar="R",
        help="lengths spread by this share of the mean (default: 0.5)",
    )
    add("--iterations", type=count, default=1, metavar="N", help="runs of each (default: 1)")
    _add_shared(group)


def _add_kind(
    kinds: Subparsers,
    name: str,
    text: str,
    measure: Callable[[argparse.Namespace, LLM], Iterator[Row]],
    common: Parser,
) -> argparse._ArgumentGroup:
    """The group of what is measured, for the options that this kind alone has."""
    parser: Parser = kinds.add_parser(name, parents=[common], help=text, description=text)
    parser.set_defaults(run=_run, measure=measure, kind=name)
    group = parser.add_argument_group("what is measured")
    add_model_options(parser, load_format="dummy", compares=True)
    return group


def _add_shared(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    text = "most sequences in a step (default: 256)"
    add("--max-num-seqs", type=count, default=256, metavar="N", help=text)
    text = "most tokens in a step (default: 8192)"
    add("--max-num-batched-tokens", type=count, default=8192, metavar="N", help=text)
    text = "runs before those that count (default: 1)"
    add("--warmup", type=at_least(0), default=1, metavar="N", help=text)
    add("--json", type=Path, metavar="FILE", help="write a JSON object a line, with provenance")


def _run(args: argparse.Namespace) -> None:
    _check(args)
    names = args.all_reduce = list(dict.fromkeys(args.all_reduce or ["nvrar"]))
    about = _provenance(args)
    start_s = time.monotonic()
    with TerminalProgress(is_shown=is_first_rank()) as progress:
        llm = make_llm(
            args,
            "nvrar" if "nvrar" in names else names[0],
            progress,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
        )
    about["load_s"] = round(time.monotonic() - start_s, 2)
    options, dtype = llm.options, llm.options.resolved_dtype(llm.config)
    about["options"] = asdict(options) | {"dtype": dtype, "max_model_len": llm.max_model_len}
    del about["options"]["all_reduce"]  # each row names its own
    with llm:
        _check_path(args.json)
        rows = [row | about for row in args.measure(args, llm)]
    if not is_first_rank():
        return
    ranks = options.tensor_parallel_size
    some = "one rank" if ranks == 1 else f"{ranks} ranks, nodes: {options.num_nodes}"
    print(f"{args.model}: {dtype}, {some}, ready in {about['load_s']} s")
    for row in rows:
        print(_line(row))
    if args.json:
        with writing(args.json):
            record.write_rows(iter(rows), args.json)


def _check(args: argparse.Namespace) -> None:
    """Raise ConfigError for what would only fail, or measure something else, after a long load."""
    largest = max(getattr(args, "batch_size", None) or [1])
    for name in ("max_num_seqs", "max_num_batched_tokens"):
        most = getattr(args, name)
        if largest > most:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"--batch-size {largest} is above {option} {most}, so its requests would take turns and be "
                f"no batch; give a smaller one, or {option} {largest}"
            )
    if detect(os.environ) is None:  # else other ranks would wait for one that ends here
        _check_path(args.json)


def _check_path(path: Path | None) -> None:
    """Raise ConfigError where the first rank cannot write there. Collective over a launcher's ranks."""
    refusal = [record.refusal_of_path(path) if path and is_first_rank() else ""]
    if detect(os.environ) is not None:
        dist.broadcast_object_list(refusal, src=0)
    if refusal[0]:
        raise ConfigError(f"--json {refusal[0]}")


def _latency(args: argparse.Namespace, llm: LLM) -> Iterator[Row]:
    dtype = getattr(torch, llm.options.resolved_dtype(llm.config))
    num_ranks = llm.options.tensor_parallel_size
    work = Work.of(llm.config, dtype, num_ranks)
    device = torch.device(device_type(args.device))
    limit = args.memory_gbps or measured_read_gbps(device, dtype)
    for batch_size in args.batch_size or [1]:
        workload = Workload.uniform(batch_size, args.prompt_len, args.output_len)
        for name, runs, details in _in_turns(args, llm, workload):
            first_s = [s for r in runs for s in r.first_token_s]
            step_s = [s for r in runs for s in r.step_s]
            prefill_s = statistics.median(r.prefill_s for r in runs)
            flops = work.prefill_flops([prompt for prompt, _ in workload.lengths])
            row: Row = {
                "bench": "latency",
                "all_reduce": name,
                "all_reduce_details": details,
                "batch_size": batch_size,
                "prompt_len": args.prompt_len,
                "output_len": args.output_len,
                "ttft_ms": _ms(statistics.median(first_s)),
                "ttft_p99_ms": _ms(percentile(first_s, 99)),
                "prefill_ms": _ms(prefill_s),
                "prefill_tflops_per_rank": round(flops / prefill_s / 1e12, 2),
            }
            if step_s:
                gbps = work.decode_bytes(batch_size, workload.mean_context) / 1e9
                gbps /= statistics.median(step_s)
                row |= {
                    "token_ms": _ms(statistics.median(step_s)),
                    "token_p99_ms": _ms(percentile(step_s, 99)),
                    "output_tokens_per_s": round(batch_size / statistics.median(step_s), 1),
                    "gbps_per_rank": round(gbps, 1),
                    "memory_gbps": round(limit, 1),
                    "memory_share": round(gbps / limit, 3),
                }
            yield row | {"num_samples": len(step_s), "token_samples_ms": list(map(_ms, step_s))}


def _throughput(args: argparse.Namespace, llm: LLM) -> Iterator[Row]:
    workload = Workload.random(
        args.num_prompts, args.prompt_len, args.output_len, args.range_ratio, args.seed
    )
    num_prompt_tokens = sum(prompt for prompt, _ in workload.lengths)
    for name, runs, details in _in_turns(args, llm, workload):
        elapsed_s = statistics.median(r.elapsed_s for r in runs)
        first_s = [s for r in runs for s in r.first_token_s]
        yield {
            "bench": "throughput",
            "all_reduce": name,
            "all_reduce_details": details,
            "num_prompts": args.num_prompts,
            "prompt_len": args.prompt_len,
            "output_len": args.output_len,
            "range_ratio": args.range_ratio,
            "elapsed_s": round(elapsed_s, 3),
            "requests_per_s": round(args.num_prompts / elapsed_s, 2),
            "output_tokens_per_s": round(runs[0].num_output_tokens / elapsed_s, 1),
            "tokens_per_s": round((num_prompt_tokens + runs[0].num_output_tokens) / elapsed_s, 1),
            "ttft_ms": _ms(statistics.median(first_s)),
            "ttft_p99_ms": _ms(percentile(first_s, 99)),
        }


def _in_turns(
    args: argparse.Namespace, llm: LLM, workload: Workload
) -> Iterator[tuple[str, list[Run], Row]]:
    """The runs that count of each all-reduce, and what it says of itself after them. They take turns, so that
    a slow moment hits all alike."""
    workload.check(llm)
    has_others = llm.options.tensor_parallel_size > 1
    runs: dict[str, list[Run]] = {
        name: [] for name in (args.all_reduce if has_others else ["none"])
    }
    details: dict[str, Row] = {}
    for turn in range(-args.warmup, args.iterations):
        for name in runs:
            if has_others and name != llm.options.all_reduce:
                llm.use_all_reduce(name)
            # Prompts of its own for each: one seen before would cost nothing.
            done = run(llm, workload, seed=f"{args.seed} {name} {turn}")
            if turn >= 0:
                runs[name].append(done)
            if turn == args.iterations - 1:
                details[name] = llm.describe_all_reduce()
    for name, done_runs in runs.items():
        yield name, done_runs, details[name]


def _provenance(args: argparse.Namespace) -> Row:
    commit, is_dirty = record.checkout()
    return {
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "git_commit": commit,
        "git_dirty": is_dirty,
        "version": nvrar.__version__,
        **record.software(),
        "host": record.host(device_type(args.device)),
        "environment": record.variables(os.environ),
        "model": args.model,
    }


_UNITS = {
    "ttft_ms": "ms to the first token",
    "token_ms": "ms a token",
    "token_p99_ms": "ms p99",
    "prefill_tflops_per_rank": "TFLOP/s in prefill",
    "gbps_per_rank": "GB/s",
    "memory_share": "of the memory's speed",
    "requests_per_s": "requests/s",
    "output_tokens_per_s": "output tokens/s",
    "tokens_per_s": "tokens/s in all",
}


def _line(row: Row) -> str:
    size = row.get("batch_size", row.get("num_prompts"))
    head = f"{row['all_reduce']:14} {size:4} x {row['prompt_len']}+{row['output_len']}:"
    return " ".join([head, ", ".join(f"{row[k]} {unit}" for k, unit in _UNITS.items() if k in row)])


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def _share(text: str) -> float:
    number = _number(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return number


def _speed(text: str) -> float:
    number = _number(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number above 0")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan  # within no bounds
