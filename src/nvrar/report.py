# SPDX-License-Identifier: Apache-2.0
"""Measurements as people read them: a table for the terminal, a picture for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from nvrar.bench import Measurement
from nvrar.contenders import BASELINE
from nvrar.units import format_size, format_time

PICTURES = (".svg", ".png", ".pdf")
# Okabe and Ito's eight: told apart by colour-blind readers, and by the markers in grey print.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C00")
_MARKERS = "oDs^vPX*"


# What a sample is, by Measurement.timing.
SAMPLES = {
    "host": "a call, timed from the host",
    "graph": "a call among others, back to back in a CUDA graph",
    "interleaved": "a call between other kernels in a CUDA graph, less what these take alone",
}


def of_timing(measurements: Sequence[Measurement], timing: str) -> list[Measurement]:
    return [m for m in measurements if m.timing == timing]


def headline(provenance: Mapping[str, Any]) -> str:
    """Hardware, topology and type of a run in one line."""
    hosts = provenance["hosts"]
    first = hosts[0]
    what = first["gpu"] or f"{first['cpu']}, {first['num_cores']} cores"
    where = f"{len(hosts)} hosts of {what}" if len(hosts) > 1 else what
    nodes, ranks = provenance["topology"].split("x")
    backend, link = provenance["backend"], provenance.get("link")
    carried = backend if link in (None, backend) else f"{backend}; nvrar: {link}"
    return (
        f"{provenance['op']} of {provenance['dtype']}, {nodes} nodes x {ranks} ranks "
        f"on {where} ({carried})"
    )


def table(
    measurements: Sequence[Measurement], provenance: Mapping[str, Any], with_predictions: bool
) -> Group:
    """Medians by size and contender, times how much faster than torch, and what fell back. Of one timing."""
    names = list(dict.fromkeys(m.contender for m in measurements))
    by_place = {(m.num_bytes, m.contender): m for m in measurements}
    cells = Table()
    for heading in ("size", *names):
        cells.add_column(heading, justify="right")
    for size in dict.fromkeys(m.num_bytes for m in measurements):
        line = [by_place[size, name] for name in names]
        baseline = by_place.get((size, BASELINE))
        cells.add_row(format_size(size), *(_cell(m, baseline, with_predictions) for m in line))
    legend = (
        f"median us of {SAMPLES[measurements[0].timing]}, the longest over the ranks; "
        "xN: torch's time is N times as long"
    )
    if with_predictions:
        legend += "; ~: predicted by the cost model"
    notes = [
        f"* {m.contender} at {format_size(m.num_bytes)}: {num_calls} of {len(m.samples_us)} calls fell "
        f"back to torch.distributed ({reason})"
        for m in measurements
        for reason, num_calls in m.fallbacks.items()
    ]
    return Group(Text(headline(provenance), "bold"), cells, Text("\n".join([legend, *notes])))


def picture(measurements: Sequence[Measurement], provenance: Mapping[str, Any], path: Path) -> None:
    """Latency against size, both logarithmic, 10th to 90th percentile as a band; by ``path``'s suffix."""
    # Here, for it takes a second to import; and no pyplot, which would keep figures for the process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, name in enumerate(dict.fromkeys(m.contender for m in measurements)):
        line = sorted((m for m in measurements if m.contender == name), key=lambda m: m.num_bytes)
        sizes = [m.num_bytes for m in line]
        colour = _COLOURS[i % len(_COLOURS)]
        fell_back = any(m.fallbacks for m in line)
        axes.plot(
            sizes,
            [m.median_us for m in line],
            color=colour,
            marker=_MARKERS[i % len(_MARKERS)],
            linestyle="--" if name == BASELINE else ("-", ":")[i >= len(_COLOURS)],
            label=_label(name, line) + (" (fell back to torch)" if fell_back else ""),
        )
        axes.fill_between(
            sizes,
            [m.percentile_us(10) for m in line],
            [m.percentile_us(90) for m in line],
            color=colour,
            alpha=0.15,
            linewidth=0,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: format_size(size)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda t, _: format_time(t)))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # a decade may be all there is
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("message size")
    axes.set_ylabel("time of one all-reduce (median, 10-90 % band)")
    axes.set_title(headline(provenance), fontsize=10, wrap=True)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _cell(m: Measurement, baseline: Measurement | None, with_predictions: bool) -> str:
    text = f"{m.median_us:.0f}" if m.median_us >= 100 else f"{m.median_us:.1f}"
    if baseline is not None and m is not baseline:
        text += f"  x{baseline.median_us / m.median_us:.2f}"
    if m.fallbacks:
        text += " *"
    if with_predictions and m.predicted_us is not None:
        text += f"\n~{m.predicted_us:.0f}"
    return text


def _label(name: str, line: Sequence[Measurement]) -> str:
    """The name, and the word behind it where it is one for all sizes."""
    words = {m.plan for m in line}
    word = next(iter(words)) if len(words) == 1 else None
    return name if word in (None, name) else f"{name}: {word}"
