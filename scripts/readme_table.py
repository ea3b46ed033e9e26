"""Writes the measured table of README.md from the results that it names: python scripts/readme_table.py

With `--from run.jsonl --to benchmarks/results/NEW.json` it makes such results of the rows of `nvrar bench`.

The part of README.md between `<!-- table: PATH -->` and `<!-- end of table -->` is replaced by what PATH, a
file of benchmarks/results/, holds in `columns` and `rows`, with where it came from.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HEADINGS = {
    "nccl": "NCCL",
    "nccl registered symmetric pool": "NCCL, registered symmetric pool",
    "symm_mem one-shot": "torch symm_mem one-shot",
    "symm_mem two-shot": "torch symm_mem two-shot",
    "nvrar auto": "nvrar",
}
# What `nvrar bench` calls the same.
CONTENDERS = {
    "torch": "nccl",
    "nccl pool": "nccl registered symmetric pool",
    "symm_mem one-shot": "symm_mem one-shot",
    "symm_mem two-shot": "symm_mem two-shot",
    "auto": "nvrar auto",
}
TIMINGS = {
    "graph": "CUDA graph of 20 calls",
    "interleaved": "CUDA graph of 20 calls with another kernel in front of each, whose time is taken off",
    "host": "one call from the host",
}
_BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def with_table(text: str) -> str:
    """``text`` with its table made anew."""
    return _BLOCK.sub(lambda m: f"{m[1]}{table(json.loads((ROOT / m[2]).read_text()))}{m[3]}", text)


def table(results: dict[str, Any]) -> str:
    lines = [
        f"{results['hardware']}; {results['software']}. {results['method']}; {results['unit']}. "
        f"`{results['script']}` at commit `{results['commit']}`.",
        "",
        "| size | " + " | ".join(HEADINGS.values()) + " | NCCL / nvrar |",
        "|---:" * (len(HEADINGS) + 2) + "|",
    ]
    for row in results["rows"]:
        values = dict(zip(results["columns"], row, strict=True))
        cells = [f"{values[name]:.2f}" for name in HEADINGS]
        cells.append(f"{values['nccl'] / values['nvrar auto']:.2f}")
        lines.append(f"| {size(values['bytes'])} | " + " | ".join(cells) + " |")
    return "\n".join(["", *lines, "", ""])


def size(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB" if num_bytes >= 1 << 20 else f"{num_bytes >> 10} KiB"


def from_bench(lines: list[str]) -> dict[str, Any]:
    """Results as benchmarks/results/ keeps them; of the first timing as the table, of others beside it."""
    rows = [json.loads(line) for line in lines]
    first = rows[0]
    gpus = ", ".join(f"{h['num_ranks']}x {h['gpu'] or h['cpu']}" for h in first["hosts"])
    versions = (("CUDA", "cuda"), ("driver", "driver"), ("torch", "torch"), ("NCCL", "nccl"))
    method = (
        f"{first['dtype']} {first['op']}, {{}}, contenders in turn, median over "
        f"{first['num_samples']} samples of the maximum over ranks"
    )
    by_timing: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_timing.setdefault(row["timing"], []).append(row)
    results: dict[str, Any] = {
        "date": first["timestamp"][:10],
        "commit": (first["git_commit"] or "unknown")[:7],
        "script": first["command"],
        "hardware": f"{gpus}, {first['topology']} ranks",
        "software": ", ".join(f"{name} {first[key]}" for name, key in versions if first[key]),
        "unit": "us a call",
    }
    for timing, part in by_timing.items():
        measured = {"method": method.format(TIMINGS[timing]), **_columns(part)}
        if timing == first["timing"]:
            results |= measured
        else:
            results[timing] = measured
    return results


def _columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    names = list(dict.fromkeys(row["contender"] for row in rows))
    sizes = dict.fromkeys(row["num_bytes"] for row in rows)
    times = {(row["num_bytes"], row["contender"]): row["median_us"] for row in rows}
    return {
        "columns": ["bytes", *(CONTENDERS.get(name, name) for name in names)],
        "rows": [[size, *(times[size, name] for name in names)] for size in sizes],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="source", type=Path)
    parser.add_argument("--to", dest="target", type=Path)
    options = parser.parse_args()
    if options.source and options.target:
        results = from_bench(options.source.read_text().splitlines())
        options.target.write_text(json.dumps(results, indent=1) + "\n")
        return
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text()))


if __name__ == "__main__":
    main()
