"""`make demo`: the main job on this machine, start to finish.

A checkpoint, four local ranks that play two nodes, text generated with tensor parallelism over the NVRAR
plan and compared token by token with one process, and the all-reduces of the same ranks measured beside
torch.distributed's. What it writes lies in `demo/`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from yalis import LLM, RequestOutput, SamplingParams
from yalis.config import ModelConfig
from yalis.errors import YalisError
from yalis.progress import TerminalProgress
from yalis.testing import make_checkpoint

OUT = Path("demo")
NUM_NODES = 2
SIZES = "1K,16K,256K,1M"
PLANS = "auto,nvrar,one-shot,two-shot"
say = Console(highlight=False).print


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of your own checkpoint in the Hugging Face layout")
    parser.add_argument("--prompt", default="The quick brown fox")
    parser.add_argument("--max-tokens", type=int, default=48)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # four ranks share this machine's cores
    try:
        model = options.model or own_checkpoint()
        ranks_per_node = shards_of(model) // NUM_NODES
        generate(model, options.prompt, options.max_tokens, ranks_per_node)
    except YalisError as error:
        say(f"[red]{error}[/red]")
        return 2
    return measure(ranks_per_node)


def own_checkpoint() -> str:
    folder = OUT / "checkpoint"
    if not (folder / "config.json").exists():
        say(f"[bold]1.[/bold] Making a small Llama checkpoint of random weights in {folder}")
        make_checkpoint(folder)
    else:
        say(
            f"[bold]1.[/bold] Using the checkpoint in {folder} (random weights, so expect no sense)"
        )
    return str(folder)


def shards_of(model: str) -> int:
    """Four ranks, or two where the model's heads do not divide by four."""
    heads = ModelConfig.from_folder(model).num_attention_heads
    return 4 if heads % 4 == 0 else 2


def generate(model: str, prompt: str, max_tokens: int, ranks_per_node: int) -> None:
    ranks = NUM_NODES * ranks_per_node
    say(
        f"[bold]2.[/bold] Generating on {ranks} local ranks as {NUM_NODES} nodes x {ranks_per_node}"
    )
    split, split_s = continue_prompt(
        model, prompt, max_tokens, tensor_parallel_size=ranks, num_nodes=NUM_NODES,
        all_reduce="nvrar", all_reduce_plan="nvrar",
    )  # fmt: skip
    say(f"   {prompt!r} -> {split.text!r}  ({len(split.token_ids)} tokens in {split_s:.1f} s)")
    say("   ... and in one process")
    whole, whole_s = continue_prompt(model, prompt, max_tokens)
    if split.token_ids != whole.token_ids:
        raise YalisError(
            f"the ranks drew {split.token_ids}, one process drew {whole.token_ids}; with 16-bit weights "
            "near ties can fall either way, with fp32 this is a fault: please report it"
        )
    say(f"   [green]the same {len(whole.token_ids)} tokens[/green]  (in {whole_s:.1f} s)")


def continue_prompt(
    model: str, prompt: str, max_tokens: int, **layout: object
) -> tuple[RequestOutput, float]:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    with (
        TerminalProgress() as progress,
        LLM(model, dtype="float32", device="cpu", on_progress=progress, **layout) as llm,  # type: ignore[arg-type]
    ):
        start = time.perf_counter()
        (output,) = llm.generate([prompt], params, on_progress=progress)
        return output, time.perf_counter() - start


def measure(ranks_per_node: int) -> int:
    say(
        "[bold]3.[/bold] Timing all-reduces of the same ranks (gloo over loopback: see the shape, not the speed)"
    )
    status = subprocess.run(
        [
            sys.executable, "-m", "nvrar.cli", "bench", "--nodes", str(NUM_NODES),
            "--ranks-per-node", str(ranks_per_node), "--sizes", SIZES, "--plans", PLANS, "--out", str(OUT),
        ],
        check=False,
    ).returncode  # fmt: skip
    if status == 0:
        say(f"   the picture: {OUT / 'bench.svg'}    every sample: {OUT / 'bench.jsonl'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
