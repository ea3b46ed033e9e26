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
from yalis.options import divides_kv
from yalis.progress import TerminalProgress
from yalis.testing import make_checkpoint

OUT = Path("demo")
LAYOUTS = ((2, 2), (2, 1), (3, 1), (5, 1), (7, 1), (1, 1))  # nodes x ranks, by preference
SIZES = "1K,16K,256K,1M"
PLANS = "auto,nvrar,one-shot,two-shot"
console = Console(highlight=False)
say = console.print


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of your own checkpoint in the Hugging Face layout")
    parser.add_argument("--prompt", default="The quick brown fox")
    parser.add_argument("--max-tokens", type=int, default=48)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # four ranks share this machine's cores
    try:
        if options.model:
            console.print(f"1. Using the checkpoint in {options.model}", markup=False)
        model = options.model or own_checkpoint()
        num_nodes, ranks_per_node = layout_for(model)
        generate(model, options.prompt, options.max_tokens, num_nodes, ranks_per_node)
    except YalisError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return 2
    return measure(num_nodes, ranks_per_node)


def own_checkpoint() -> str:
    folder = OUT / "checkpoint"
    if not (folder / "config.json").exists():
        say(f"[bold]1.[/bold] Making a small Llama checkpoint in {folder}")
        make_checkpoint(folder)
    else:
        say(f"[bold]1.[/bold] Using the checkpoint in {folder}")
    say("   its weights are random, so its words will make no sense")
    return str(folder)


def layout_for(model: str) -> tuple[int, int]:
    """Nodes and ranks on each: two of two, or what the model's heads can be split by."""
    config = ModelConfig.from_folder(model)
    for num_nodes, ranks_per_node in LAYOUTS:
        ranks = num_nodes * ranks_per_node
        if config.num_attention_heads % ranks == 0 and divides_kv(
            config.num_key_value_heads, ranks
        ):
            break
    return num_nodes, ranks_per_node


def generate(model: str, prompt: str, max_tokens: int, num_nodes: int, ranks_per_node: int) -> None:
    ranks = num_nodes * ranks_per_node
    say(
        f"[bold]2.[/bold] Generating on {ranks} local ranks as {num_nodes} nodes x {ranks_per_node}"
    )
    split, split_s = continue_prompt(
        model, prompt, max_tokens, tensor_parallel_size=ranks, num_nodes=num_nodes,
        all_reduce="nvrar", all_reduce_plan="nvrar",
    )  # fmt: skip
    quote(prompt, split, split_s)
    say("   ... and in one process")
    whole, whole_s = continue_prompt(model, prompt, max_tokens)
    if split.token_ids != whole.token_ids:
        quote(prompt, whole, whole_s)
        raise YalisError(
            f"the ranks drew {split.token_ids}, one process drew {whole.token_ids}; unless two tokens "
            "were as good as equally likely this is a fault: please report it"
        )
    say(f"   [green]the same {len(whole.token_ids)} tokens[/green]  (in {whole_s:.2f} s)")


def quote(prompt: str, output: RequestOutput, seconds: float) -> None:
    text = f"   {prompt!r} -> {output.text!r}  ({len(output.token_ids)} tokens in {seconds:.2f} s)"
    console.print(text, markup=False, highlight=False, soft_wrap=True)


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


def measure(num_nodes: int, ranks_per_node: int) -> int:
    say("[bold]3.[/bold] Timing all-reduces of the same ranks, by gloo over loopback")
    say("   (see the shape, not the speed)")
    status = subprocess.run(
        [
            sys.executable, "-m", "nvrar", "bench", "--nodes", str(num_nodes),
            "--ranks-per-node", str(ranks_per_node), "--sizes", SIZES, "--plans", PLANS, "--out", str(OUT),
        ],
        check=False,
    ).returncode  # fmt: skip
    if status == 0:
        say(f"   the picture: {OUT / 'bench.svg'}    every sample: {OUT / 'bench.jsonl'}")
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
