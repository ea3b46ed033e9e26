"""Writes the measured table of README.md from the results that it names: python scripts/readme_table.py

The part of README.md between `<!-- table: PATH -->` and `<!-- end of table -->` is replaced by what PATH, a
file of benchmarks/results/, holds in `columns` and `rows`, with where it came from.
"""

from __future__ import annotations

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


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text()))
