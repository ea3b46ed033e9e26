# SPDX-License-Identifier: Apache-2.0
"""Milliseconds a token of one request, with random weights of a config's shape, in one process: transformers
with a static cache, which it compiles on a GPU, then yalis.

python benchmarks/yalis_peers.py examples/configs/llama-3.1-8b [--device cpu --dtype float32]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from yalis import LLM
from yalis.bench import Workload, run

NUM_WARMUPS, NUM_SAMPLES = 2, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder with a config.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt-len", type=int, default=224)
    parser.add_argument("--output-len", type=int, default=64, help="tokens that are timed")
    args = parser.parse_args()
    theirs = transformers_ms(args)
    print(f"transformers, static cache: {theirs:.3f} ms a token", flush=True)
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
    ours = yalis_ms(args)
    print(f"yalis: {ours:.3f} ms a token; transformers / yalis {theirs / ours:.2f}")


def transformers_ms(args: argparse.Namespace) -> float:
    config = AutoConfig.from_pretrained(args.model)
    torch.set_default_device(args.device)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).eval()
    model.generation_config.eos_token_id = None  # random weights end nowhere
    prompt = torch.randint(4, config.vocab_size, (1, args.prompt_len))
    torch.set_default_device("cpu")

    def generate(num_tokens: int) -> None:
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=num_tokens,
            do_sample=False,
            cache_implementation="static",
            pad_token_id=0,
        )
        if args.device == "cuda":
            torch.cuda.synchronize()

    with torch.inference_mode():
        return ms_a_token(generate, args.output_len)


def ms_a_token(generate: Callable[[int], None], num_tokens: int) -> float:
    """By what many tokens take more than few: without the prompt."""
    few = 8
    samples = []
    for i in range(NUM_WARMUPS + NUM_SAMPLES):
        times = []
        for count in (few, few + num_tokens):
            start = time.perf_counter()
            generate(count)
            times.append(time.perf_counter() - start)
        if i >= NUM_WARMUPS:
            samples.append((times[1] - times[0]) / num_tokens * 1e3)
    return statistics.median(samples)


def yalis_ms(args: argparse.Namespace) -> float:
    options = {"max_model_len": args.prompt_len + args.output_len + 8, "max_num_seqs": 1}
    with LLM(
        args.model, load_format="dummy", device=args.device, dtype=args.dtype, **options
    ) as llm:
        turns = iter(range(1000))

        def generate(num_tokens: int) -> None:
            run(llm, Workload.uniform(1, args.prompt_len, num_tokens), seed=next(turns))

        return ms_a_token(generate, args.output_len)


if __name__ == "__main__":
    main()
