"""Two parts of yalis on one GPU, timed: drawing tokens, and getting weights (random ones, and from a disk).

PYTHONPATH=src python benchmarks/yalis_parts.py [--config examples/configs/llama-3.1-8b] [--folder /tmp/c]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from yalis.config import ModelConfig
from yalis.models.decoder import CausalLM
from yalis.parallel.group import Placement, TensorParallel
from yalis.sampler import Sampler
from yalis.sampling_params import Draw, SamplingParams
from yalis.weights.checkpoint import Checkpoint
from yalis.weights.dummy import DummyWeights
from yalis.weights.loader import WeightSource, load_weights, weight_parts

DEVICE = torch.device("cuda", 0)
DRAWS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.7},
    "top_k 50, top_p 0.9": {"top_k": 50, "top_p": 0.9},
    "top_p 0.9": {"top_p": 0.9},
    "min_p 0.05": {"min_p": 0.05},
    "greedy, repetition 1.1": {"temperature": 0, "repetition_penalty": 1.1},
    "greedy, logprobs 5": {"temperature": 0, "logprobs": 5},
}


def time_draws(vocab_size: int) -> None:
    """Microseconds of a call, and those of the host within it: logits of 16 bits, no graph."""
    print(
        f"{'draws of ' + str(vocab_size):24}" + "".join(f"{n:>9} rows (host)" for n in (1, 32, 256))
    )
    for name, fields in DRAWS.items():
        cells = []
        for num_rows in (1, 32, 256):
            logits = 3 * torch.randn(num_rows, vocab_size, device=DEVICE).bfloat16()
            sampler, params = Sampler(num_rows, vocab_size, DEVICE), SamplingParams(**fields)
            if params.has_penalties:
                for slot in range(num_rows):
                    sampler.start(slot, range(500))
            times = [once(sampler, logits, params, idx) for idx in range(15)][5:]
            whole, host = (statistics.median(column) for column in zip(*times, strict=True))
            cells.append(f"{whole:>14.0f} ({host:.0f})".rjust(21))
        print(f"{name:24}" + "".join(cells), flush=True)


def once(
    sampler: Sampler, logits: torch.Tensor, params: SamplingParams, idx: int
) -> tuple[float, float]:
    draws = [Draw(params, row, idx, row) for row in range(len(logits))]
    torch.cuda.synchronize()
    start = time.perf_counter()
    sampler.sample(logits, draws)
    submitted = time.perf_counter()
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - start), 1e6 * (submitted - start)


def time_loading(name: str, config: ModelConfig, source: WeightSource) -> CausalLM:
    torch.cuda.synchronize()
    start = time.perf_counter()
    model = CausalLM(config, Placement(TensorParallel.single(), torch.bfloat16, DEVICE))
    load_weights(model, source)
    seconds = time.perf_counter() - start
    gigabytes = sum(part.target.nbytes for part in weight_parts(model)) / 1e9
    print(
        f"{name:24}{gigabytes:8.2f} GB in {seconds:6.2f} s: {gigabytes / seconds:6.2f} GB/s",
        flush=True,
    )
    return model


def forget(path: Path) -> None:
    """Drop the file from the page cache, so that the next read is the disk's."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def time_reading(path: Path) -> None:
    """The disk alone: as many threads as the loader's, 64 MB at a time."""
    size, portion = path.stat().st_size, 64 << 20

    def read(offset: int) -> None:
        with path.open("rb", buffering=0) as file:
            os.pread(file.fileno(), portion, offset)

    start = time.perf_counter()
    with ThreadPoolExecutor(Checkpoint.num_threads) as pool:
        list(pool.map(read, range(0, size, portion)))
    seconds = time.perf_counter() - start
    print(
        f"{'the file alone':24}{size / 1e9:8.2f} GB in {seconds:6.2f} s: {size / 1e9 / seconds:6.2f} GB/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="examples/configs/llama-3.1-8b")
    parser.add_argument("--num-layers", type=int, default=12, help="of the checkpoint on disk")
    parser.add_argument("--folder", default=None, help="where the disk is that counts")
    args = parser.parse_args()
    config = ModelConfig.from_folder(args.config)
    time_draws(config.vocab_size)
    time_loading("random weights", config, DummyWeights(0))
    config = replace(config, num_hidden_layers=args.num_layers)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        path = Path(name) / "model.safetensors"
        model = time_loading("random, fewer layers", config, DummyWeights(0))
        tensors = {part.name: part.target.cpu() for part in weight_parts(model)}
        save_file(tensors, path)
        for how in ("cold", "warm"):
            if how == "cold":
                forget(path)
                time_reading(path)
                forget(path)
            loaded = time_loading(f"from the disk, {how}", config, Checkpoint(name))
            for part in weight_parts(loaded):
                assert torch.equal(part.target.cpu(), tensors[part.name])
            del loaded


if __name__ == "__main__":
    main()
