"""How busy the GPU is while an LLM decodes, and with what: from a profiler's trace of one rank.

python benchmarks/yalis_idle.py examples/configs/llama-3.1-8b 1 32
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from yalis import LLM
from yalis.bench import Workload, run

OUTPUT_LEN = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("batch_sizes", type=int, nargs="+")
    parser.add_argument("--prompt-len", type=int, default=224)
    parser.add_argument("--top", type=int, default=12, help="kernels to name")
    args = parser.parse_args()
    options = {"max_model_len": 4096, "max_num_seqs": max(args.batch_sizes)}
    with LLM(args.model, load_format="dummy", device="cuda", **options) as llm:
        for batch_size in args.batch_sizes:
            workload = Workload.uniform(batch_size, args.prompt_len, OUTPUT_LEN)
            run(llm, workload, seed=0)
            plain = run(llm, workload, seed=1)
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                run(llm, workload, seed=2)
            report(batch_size, statistics.median(plain.step_s), events(profiler), args.top)


def events(profiler: Any) -> list[tuple[float, float, str]]:
    """What ran on the GPU: start and end in microseconds, and its name; in order."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    found = [(e["ts"], e["ts"] + e["dur"], e["name"]) for e in trace if e.get("cat") in kinds]
    return sorted(found)


def report(batch_size: int, step_s: float, found: list[tuple[float, float, str]], top: int) -> None:
    # The prompts come first; the last steps are decodes only.
    begin = found[-1][1] - step_s * 1e6 * OUTPUT_LEN * 2 / 3
    found = [event for event in found if event[0] >= begin]
    busy_us, gaps, end = 0.0, [], found[0][0]
    by_name: dict[str, list[float]] = defaultdict(list)
    for start, stop, name in found:
        gaps.append(max(0.0, start - end))
        busy_us += max(0.0, stop - max(start, end))
        end = max(end, stop)
        by_name[short(name)].append(stop - start)
    total_us = end - found[0][0]
    num_steps = total_us / 1e6 / step_s
    long_gaps = sum(gap for gap in gaps if gap > 5)
    print(
        f"batch {batch_size}: {step_s * 1e3:.3f} ms a step without the profiler; in its trace the GPU is "
        f"idle {1 - busy_us / total_us:.2%}, in gaps over 5 us {long_gaps / total_us:.2%}, "
        f"{len(found) / num_steps:.0f} launches a step"
    )
    ranked = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    for name, spans in ranked[:top]:
        print(
            f"  {sum(spans) / total_us:6.1%} {statistics.median(spans):8.2f} us x "
            f"{len(spans) / num_steps:6.1f} a step  {name}"
        )


def short(name: str) -> str:
    return re.sub(r"<.*|\(.*", "", name.replace("void ", ""))[-60:]


if __name__ == "__main__":
    main()
