"""The plots of a comparison, as inline SVG."""

from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from megatron_offgrpo.reporting.plots import STYLE, as_svg

COLORS = ("#7a8699", "#0b6e4f", "#c8791b", "#3b6fb6", "#8d4e9e", "#b3372f")
BINS = 8


def color_of(number: int) -> str:
    """The colour of the run with this number, the same in every plot."""
    return COLORS[number % len(COLORS)]


def pass_plot(curves: Sequence[tuple[str, dict[int, float], str]]) -> str:
    """pass@k over k: (label, k -> value, colour)."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.6, 2.9), layout="constrained")
        axes = figure.subplots()
        for label, values, color in curves:
            axes.plot(list(values), list(values.values()), "o-", color=color, label=label, markersize=4)
        ticks = sorted({k for _, values, _ in curves for k in values})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(k) for k in ticks])
        axes.minorticks_off()
        axes.set_xlabel("k")
        axes.set_ylabel("pass@k")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.legend(loc="best")
        return as_svg(figure, "pass")


def length_accuracy_plot(series: Sequence[tuple[str, Sequence[int], Sequence[int], str]]) -> str:
    """Accuracy of responses by their length: (label, tokens, rewards, colour).

    Each point is an equal share of a run's responses, at their median length; its area shows nothing.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(7.6, 2.9), layout="constrained")
        axes = figure.subplots()
        for label, tokens, rewards, color in series:
            x, y = binned(tokens, rewards)
            axes.plot(x, y, "o-", color=color, label=label, markersize=4)
        longest = [max(tokens) / max(1, min(tokens)) for _, tokens, _, _ in series]
        if max(longest) > 20:
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_ylim(-0.04, 1.04)
        axes.set_xlabel("response tokens")
        axes.set_ylabel("share right")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.legend(loc="best")
        return as_svg(figure, "length_accuracy")


def binned(tokens: Sequence[int], rewards: Sequence[int]) -> tuple[list[float], list[float]]:
    """Median length and share right of equal shares of the responses, shortest first."""
    order = np.argsort(tokens, kind="stable")
    parts = np.array_split(order, min(BINS, len(order)))
    lengths, right = np.asarray(tokens), np.asarray(rewards)
    return [float(np.median(lengths[part])) for part in parts], [float(right[part].mean()) for part in parts]


def difference_plot(rows: Sequence[tuple[str, float, tuple[float, float] | None, str]]) -> str:
    """Differences with their 95 % intervals around a line at 0: (label, difference, interval, colour)."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.6, 0.55 * len(rows) + 0.9), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color="#4a5565", linewidth=1)
        for place, (_, difference, interval, color) in enumerate(rows):
            if interval is not None:
                axes.plot(interval, [place, place], color=color, linewidth=7, alpha=0.35, solid_capstyle="round")
            axes.plot([difference], [place], "o", color=color, markersize=8)
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:+.0f}" if value else "0"))
        axes.set_xlabel("points of accuracy against the first run")
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        return as_svg(figure, "difference")
