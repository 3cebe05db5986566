"""The report's plots, as inline SVG."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

BASE, FINAL, TEACHER = "#7a8699", "#0b6e4f", "#c8791b"
RIGHT, WRONG = "#0b6e4f", "#b3372f"
INK = "#1c2430"
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa4b2",
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ee",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@dataclass(frozen=True)
class Line:
    """One curve of a plot."""

    field: str
    """Name in metrics.jsonl."""
    color: str
    label: str | None = None


def accuracy_plot(rows: Sequence[tuple[str, float, tuple[float, float] | None, str]]) -> str:
    """Points with 95 % intervals, one row each: (label, accuracy, interval, colour)."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.6, 0.55 * len(rows) + 0.8), layout="constrained")
        axes = figure.subplots()
        for place, (_, accuracy, interval, color) in enumerate(rows):
            if interval is not None:
                axes.plot(interval, [place, place], color=color, linewidth=7, alpha=0.35, solid_capstyle="round")
            axes.plot([accuracy], [place], "o", color=color, markersize=8)
            edge = accuracy if interval is None else interval[1]
            axes.annotate(
                f"{100 * accuracy:.1f} %",
                (edge, place),
                (10, 0),
                textcoords="offset points",
                va="center",
                weight="bold",
            )
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 1.08)
        axes.set_xticks(np.arange(0, 1.01, 0.2))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        return as_svg(figure, "accuracy")


def curve_plot(name: str, title: str, unit: str, steps: Sequence[dict[str, float]], lines: Sequence[Line]) -> str:
    """Curves over optimizer steps; a step that lacks a value leaves it out. Empty text where no step has any."""
    drawn = [(line, [(row["step"], row[line.field]) for row in steps if line.field in row]) for line in lines]
    drawn = [(line, points) for line, points in drawn if points]
    if not drawn:
        return ""
    with rc_context(STYLE):
        figure = Figure(figsize=(3.9, 2.5), layout="constrained")
        axes = figure.subplots()
        for line, points in drawn:
            x, y = zip(*points, strict=True)
            style: dict[str, Any] = {"marker": "o", "markersize": 3} if len(points) < 12 else {}
            axes.plot(x, y, color=line.color, label=line.label, **style)
        values = [value for _, points in drawn for _, value in points]
        if min(values) == max(values):  # a constant, drawn in the middle of an axis from 0
            axes.set_ylim(*sorted((0.0, 2 * values[0] or 1.0)))
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        if any(line.label for line, _ in drawn):
            axes.legend(loc="lower right", bbox_to_anchor=(1.02, 0.98), ncols=2, borderpad=0, columnspacing=1.2)
        return as_svg(figure, name)


def length_plot(series: Sequence[tuple[str, Sequence[int], str]]) -> str:
    """Shares of responses by length, as step outlines: (label, lengths in tokens, colour)."""
    longest = max(max(lengths) for _, lengths, _ in series)
    shortest = min(min(lengths) for _, lengths, _ in series)
    bins = np.linspace(shortest - 0.5, longest + 0.5, min(40, longest - shortest + 1) + 1)
    with rc_context(STYLE):
        figure = Figure(figsize=(7.6, 2.6), layout="constrained")
        axes: Axes = figure.subplots()
        for label, lengths, color in series:
            weights = np.full(len(lengths), 1 / len(lengths))
            text = f"{label} (mean {np.mean(lengths):.0f})"
            axes.hist(
                lengths, bins=list(bins), weights=weights, histtype="step", color=color, linewidth=1.8, label=text
            )
        axes.set_xlabel("response tokens")
        axes.set_ylabel("share of responses")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.legend(loc="upper right")
        return as_svg(figure, "lengths")


def bar_plot(name: str, rows: Sequence[tuple[str, float, str]], unit: str) -> str:
    """Horizontal bars, (label, value, colour), each with its value written beside it."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.6, 0.32 * len(rows) + 0.6), layout="constrained")
        axes = figure.subplots()
        bars = axes.barh(
            [row[0] for row in rows], [row[1] for row in rows], color=[row[2] for row in rows], height=0.62
        )
        axes.bar_label(bars, labels=[f"{row[1]:.3g}" if row[1] < 100 else f"{row[1]:.0f}" for row in rows], padding=5)
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.margins(x=0.1)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        return as_svg(figure, name)


def as_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element whose ids are its own: several stand in one page."""
    buffer = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    return re.sub(r'xlink:href="#', f'xlink:href="#{name}-', text)
