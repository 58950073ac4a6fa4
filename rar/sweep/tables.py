"""Leaderboards as files: a row a cell (CSV), arms side by side (markdown, LaTeX), and with the page all written together.

`mllm_calls` counts the pictures that an arm asks the MLLM about; what was answered from `shared/answers` was asked, too.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import numpy as np

from rar import storage
from rar.sweep import page
from rar.sweep.board import Board, Entry, Result, board, results
from rar.sweep.grid import Cell, Grid
from rar.sweep.splits import Split, splits
from rar.sweep.state import Sweep

COLUMNS = [
    *("dataset", "shots", "seed", "encoder", "arm", "top_k", "metric", "top1", "ci_low", "ci_high", "top5"),
    *("candidate_recall", "semantic_similarity", "images", "ranked_fraction", "mllm_calls"),
]


def as_csv(found: Sequence[Result]) -> str:
    """One row a cell."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(COLUMNS)
    for one in found:
        values, cell = one.values, one.cell
        images, share = values.get("images") or 0.0, values.get("ranked_fraction") or 0.0
        further = [values.get(name) for name in ("top5", "candidate_recall", "semantic_similarity")]
        numbers = [one.value, one.low, one.high, *further]
        shown = ["" if number is None or np.isnan(number) else f"{number:.4f}" for number in numbers]
        place = [cell.dataset, cell.shots, cell.seed, cell.encoder, cell.arm, cell.top_k, one.metric]
        rows.writerow([*place, *shown, round(images), f"{share:.4f}", round(images * share)])
    return out.getvalue()


def cell_text(entry: Entry | None, bold: str = "**") -> str:
    if entry is None or np.isnan(entry.value):
        return "–"
    mark = bold if entry.bold else ""
    span = "" if np.isnan(entry.low) else f" [{_dec(entry.low)}, {_dec(entry.high)}]"
    return f"{mark}{_dec(entry.value)}{mark}{span}"


def _dec(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1)


def as_markdown(grid: Grid, made: Board, halved: Sequence[Split] = ()) -> str:
    lines = [
        f"# {grid.title}",
        "",
        "Intervals are 95 % over classes. Bold: better than every other arm of its row (p < .05, Holm).",
        "",
    ]
    heads = [f"`{arm}`" for arm in made.arms] + [f"{name} (published)" for name in made.references]
    lines += ["| " + " | ".join(["data set", "shots", *heads]) + " |", "|---" * (2 + len(heads)) + "|"]
    for row in made.rows:
        shown = [cell_text(row.entries.get(arm)) for arm in made.arms]
        shown += [_dec(row.published[name]) if name in row.published else "–" for name in made.references]
        lines.append(f"| {row.dataset} | {row.shots} | " + " | ".join(shown) + " |")
    if halved:
        lines += [
            "",
            "Base and novel classes, and their harmonic mean H = 2bn / (b + n) with its 95 % interval over classes of both:",
            "",
        ]
        lines += ["| data sets | shots | arm | base | novel | H |", "|---" * 6 + "|"]
        for one in halved:
            value, low, high = one.harmonic()
            both = f"{_dec(one.base[0])} | {_dec(one.novel[0])}"
            lines.append(f"| {one.dataset} | {one.shots} | `{one.arm}` | {both} | {cell_text(Entry(value, low, high, 0.0))} |")
    if made.claims:
        lines += ["", *[f"- {one}" for one in made.claims]]
    if made.differs:
        lines += ["", "Published columns are the paper's (arXiv 2403.13805), not measured here. What differs there:", ""]
        lines += [f"- {one}" for one in made.differs]
    return "\n".join(lines) + "\n"


def as_latex(grid: Grid, made: Board, halved: Sequence[Split] = ()) -> str:
    """Tabulars that compile by themselves; percent, intervals left to the other tables."""
    escape = str.maketrans({"_": r"\_", "&": r"\&", "%": r"\%", "#": r"\#", "$": r"\$"})
    lines = [rf"\begin{{tabular}}{{lr{'r' * len(made.arms)}}}", r"\hline"]
    lines.append(" & ".join(["data set", "shots", *(arm.translate(escape) for arm in made.arms)]) + r" \\ \hline")
    for row in made.rows:
        shown = []
        for arm in made.arms:
            one = row.entries.get(arm)
            text = "--" if one is None or np.isnan(one.value) else f"{100 * one.value:.1f}"
            shown.append(rf"\textbf{{{text}}}" if one is not None and one.bold else text)
        lines.append(" & ".join([row.dataset.translate(escape), str(row.shots), *shown]) + r" \\")
    lines += [r"\hline", r"\end{tabular}", ""]
    if halved:
        lines += [r"\begin{tabular}{lrlrrr}", r"\hline", r"data sets & shots & arm & base & novel & H \\ \hline"]
        for split in halved:
            numbers = [f"{100 * value:.1f}" for value in (split.base[0], split.novel[0], split.harmonic()[0])]
            named = [split.dataset.translate(escape), str(split.shots), split.arm.translate(escape)]
            lines.append(" & ".join([*named, *numbers]) + r" \\")
        lines += [r"\hline", r"\end{tabular}", ""]
    return "\n".join(lines)


def write(sweep: Sweep, every: Sequence[Cell]) -> None:
    """leaderboard.{csv,md,tex} and report.html, from what is done."""
    found = results(sweep, every)
    made, halved = board(sweep.grid, found), splits(sweep.grid, found)
    files = {"csv": as_csv(found), "md": as_markdown(sweep.grid, made, halved), "tex": as_latex(sweep.grid, made, halved)}
    for suffix, text in files.items():
        storage.write(sweep.out / f"leaderboard.{suffix}", text.encode())
    storage.write(sweep.out / "report.html", page.render(sweep, every, found, made, halved).encode())


def summary(sweep: Sweep, every: Sequence[Cell]) -> str:
    """The table for the terminal."""
    found = results(sweep, every)
    return as_markdown(sweep.grid, board(sweep.grid, found), splits(sweep.grid, found))
