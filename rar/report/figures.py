"""The report's plots as inline SVG that takes on the page's colours and font.

matplotlib draws with the marker colours below, and they are replaced by the page's CSS variables: one picture serves light and
dark. Text stays text (readable by screen readers, in the page's font, a tenth of the size of outlines). Figures are
deterministic; `salt` keeps the ids of two figures on one page apart.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, GOOD, BAD = "#010201", "#010202", "#010203", "#010204"
SERIES = ("#010205", "#010206", "#010207", "#010208")
VARIABLES = {INK: "--ink", FAINT: "--line", GOOD: "--good", BAD: "--bad"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES, start=1)
}
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a "$" in a class name or a path is a dollar
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": FAINT,
    "legend.frameon": False,
}
WIDTH = 4.0  # inches, about a phone's column, so that text keeps its size

Interval = tuple[float, float, float]  # value, ci_low, ci_high: fractions; NaN where unknown


def points(names: Sequence[str], series: Mapping[str, Sequence[Interval]], salt: str) -> str:
    """One row a name, one dot a series with its interval, on a percent axis. At most four series."""
    from matplotlib.figure import Figure

    with _style(salt):
        figure = Figure((WIDTH, 0.9 + 0.34 * len(names)), layout="constrained", dpi=72)
        axes = figure.subplots()
        rows = np.arange(len(names))
        shifts = (np.arange(len(series)) - (len(series) - 1) / 2) * 0.16
        for (label, intervals), shift, colour in zip(series.items(), shifts, SERIES, strict=False):
            value, low, high = 100 * np.array(intervals, dtype=np.float64).T
            axes.hlines(rows + shift, low, high, color=colour, linewidth=2)
            axes.plot(value, rows + shift, "o", color=colour, markersize=6, label=label)
        axes.set_yticks(rows, [_short(name) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(axis="x", linewidth=0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(f"{next(iter(series))}, %" if len(series) == 1 else "%")
        if len(series) > 1:
            figure.legend(loc="outside upper center", ncols=len(series), fontsize=9, handletextpad=0.1, columnspacing=1)
        return _svg(figure)


def histogram(parts: Mapping[str, np.ndarray], colours: Sequence[str], xlabel: str, salt: str) -> str:
    """Histogram of the scores (float, finite, any range) of one or more kinds of predictions, each on top of those before."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with _style(salt):
        figure = Figure((WIDTH, 2.5), layout="constrained", dpi=72)
        axes = figure.subplots()
        scores = np.concatenate(list(parts.values())).astype(np.float64)  # 20 edges fit between float32 that are nearly equal
        room = 1e-6 * max(1.0, np.abs(scores).max())  # scores that are equal but for rounding leave none for 20 bars
        even = np.ptp(scores) < room
        bins = np.histogram_bin_edges(scores, 20, (scores.min() - room, scores.max() + room) if even else None).tolist()
        axes.hist(list(parts.values()), bins=bins, stacked=True, color=list(colours), label=list(parts), rwidth=0.86)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        _labels(axes, xlabel, "predictions")
        if len(parts) > 1:
            _legend(figure, len(parts))
        return _svg(figure)


def lines(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], xlabel: str, ylabel: str, salt: str) -> str:
    """One line a curve: (x, y) fractions, drawn in percent. At most four curves."""
    from matplotlib.figure import Figure

    with _style(salt):
        figure = Figure((WIDTH, 2.5), layout="constrained", dpi=72)
        axes = figure.subplots()
        for (label, (x, y)), colour in zip(curves.items(), SERIES, strict=False):
            axes.plot(100 * x, 100 * y, color=colour, linewidth=2, label=_short(label))
            axes.plot(100 * x[-1:], 100 * y[-1:], "o", color=colour, markersize=6)
        _labels(axes, f"{xlabel}, %", f"{ylabel}, %")
        _legend(figure, len(curves))
        return _svg(figure)


def course(points: Sequence[tuple[float, float]], xlabel: str, ylabel: str, salt: str) -> str:
    """One line through (x, y), as they are."""
    from matplotlib.figure import Figure

    with _style(salt):
        figure = Figure((WIDTH, 2.5), layout="constrained", dpi=72)
        axes = figure.subplots()
        axes.plot(*zip(*points, strict=True), color=SERIES[0], linewidth=1.6)
        _labels(axes, xlabel, ylabel)
        return _svg(figure)


def curves(
    series: Mapping[str, Sequence[tuple[float, Interval]]], xlabel: str, ylabel: str, salt: str, *, doubling: bool = False
) -> str:
    """One line a name over (x, (value, low, high)), x rising; y fractions, in percent. A line of one point is a dot.

    doubling: x is 1, 2, 4, ... and evenly spaced; else x is a fraction, in percent, too. Past four, line styles tell apart.
    """
    from matplotlib.figure import Figure

    styles = ("-", "--", ":")
    with _style(salt):
        figure = Figure((WIDTH, 2.9), layout="constrained", dpi=72)
        axes = figure.subplots()
        for number, (label, points_) in enumerate(series.items()):
            colour, style = SERIES[number % len(SERIES)], styles[number // len(SERIES) % len(styles)]
            x = np.array([place for place, _ in points_], np.float64)
            value, low, high = 100 * np.array([interval for _, interval in points_], np.float64).T
            x = np.log2(x) if doubling else 100 * x
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
            axes.plot(x, value, style, marker="o", markersize=4, color=colour, linewidth=1.6, label=_short(label))
        if doubling:
            places = sorted({place for points_ in series.values() for place, _ in points_})
            axes.set_xticks(np.log2(places).tolist(), [f"{place:g}" for place in places])
        _labels(axes, xlabel if doubling else f"{xlabel}, %", f"{ylabel}, %")
        _legend(figure, min(3, len(series)))
        return _svg(figure)


def _style(salt: str) -> AbstractContextManager[None]:
    from matplotlib import rc_context

    settings: Any = STYLE | {"svg.hashsalt": salt}
    return rc_context(settings)


def _labels(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", linewidth=0.6)


def _legend(figure: Figure, columns: int) -> None:
    figure.legend(loc="outside upper center", ncols=columns, fontsize=9)


def _short(name: str) -> str:
    """Names come from users; a long one would squeeze the axes to nothing."""
    return name if len(name) <= 24 else name[:23] + "…"


def _svg(figure: Figure) -> str:
    """The drawing as one <svg> element: no prolog, no fixed size, no styles of its own, page variables for colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", text)  # axes_1 and the like: repeated on a page, never referred to
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text
