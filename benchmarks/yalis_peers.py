"""Milliseconds a token of one request, with random weights of a config's shape, in one process: yalis beside
transformers with a static cache, which it compiles on a GPU, and gpt-fast, where a clone of it is named.

python benchmarks/yalis_peers.py examples/configs/llama-3.1-8b [--gpt-fast DIR] [--device cpu --dtype float32]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from yalis import LLM
from yalis.bench import Workload, run

NUM_WARMUPS, NUM_SAMPLES = 2, 5
FEW_TOKENS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "model", help="a folder with a config.json, for gpt-fast named as one of its own"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt-len", type=int, default=224)
    parser.add_argument("--output-len", type=int, default=64, help="tokens that are timed")
    parser.add_argument("--gpt-fast", type=Path, help="a clone of github.com/meta-pytorch/gpt-fast")
    args = parser.parse_args()
    measures = {"transformers, static cache": transformers_ms, "yalis": yalis_ms}
    if args.gpt_fast:  # last: it sets options of torch's compiler for the process
        measures["gpt-fast"] = gpt_fast_ms
    times = {}
    for name, measure in measures.items():
        times[name] = measure(args)
        print(f"{name}: {times[name]:.3f} ms a token", flush=True)
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    for name, ms in times.items():
        if name != "yalis":
            print(f"{name} / yalis {ms / times['yalis']:.2f}")


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

    with torch.inference_mode():
        return ms_a_token(generate, args)


def gpt_fast_ms(args: argparse.Namespace) -> float:
    sys.path.insert(0, str(args.gpt_fast))
    sys.modules["tokenizer"] = SimpleNamespace(
        get_tokenizer=None
    )  # wants libraries that are not needed here
    import generate as gpt_fast

    with torch.device(args.device):
        model = gpt_fast.Transformer.from_name(Path(args.model).name)
        model = model.to(getattr(torch, args.dtype)).eval()
        prompt = torch.randint(4, model.config.vocab_size, (args.prompt_len,))
        # At once in full size: caches that grow later would be compiled for any size.
        model.setup_caches(1, args.prompt_len + FEW_TOKENS + args.output_len)
    gpt_fast.decode_one_token = torch.compile(
        gpt_fast.decode_one_token, mode="reduce-overhead", fullgraph=True
    )

    def generate(num_tokens: int) -> None:
        # By temperature alone, the cheapest of its ways to draw.
        gpt_fast.generate(model, prompt, num_tokens, 1, interactive=False, draft_model=None)

    return ms_a_token(generate, args)


def yalis_ms(args: argparse.Namespace) -> float:
    max_model_len = args.prompt_len + FEW_TOKENS + args.output_len
    options = {"max_model_len": max_model_len, "max_num_seqs": 1}
    with LLM(
        args.model, load_format="dummy", device=args.device, dtype=args.dtype, **options
    ) as llm:
        turns = iter(range(1000))

        def generate(num_tokens: int) -> None:
            run(llm, Workload.uniform(1, args.prompt_len, num_tokens), seed=next(turns))

        return ms_a_token(generate, args)


def ms_a_token(generate: Callable[[int], None], args: argparse.Namespace) -> float:
    """By what many tokens take more than few: without the prompt."""
    samples = []
    for i in range(NUM_WARMUPS + NUM_SAMPLES):
        times = []
        for count in (FEW_TOKENS, FEW_TOKENS + args.output_len):
            start = time.perf_counter()
            generate(count)
            if args.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        if i >= NUM_WARMUPS:
            samples.append((times[1] - times[0]) / args.output_len * 1e3)
    return statistics.median(samples)


if __name__ == "__main__":
    main()
