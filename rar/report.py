"""One self-contained HTML page from one or more run folders: tables, plots, pictures of what was won, lost and failed.

The page holds everything (pictures as small data URIs, plots as inline SVG, no script) and forbids itself the network, so that
it can be mailed, archived and opened anywhere. Names, paths and model answers are foreign text: the template escapes them.
Numbers come from `metrics.json`; predictions are read again only for plots and pictures, which takes memory in proportion to
their number. Which runs get pictures: those that asked the ranker, else the best of their group.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from rar import figures, metrics, schema
from rar.corpus import read_many
from rar.decode import decode
from rar.runfolder import RunFolder

THUMBNAIL = 144  # longest side in pixels: sharp at 96 CSS pixels on a phone's dense screen
PICTURES = 12  # a gallery shows at most this many
SHOWN_CANDIDATES = 6
ERROR_REASONS = 20
BOX_OVERLAP = 0.5  # least IoU at which a proposal takes the label of a ground-truth box

# Columns of the table of arms: metrics.json key, heading, unit, whether the best is marked.
COLUMNS = (
    ("top1", "Top-1", "%", True),
    ("ap", "AP", "%", True),
    ("ap_rare", "AP rare", "%", True),
    ("ap_common", "AP common", "%", True),
    ("ap_frequent", "AP frequent", "%", True),
    ("top5", "Top-5", "%", True),
    ("candidate_recall", "Candidate recall", "%", True),
    ("conditional_rank_accuracy", "Rank accuracy", "%", True),
    ("rank_gain", "Gain by ranking", "±%", False),
    ("ranked_fraction", "Asked", "%", False),
    ("flips_won", "Won", "", False),
    ("flips_lost", "Lost", "", False),
    ("parse_failures", "Unparsed", "", False),
)
APS = {"AP": "ap", "rare": "ap_rare", "common": "ap_common", "frequent": "ap_frequent"}


@dataclass(frozen=True)
class RunView:
    """One run as its folder tells it. `truth`, `found` and `places` are aligned with the rows of `predictions`."""

    name: str
    group: str
    info: dict[str, Any]  # run.json
    values: dict[str, float | None]  # metrics.json
    predictions: pa.Table
    errors: pa.Table
    index: pa.Table
    places: np.ndarray  # (N,) int64 row of `index`, -1 where its uri is not there
    truth: list[str | None]
    found: metrics.Outcomes

    @property
    def main(self) -> float:
        """The number that runs are compared by: top1, else AP, else nothing."""
        return _number(self.values.get("top1", self.values.get("ap")))


def write_report(runs: Sequence[Path], out: Path, title: str = "Report") -> None:
    """Write the page of these run folders (design 4.2) to `out`, an .html file or a folder that gets `report.html`.

    Runs are grouped by the `group` of their run.json (default: the verb), in the order given. Raises UserError for a folder
    that is not a run. A picture that cannot be read any more becomes a placeholder that says why.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    folders = [read_run(Path(run)) for run in runs]
    if not folders:
        raise schema.UserError("no run folder to report on")
    environment = Environment(loader=PackageLoader("rar", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"decimal": _decimal, "pretty": partial(json.dumps, indent=2, ensure_ascii=False)}
    groups = [_group(name, folders) for name in dict.fromkeys(run.group for run in folders)]
    summaries = [_summary(run) for run in folders]
    stages = list(dict.fromkeys(name for summary in summaries for name in summary["stages"]))
    page = environment.get_template("report.html.j2").render(title=title, groups=groups, runs=summaries, stages=stages)
    target = out / "report.html" if out.is_dir() else out
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page.strip() + "\n", encoding="utf-8")


def read_run(path: Path) -> RunView:
    """Read a run folder. `metrics.json` may be missing (nothing was labelled); `run.json` may not."""
    if not (path / "run.json").is_file():
        raise schema.UserError(f"{path} is not a run folder: it holds no run.json")
    info = json.loads((path / "run.json").read_text())
    values = _metrics(path / "metrics.json")
    folder = RunFolder(path)
    predictions = folder.predictions()
    index = pq.read_table(path / "index.parquet", partitioning=None)
    places = _places(predictions, index)
    truth = _truth(predictions, index, places)
    found = metrics.outcomes(predictions, truth)
    name, group = str(info.get("name", path.name)), str(info.get("group", info["verb"]))
    return RunView(name, group, info, values, predictions, folder.errors(), index, places, truth, found)


def _metrics(file: Path) -> dict[str, float | None]:
    """The numbers of a run. COCO's -1, an AP over no ground truth, is as undefined as null."""
    values = json.loads(file.read_text()) if file.is_file() else {}
    return {key: None if key.startswith("ap") and value == -1 else value for key, value in values.items()}


def _places(predictions: pa.Table, index: pa.Table) -> np.ndarray:
    """(N,) int64: the first row of `index` with each prediction's uri, or -1."""
    found = pc.index_in(predictions["uri"], value_set=index["uri"].combine_chunks())
    return np.asarray(pc.fill_null(found, -1).to_numpy(), dtype=np.int64)


def _truth(predictions: pa.Table, index: pa.Table, places: np.ndarray) -> list[str | None]:
    """The true name of each prediction; None where unknown.

    An image's is the index's `label`. A box's is that of the ground-truth box it overlaps most, by IoU of at least
    BOX_OVERLAP, from the optional columns `boxes_xyxy` (list of lists of 4, pixels) and `box_labels` (list of names).
    """
    if not {"boxes_xyxy", "box_labels"} <= set(index.column_names):
        labels = index["label"].to_pylist()
        return [labels[place] if place >= 0 else None for place in places]
    known = [np.reshape(np.array(boxes or [], dtype=np.float64), (-1, 4)) for boxes in index["boxes_xyxy"].to_pylist()]
    labels = index["box_labels"].to_pylist()
    truth: list[str | None] = []
    for place, box_xyxy in zip(places, predictions["box_xyxy"].to_pylist(), strict=True):
        overlaps = _iou(known[place], np.array(box_xyxy)) if place >= 0 and box_xyxy else np.zeros(0)
        near = len(overlaps) > 0 and overlaps.max() >= BOX_OVERLAP
        truth.append(labels[place][int(overlaps.argmax())] if near else None)
    return truth


def _iou(boxes_xyxy: np.ndarray, box_xyxy: np.ndarray) -> np.ndarray:
    """(B,) intersection over union of (B, 4) boxes with one (4,) box."""
    sides = np.minimum(boxes_xyxy[:, 2:], box_xyxy[2:]) - np.maximum(boxes_xyxy[:, :2], box_xyxy[:2])
    shared = sides.clip(0).prod(axis=1)
    areas = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(axis=1) + (box_xyxy[2:] - box_xyxy[:2]).prod()
    return shared / np.maximum(areas - shared, 1e-9)


def _group(name: str, folders: Sequence[RunView]) -> dict[str, Any]:
    """Everything the template shows of one group of arms."""
    runs = [run for run in folders if run.group == name]
    best = max(runs, key=lambda run: (not math.isnan(run.main), run.main))
    asking = [run for run in runs if run.found.asked.any()]
    columns = [column for column in COLUMNS if any(not math.isnan(_number(run.values.get(column[0]))) for run in runs)]
    low, high = _axis(runs)
    opened = max(asking, key=lambda run: (not math.isnan(run.main), run.main)) if asking else best
    return {
        "name": name,
        "best": best.name if len(runs) > 1 and not math.isnan(best.main) else None,
        "main": ("top1" if "top1" in best.values else "ap", best.main),
        "columns": columns,
        "low": low,
        "high": high,
        "arms": [{"name": run.name, "cells": [_cell(run, runs, column) for column in columns]} for run in runs],
        "figures": _figures(name, runs, opened),
        "galleries": [{"name": run.name, "open": run is opened, "sections": _sections(run)} for run in asking or [best]],
    }


def _cell(run: RunView, runs: Sequence[RunView], column: tuple[str, str, str, bool]) -> dict[str, Any]:
    key, _, unit, mark = column
    value = _number(run.values.get(key))
    shown = [round(_number(other.values.get(key)), 3) for other in runs]
    best = max((number for number in shown if not math.isnan(number)), default=math.nan)
    low, high = (_number(run.values.get(f"{key}.ci_{side}")) for side in ("low", "high"))
    return {
        "key": key,
        "value": value,
        "unit": unit,
        "best": mark and len(runs) > 1 and round(value, 3) == best,
        "low": low,
        "high": high,
    }


def _axis(runs: Sequence[RunView]) -> tuple[float, float]:
    """Ends of the axis of the interval bars, in whole tenths, wide enough for every arm of the group."""
    keys = ("top1", "top1.ci_low", "top1.ci_high", "ap", "ap.ci_low", "ap.ci_high")
    values = [_number(run.values.get(key)) for run in runs for key in keys]
    known = [value for value in values if not math.isnan(value)] or [0.0, 1.0]
    low, high = math.floor(10 * min(known)) / 10, math.ceil(10 * max(known)) / 10
    return low, max(high, low + 0.1)


def _figures(group: str, runs: Sequence[RunView], opened: RunView) -> list[dict[str, str]]:
    """Plots of one group: (title, caption, svg); only those that its runs have numbers for."""
    names, drawn = [run.name for run in runs], []
    series = {"top-1": [_interval(run, "top1") for run in runs]}
    if all(math.isnan(value) for value, _, _ in series["top-1"]):
        series = {label: [_interval(run, key) for run in runs] for label, key in APS.items()}
    series = {label: found for label, found in series.items() if not all(math.isnan(value) for value, _, _ in found)}
    if series and len(runs) > 1:
        svg = figures.points(names, series, salt=f"points {group}")
        drawn.append({"title": "Accuracy by arm", "caption": "Lines are 95 % intervals, where known.", "svg": svg})
    asking = [run for run in runs if (run.found.asked & run.found.labelled).any()][: len(figures.SERIES)]
    if asking:
        curves = {run.name: metrics.asked_curve(run.predictions, run.truth) for run in asking}
        svg = figures.lines(curves, "share the MLLM is asked about", "top-1", salt=f"asked {group}")
        caption = "Asking first where the retriever is least certain (smallest margin between its first two candidates)."
        drawn.append({"title": "Accuracy by how many are asked", "caption": caption, "svg": svg})
    scores = opened.predictions["score"].to_numpy()
    labelled = opened.found.labelled & np.isfinite(scores)
    if labelled.any():
        right, wrong = scores[labelled & opened.found.correct], scores[labelled & ~opened.found.correct]
        caption = f"Arm {opened.name}. The further right and wrong lie apart, the better the score tells them apart."
        svg = figures.right_and_wrong(right, wrong, salt=f"scores {group}")
        drawn.append({"title": "Scores of right and wrong predictions", "caption": caption, "svg": svg})
    return drawn


def _interval(run: RunView, key: str) -> figures.Interval:
    return _number(run.values.get(key)), _number(run.values.get(f"{key}.ci_low")), _number(run.values.get(f"{key}.ci_high"))


def _sections(run: RunView) -> list[dict[str, Any]]:
    """The galleries of one run. Without labels nothing is won or lost: a look at some predictions instead."""
    found = run.found
    won, lost = found.correct & ~found.retriever_correct, found.retriever_correct & ~found.correct
    kinds = [
        ("won", "Won", "The retriever's first candidate was wrong, the final prediction is right.", won),
        ("lost", "Lost", "The retriever's first candidate was right, the final prediction is wrong.", lost),
        ("failed", "Failed", "Wrong before and after ranking.", found.labelled & ~found.correct & ~found.retriever_correct),
    ]
    if not found.labelled.any():
        kinds = [("predicted", "Predictions", "No labels to judge by.", np.ones(len(run.truth), dtype=bool))]
    sections = []
    for kind, title, meaning, chosen in kinds:
        rows = np.flatnonzero(chosen)
        spread = np.unique(np.linspace(0, len(rows) - 1, min(PICTURES, len(rows))).round().astype(int))
        sections.append(
            {"kind": kind, "title": title, "meaning": meaning, "total": len(rows), "cards": _cards(run, rows[spread])}
        )
    return sections


def _cards(run: RunView, rows: np.ndarray) -> list[dict[str, Any]]:
    records = run.predictions.take(pa.array(rows, pa.int64())).to_pylist()
    cards = []
    for row, record, image in zip(rows, records, _load(run, rows), strict=True):
        candidates = _candidates(record, run.truth[row])
        cards.append(
            {
                "truth": run.truth[row],
                "predicted": record["class_name"],
                "proposed": bool(run.found.proposed[row]),
                "status": record["rank_status"],
                "response": record["response"],
                "uri": record["uri"],
                "file": str(record["uri"]).rsplit("/", 1)[-1],
                "pictures": _pictures(image, record["box_xyxy"]),
                "unreadable": str(image) if isinstance(image, schema.RowError) else None,
                "candidates": candidates[:SHOWN_CANDIDATES],
                "more": max(0, len(candidates) - SHOWN_CANDIDATES),
            }
        )
    return cards


def _load(run: RunView, rows: np.ndarray) -> list[np.ndarray | schema.RowError]:
    """Decoded (H, W, 3) uint8 images of these predictions, or why there is none."""
    known = rows[run.places[rows] >= 0]
    index = run.index.take(pa.array(run.places[known], pa.int64()))
    data = read_many(*(index[column].to_pylist() for column in ("uri", "offset", "size")))
    read = dict(zip(known.tolist(), data, strict=True))
    images: list[np.ndarray | schema.RowError] = []
    for row in rows.tolist():
        content = read.get(row, schema.RowError("not in the run's index"))
        try:
            images.append(content if isinstance(content, schema.RowError) else decode(content))
        except schema.RowError as error:
            images.append(error)
    return images


def _pictures(image: np.ndarray | schema.RowError, box_xyxy: Sequence[float] | None) -> list[dict[str, str]]:
    """What a card shows: the picture; for a box its crop, then the picture with the box drawn in."""
    if isinstance(image, schema.RowError):
        return []
    whole = Image.fromarray(image)
    if not box_xyxy:
        return [{"what": "picture", "src": _data_uri(whole)}]
    width, height = whole.size
    left, top = np.clip(np.floor(box_xyxy[:2]), 0, (width - 1, height - 1)).astype(int).tolist()
    right, bottom = np.clip(np.ceil(box_xyxy[2:]), (left + 1, top + 1), whole.size).astype(int).tolist()
    crop = whole.crop((left, top, right, bottom))
    scene = whole.copy()
    scale = THUMBNAIL / max(whole.size)
    scene.thumbnail((THUMBNAIL, THUMBNAIL))
    corners = [value * min(1.0, scale) for value in box_xyxy]
    draw = ImageDraw.Draw(scene)
    draw.rectangle(corners, outline="white", width=4)
    draw.rectangle(corners, outline="#d0006f", width=2)
    return [{"what": "crop", "src": _data_uri(crop)}, {"what": "whole picture with the box", "src": _data_uri(scene)}]


def _data_uri(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _candidates(record: Mapping[str, Any], truth: str | None) -> list[dict[str, Any]]:
    """Candidates in ranked order. Bars are fractions of the row's widest; `chance` is the ranker's, among the candidates."""
    proposed, scores = record["candidates"], record["scores"] or []
    values = np.array([candidate["score"] for candidate in proposed], dtype=np.float64)
    spread = values.max() - values.min() if len(values) else 0.0
    bars = 0.1 + 0.9 * (values - values.min()) / spread if spread > 0 else np.ones(len(values))
    chances = np.exp(np.array(scores) - max(scores)) if len(scores) == len(proposed) and scores else None
    return [
        {
            "name": proposed[position]["class_name"],
            "score": values[position],
            "bar": bars[position],
            "chance": None if chances is None else chances[position] / chances.sum(),
            "was": position + 1,
            "true": proposed[position]["class_name"] == truth,
            "predicted": proposed[position]["class_name"] == record["class_name"],
        }
        for position in record["ranking"]
    ]


def _summary(run: RunView) -> dict[str, Any]:
    """What was run and what it cost: the rows of the runs, errors, timing and config sections."""
    info, counts = run.info, run.info["counts"]
    stages = info.get("stages", {})
    seconds = sum(stage["seconds"] for stage in stages.values()) or 1.0
    return {
        "name": run.name,
        "group": run.group,
        "info": info,
        "counts": counts,
        "adds_up": counts["input"] == counts["ok"] + counts["failed"] + counts["skipped"],
        "rate": counts["ok"] / info["seconds"] if info["seconds"] else math.nan,
        "mllm": info.get("mllm", {"calls": 0, "prompt_tokens": 0, "output_tokens": 0}),
        "stages": {name: {**stage, "share": stage["seconds"] / seconds} for name, stage in stages.items()},
        "errors": _errors(run.errors),
        "config": _without_secrets(info.get("config", {})),
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


def _without_secrets(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {key: "(hidden)" if key == "token" and value else _without_secrets(value) for key, value in config.items()}


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _decimal(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:,.{digits}f}".replace("-", "−")
