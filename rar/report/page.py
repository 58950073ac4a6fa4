"""One self-contained HTML page from one or more run folders: tables, plots, pictures of what was won, lost and wrong.

The page holds everything (pictures as small data URIs, plots as inline SVG, no script) and forbids itself the network, so that
it can be mailed, archived and opened anywhere. Names, paths and model answers are foreign text: the template escapes them.
Numbers come from `metrics.json`; predictions are read again only for plots and pictures, of a large run some shards alone (see
view.SHOWN), so that its page takes no more memory than that of a small one. Which runs get pictures: those that asked the
ranker, else the best of their group. Whole scenes are shown of one run a group, the one whose pictures are unfolded.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from rar import identity, storage
from rar.evaluation import metrics
from rar.report import cards, classes, figures
from rar.report.against import comparison
from rar.report.view import RunView, number, read_run
from rar.schema import UserError

if TYPE_CHECKING:
    from jinja2 import Template

ERROR_REASONS = 20
FREQUENT_NAMES = 12

# Columns of the table of arms: metrics.json key, heading, unit, whether the best is marked.
COLUMNS = (
    ("top1", "Top-1", "%", True),
    ("ap", "AP", "%", True),
    ("ap50", "AP50", "%", True),
    ("ap75", "AP75", "%", True),
    ("proposal_recall", "Proposal recall", "%", True),
    ("top5", "Top-5", "%", True),
    ("candidate_recall", "Candidate recall", "%", True),
    ("conditional_rank_accuracy", "Rank accuracy", "%", True),
    ("rank_gain", "Gain by ranking", "±%", False),
    ("ranked_fraction", "Asked", "%", False),
    ("mean_k", "Shown when asked", "mean", False),
    ("flips_won", "Won", "", False),
    ("flips_lost", "Lost", "", False),
    ("parse_failures", "Unparsed", "", False),
)
# The table by group: metrics.json prefix, heading, keys of the number over all groups (the first that is there).
BY_GROUP = (
    ("ap", "AP", ("ap",)),
    ("top1", "Top-1", ("top1",)),
    ("candidate_recall", "Candidate recall", ("candidate_recall",)),
    ("proposal_recall", "Proposal recall", ("proposal_recall",)),
    ("ar", "AR", ("ar_100", "ar_300")),
)
MLLM = (
    ("calls", "MLLM calls"),
    ("candidates", "Candidates shown"),
    ("prompt_tokens", "Prompt tokens"),
    ("output_tokens", "Output tokens"),
)
NO_CALLS = dict.fromkeys((key for key, _ in MLLM), 0)
SIZES, FREQUENCIES = ("small", "medium", "large"), ("rare", "common", "frequent")
AP_BY_FREQUENCY = {"AP": "ap", "rare": "ap_rare", "common": "ap_common", "frequent": "ap_frequent"}


def write_report(runs: Sequence[Path], out: Path, title: str = "Report", against: Path | None = None) -> None:
    """Write the page of these run folders (design 4.2) to `out`, an .html file or a folder that gets `report.html`.

    Runs are grouped by the `group` of their run.json (default: the verb), in the order given; memories are shown by what they
    hold. against: a run that each of the others is compared with, picture by picture. Raises UserError for a folder that is not
    a run, and for one that shares no picture with `against`. A picture that cannot be read any more becomes a placeholder that
    says why.
    """
    folders = [read_run(run) for run in runs if run != against]
    if not folders:
        raise UserError("no run folder to report on" + (", other than that of --against" if against else ""))
    comparisons = []
    if against is not None:
        other = read_run(against)
        comparisons = [comparison(run, other) for run in folders if run.info["verb"] != "memory"]
        folders.append(other)
    arms = [run for run in folders if run.info["verb"] != "memory"]
    memories = [{"name": run.name, "values": run.values} for run in folders if run.info["verb"] == "memory"]
    groups = [_group(name, arms) for name in dict.fromkeys(run.group for run in arms)]
    summaries = [_summary(run) for run in folders]
    stages = list(dict.fromkeys(name for summary in summaries for name in summary["stages"]))
    asked = [column for column in MLLM if any(summary["mllm"][column[0]] for summary in summaries)]
    page = _template().render(
        title=title, groups=groups, comparisons=comparisons, memories=memories, runs=summaries, stages=stages, asked=asked
    )
    target = out / "report.html" if out.is_dir() else out
    target.parent.mkdir(parents=True, exist_ok=True)
    storage.write(target, (page.strip() + "\n").encode())


@cache  # a sweep writes a page a cell, and compiling takes a third of that
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("rar.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"decimal": _decimal, "pretty": partial(json.dumps, indent=2, ensure_ascii=False)}
    environment.globals["percent"] = percent
    return environment.get_template("report.html.j2")


def _group(name: str, folders: Sequence[RunView]) -> dict[str, Any]:
    """Everything the template shows of one group of arms."""
    runs = [run for run in folders if run.group == name]
    best = max(runs, key=lambda run: (not math.isnan(run.main), run.main))
    asking = [run for run in runs if run.found.asked.any()]
    columns = [column for column in COLUMNS if _telling(runs, column)]
    low, high = _axis(runs)
    opened = max(asking, key=lambda run: (not math.isnan(run.main), run.main)) if asking else best
    return {
        "name": name,
        "best": best.name if len(runs) > 1 and not math.isnan(best.main) else None,
        "main": ("top1" if "top1" in best.values else "ap", best.main),
        "columns": columns,
        "bar": bool(columns) and columns[0][0] in ("top1", "ap"),
        "low": low,
        "high": high,
        "arms": [{"name": run.name, "cells": [_cell(run, runs, column) for column in columns]} for run in runs],
        "by_group": _by_group(runs),
        "figures": _figures(name, runs, opened),
        "note": opened.boxes.note if opened.boxes else None,
        "drawn": [(run.name, len(run.truth), run.info["counts"]["ok"]) for run in runs],
        "names": [] if opened.found.labelled.any() else _frequent_names(opened),
        "opened": opened.name,
        "weakest": classes.weakest(opened),
        "pairs": classes.pairs(opened),
        "scenes": cards.scenes(opened),
        "galleries": [{"name": run.name, "open": run is opened, "sections": cards.sections(run)} for run in asking or [best]],
    }


def _cell(run: RunView, runs: Sequence[RunView], column: tuple[str, str, str, bool]) -> dict[str, Any]:
    key, _, unit, mark = column
    value = number(run.values.get(key))
    shown = [round(number(other.values.get(key)), 3) for other in runs]
    best = max((other for other in shown if not math.isnan(other)), default=math.nan)
    low, high = (number(run.values.get(f"{key}.ci_{side}")) for side in ("low", "high"))
    return {
        "key": key,
        "value": value,
        "unit": unit,
        "best": mark and len(runs) > 1 and round(value, 3) == best,
        "low": low,
        "high": high,
    }


def _by_group(runs: Sequence[RunView]) -> dict[str, Any] | None:
    """The numbers by size and by frequency group, a part for each kind of number; None where there are none.

    A part whose arms all have the same numbers, such as the recall of proposals that they share, has one row.
    """
    prefixes = [prefix for prefix, _, _ in BY_GROUP]
    groups = [name for name in SIZES + FREQUENCIES if any(_known(runs, f"{prefix}_{name}") for prefix in prefixes)]
    parts = []
    for prefix, heading, overall in BY_GROUP:
        if not any(_known(runs, f"{prefix}_{name}") for name in groups):
            continue
        first = next((key for key in overall if _known(runs, key)), overall[0])
        columns = [(key, "", "%", True) for key in (first, *(f"{prefix}_{name}" for name in groups))]
        rows = [{"name": run.name, "cells": [_cell(run, runs, column) for column in columns]} for run in runs]
        values = [[run.values.get(key) for key, *_ in columns] for run in runs]
        if len(runs) > 1 and all(others == values[0] for others in values):
            rows = [{"name": "every arm", "cells": [{**_cell(runs[0], runs, column), "best": False} for column in columns]}]
        parts.append({"heading": heading, "rows": rows})
    return {"groups": groups, "parts": parts} if parts else None


def _telling(runs: Sequence[RunView], column: tuple[str, str, str, bool]) -> bool:
    """Whether a column of the table of arms says anything: one of no ranker's doings is 0 in all runs."""
    key, _, _, mark = column
    values = [number(run.values.get(key)) for run in runs]
    return any(not math.isnan(value) and (mark or value != 0) for value in values)


def _known(runs: Sequence[RunView], key: str) -> bool:
    return any(not math.isnan(number(run.values.get(key))) for run in runs)


def _frequent_names(run: RunView) -> list[dict[str, Any]]:
    """The classes predicted most often: what there is to see of a run that nothing judges."""
    counts = Counter(run.predictions["class_name"].drop_null().to_pylist())
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:FREQUENT_NAMES]
    return [{"name": name, "count": count, "share": count / len(run.truth)} for name, count in ordered]


def _axis(runs: Sequence[RunView]) -> tuple[float, float]:
    """Ends of the axis of the interval bars, in whole tenths, wide enough for every arm of the group."""
    keys = ("top1", "top1.ci_low", "top1.ci_high", "ap", "ap.ci_low", "ap.ci_high")
    values = [number(run.values.get(key)) for run in runs for key in keys]
    known = [value for value in values if not math.isnan(value)] or [0.0, 1.0]
    low, high = math.floor(10 * min(known)) / 10, math.ceil(10 * max(known)) / 10
    return low, max(high, low + 0.1)


def _figures(group: str, runs: Sequence[RunView], opened: RunView) -> list[dict[str, str]]:
    """Plots of one group: title, caption, svg; only those that its runs have numbers for."""
    drawn = []
    for title, keys in ("Accuracy by arm", {"top-1": "top1"}), ("AP by arm", AP_BY_FREQUENCY):
        series = {label: [_interval(run, key) for run in runs] for label, key in keys.items() if _known(runs, key)}
        if series and len(runs) > 1:
            svg = figures.points([run.name for run in runs], series, salt=f"{title} {group}")
            drawn.append({"title": title, "caption": "Lines are 95 % intervals, where known.", "svg": svg})
    asking = [run for run in runs if (run.found.asked & run.found.labelled).any()][: len(figures.SERIES)]
    if asking:
        curves = {run.name: metrics.asked_curve(run.predictions, run.truth) for run in asking}
        svg = figures.lines(curves, "share the MLLM is asked about", "top-1", salt=f"asked {group}")
        caption = "Asking first where the retriever is least certain (smallest margin between its first two candidates)."
        drawn.append({"title": "Accuracy by how many are asked", "caption": caption, "svg": svg})
    return drawn + _score_figure(group, opened)


def _score_figure(group: str, run: RunView) -> list[dict[str, str]]:
    scores = run.predictions["score"].to_numpy()
    finite, labelled, correct = np.isfinite(scores), run.found.labelled, run.found.correct
    if not finite.any():
        return []
    title, caption = "Scores of the predictions", f"Arm {run.name}. Nothing tells which are right."
    parts, colours = {"predictions": scores[finite]}, [figures.SERIES[0]]
    if (finite & labelled).any():
        title = "Scores of right and wrong predictions"
        caption = f"Arm {run.name}. The further right and wrong lie apart, the better the score tells them apart."
        parts = {"right": scores[finite & correct], "wrong": scores[finite & labelled & ~correct]}
        colours = [figures.GOOD, figures.BAD]
    svg = figures.histogram(parts, colours, "score of the prediction", salt=f"scores {group}")
    return [{"title": title, "caption": caption, "svg": svg}]


def _interval(run: RunView, key: str) -> figures.Interval:
    return number(run.values.get(key)), number(run.values.get(f"{key}.ci_low")), number(run.values.get(f"{key}.ci_high"))


def _summary(run: RunView) -> dict[str, Any]:
    """What was run and what it cost: the rows of the runs, errors, timing and config sections."""
    info, counts = run.info, run.info["counts"]
    stages = info.get("stages", {})
    seconds = sum(stage["seconds"] for stage in stages.values()) or 1.0
    return {
        "name": run.name,
        "group": run.group,
        "info": info,
        "fingerprint": identity.fingerprint(info["identity"]),
        "counts": counts,
        "adds_up": counts["input"] == counts["ok"] + counts["failed"] + counts["skipped"],
        "rate": counts["ok"] / info["seconds"] if info["seconds"] else math.nan,
        "mllm": NO_CALLS | info.get("mllm", {}),
        "stages": {name: {**stage, "share": stage["seconds"] / seconds} for name, stage in stages.items()},
        "errors": _errors(run.errors),
        "config": info["config"],
    }


def _errors(errors: pa.Table) -> list[dict[str, Any]]:
    """Most frequent (stage, reason) with their first examples. A row's own path is cut out: equal faults count as one."""
    examples: dict[tuple[str, str], list[str]] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for row in errors.to_pylist():
        uri = row["uri"] or ""
        reason = (row["error"] or "").replace(uri, "…") if uri else row["error"] or ""
        counts[row["stage"], reason] += 1
        examples.setdefault((row["stage"], reason), []).append(uri)
    return [
        {"stage": key[0], "reason": key[1], "count": count, "examples": examples[key][:3]}
        for key, count in counts.most_common(ERROR_REASONS)
    ]


def _decimal(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:,.{digits}f}".replace("-", "−")


def percent(fraction: float, digits: int = 1) -> str:
    return _decimal(100 * fraction, digits)
