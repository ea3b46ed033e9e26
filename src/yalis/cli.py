# SPDX-License-Identifier: Apache-2.0
"""The command `yalis`: generate text, measure, or make a small checkpoint to try it with."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from nvrar import NvrarError, __version__
from nvrar.commands.common import Parser, count, writing
from yalis.commands import bench
from yalis.commands.common import add_model_options, is_first_rank, make_llm
from yalis.config import DTYPES, ModelConfig
from yalis.errors import ConfigError, WorkerError, YalisError
from yalis.outputs import RequestOutput
from yalis.progress import TerminalProgress
from yalis.sampling_params import SamplingParams
from yalis.testing import make_checkpoint
from yalis.tokenizer import Tokenizer

_FAILED = 1
_MISUSE = 2
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit status. What goes wrong is one line on standard error; of a worker
    that fails, its traceback too.
    """
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING)
    try:
        args.run(args)
    except WorkerError as error:
        print(f"yalis: error: {error}", file=sys.stderr)
        return _FAILED
    except (YalisError, NvrarError, OSError) as error:
        if args.verbose:
            traceback.print_exc()
        else:
            print(f"yalis: error: {str(error).splitlines()[0]}", file=sys.stderr)
        return _MISUSE
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0


def _generate(args: argparse.Namespace) -> None:
    ModelConfig.from_folder(args.model)  # a folder of something else is told so first
    if not Tokenizer.exists(args.model):  # before loading takes long
        raise ConfigError(
            f"{args.model}/tokenizer.json is missing, and prompts are texts; add it, or give token ids to "
            "LLM.generate, or measure with yalis bench, which draws its own"
        )
    if args.logprobs is not None and not args.json:
        raise ConfigError("--logprobs is shown as JSON only; add --json, or leave it out")
    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        n=args.n,
        logprobs=args.logprobs,
        stop=tuple(args.stop),
        ignore_eos=args.ignore_eos,
    )
    with TerminalProgress(is_shown=is_first_rank()) as progress:
        llm = make_llm(args, args.all_reduce, progress)
        with llm:
            outputs = llm.generate(args.prompt, params, on_progress=progress)
            if is_first_rank():
                logging.getLogger("yalis").info("all-reduce: %s", llm.describe_all_reduce())
    if is_first_rank():
        _show(outputs, as_json=args.json)


def _show(outputs: Sequence[RequestOutput], *, as_json: bool) -> None:
    for output in outputs:
        for completion in output.outputs:
            if as_json:
                prompt = {"prompt": output.prompt, "prompt_token_ids": output.prompt_token_ids}
                print(json.dumps(prompt | asdict(completion)))
            else:
                print(_printable(f"{output.prompt}{completion.text}"))


def _printable(text: str) -> str:
    """The text without control characters: a model must not steer the user's terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _make_checkpoint(args: argparse.Namespace) -> None:
    folder = Path(args.path)
    _check_folder(folder)
    _check_heads(args)
    with writing(folder):
        make_checkpoint(
            folder,
            num_shards=args.shards,
            seed=args.seed,
            dtype=args.dtype,
            num_hidden_layers=args.layers,
            hidden_size=args.hidden_size,
            intermediate_size=args.intermediate_size or args.hidden_size * 11 // 4,
            num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads or args.heads,
            vocab_size=args.vocab,
            max_position_embeddings=args.max_positions,
            tie_word_embeddings=args.tie,
        )
    print(folder)


def _check_folder(folder: Path) -> None:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"{there} is a file, not a folder; choose another path")
    if there == folder and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; remove it, or choose another path")


def _check_heads(args: argparse.Namespace) -> None:
    """As the model would say it, but by the names of the options."""
    size, heads, kv_heads = args.hidden_size, args.heads, args.kv_heads or args.heads
    if size % (2 * heads):
        raise ConfigError(
            f"--hidden-size {size} over --heads {heads} is no even whole number, which a head's size must "
            f"be; give a multiple of {2 * heads}, or other heads"
        )
    if heads % kv_heads:
        raise ConfigError(
            f"--kv-heads {kv_heads} does not divide --heads {heads}, and every one serves equally many; give "
            "one that does"
        )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="yalis", description="A small LLM inference engine with tensor parallelism."
    )
    parser.add_argument("--version", action="version", version=f"yalis {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    common = Parser(add_help=False)
    common.add_argument("--verbose", action="store_true", help="log, and show errors in full")

    text = "continue prompts with a model"
    generate = commands.add_parser("generate", parents=[common], help=text, description=text)
    generate.set_defaults(run=_generate)
    add = generate.add_argument_group("the text").add_argument
    add("--prompt", action="append", required=True, help="text to continue; may be given again")
    add("--n", type=int, default=1, metavar="N", help="continuations of each prompt (default: 1)")
    add("--max-tokens", type=int, default=64, metavar="N", help="of each output (default: 64)")
    text = "0 (the default) is greedy"
    add("--temperature", type=float, default=0.0, metavar="T", help=text)
    add(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="draw from the K likeliest (default: 0, all)",
    )
    text = "draw from the likeliest that sum to P (default: 1, all)"
    add("--top-p", type=float, default=1.0, metavar="P", help=text)
    text = "draw from those at least P times as likely as the likeliest (default: 0, all)"
    add("--min-p", type=float, default=0.0, metavar="P", help=text)
    text = "with --json: log probabilities of each token and of the K likeliest"
    add("--logprobs", type=int, metavar="K", help=text)
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before it; may be given again",
    )
    add("--ignore-eos", action="store_true", help="go on after the model's end token")
    add("--json", action="store_true", help="one JSON object a line instead of text")
    add_model_options(generate)

    bench.add(commands, common)

    text = "write a small checkpoint of random weights"
    make = commands.add_parser("make-checkpoint", parents=[common], help=text, description=text)
    make.set_defaults(run=_make_checkpoint)
    add = make.add_argument
    add("path", help="folder to write; it must be empty or missing")
    add("--layers", type=count, default=4, metavar="N", help="default: 4")
    add("--hidden-size", type=count, default=128, metavar="N", help="default: 128")
    text = "default: 2.75 times the hidden size"
    add("--intermediate-size", type=count, metavar="N", help=text)
    add("--heads", type=count, default=8, metavar="N", help="of attention (default: 8)")
    add("--kv-heads", type=count, metavar="N", help="of keys and values (default: as many)")
    add("--vocab", type=count, default=512, metavar="N", help="tokens (default: 512)")
    text = "longest prompt and output together (default: 2048)"
    add("--max-positions", type=count, default=2048, metavar="N", help=text)
    add("--tie", action="store_true", help="share the embedding with the output head")
    add("--dtype", choices=DTYPES, default="float32", help="default: float32")
    add("--shards", type=count, default=2, metavar="N", help="safetensors files (default: 2)")
    add("--seed", type=int, default=0, help="of the weights (default: 0)")
    return parser
