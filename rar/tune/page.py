"""The page of a tuning: before and after, the curves, pictures won and lost. One file, no script."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from rar import storage
from rar.corpus.decode import decode
from rar.report import figures
from rar.report.cards import THUMBNAIL, data_uri
from rar.report.page import percent
from rar.report.view import number
from rar.runfolder import RunFolder
from rar.schema import RowError, UserError
from rar.tune.pictures import Pictures

CARDS = 12
BESIDE = {
    "consistency": "Same pick when turned",
    "label_mass": "Mass of labels",
    "rejection_auroc": "AUROC of rejection",
    "parse_failures": "Unparsed",
}


def write(folder: RunFolder, rows: pa.Table, before: pa.Table, after: pa.Table) -> None:
    """Write report.html of a run that has ended."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    info, values = folder.read("run.json"), folder.read("metrics.json")
    loader = ChoiceLoader([PackageLoader("rar.tune", "."), PackageLoader("rar.report", ".")])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    settings = info["config"]
    page = environment.get_template("page.html.j2").render(
        title=f"rar tune: {info['name']}",
        model=settings["ranker"]["model"],
        method=settings["ranker"]["method"],
        preset=settings["tune"]["preset"],
        seed=settings["run"]["seed"],
        adapter=str(folder.path / "adapter"),
        headings=list(BESIDE.values()),
        rows=_table(values),
        figures=_curves(folder),
        sections=_galleries(rows, before, after),
        card=json.dumps(folder.read("data_card.json"), indent=1),
        config=yaml.safe_dump({name: settings[name] for name in ("tune", "ranker", "retriever", "run")}, sort_keys=False),
    )
    storage.write(folder.path / "report.html", (page.strip() + "\n").encode())


def _table(values: Mapping[str, float | None]) -> list[dict[str, Any]]:
    rows = []
    for key in (key.removeprefix("gain.") for key in values if key.startswith("gain.") and ".ci_" not in key):
        name, _, size = key.partition(".conditional_rank_accuracy")
        cells = [_cell(values, f"{when}.{key}", signed=when == "gain") for when in ("before", "after", "gain")]
        cells += [_moved(values, f"{name}.{metric}", metric) if not size else {"text": "", "range": ""} for metric in BESIDE]
        rows.append({"name": name + size.replace("_at_", ", lists of "), "cells": cells})
    return rows


def _cell(values: Mapping[str, float | None], key: str, *, signed: bool) -> dict[str, str]:
    value, low, high = (number(values.get(f"{key}{end}")) for end in ("", ".ci_low", ".ci_high"))
    sign = "+" if signed and value > 0 else ""
    return {"text": sign + percent(value), "range": "" if math.isnan(low) else f"{percent(low)} to {percent(high)}"}


def _moved(values: Mapping[str, float | None], key: str, metric: str) -> dict[str, str]:
    before, after = (number(values.get(f"{when}.{key}")) for when in ("before", "after"))
    if metric == "parse_failures":
        return {"text": f"{after:.0f}", "range": f"{before:.0f} before"}
    return {"text": percent(after), "range": f"{percent(before)} before"}


def _curves(folder: RunFolder) -> list[dict[str, str]]:
    with (folder.path / "curves.csv").open() as file:
        steps = list(csv.DictReader(file))
    drawn = []
    for name, title, caption in (
        ("loss", "Loss", "Of each step's lists."),
        ("rank_accuracy", "Rank accuracy", "Of each checkpoint, on pictures kept out of training."),
    ):
        points = [(float(step["step"]), float(step[name])) for step in steps if step[name]]
        if points:
            svg = figures.course(points, "step", name.replace("_", " "), salt=name)
            drawn.append({"title": title, "caption": caption, "svg": svg})
    return drawn


def _galleries(rows: pa.Table, before: pa.Table, after: pa.Table) -> list[dict[str, Any]]:
    pictures, records = Pictures(rows), list(zip(before.to_pylist(), after.to_pylist(), strict=True))
    shown = []
    for title, meaning, won in (
        ("Won", "Wrong before, right after.", True),
        ("Lost", "Right before, wrong after.", False),
    ):
        chosen = [(one, other) for one, other in records if one["right"] != other["right"] and other["right"] == won]
        places = np.unique(np.linspace(0, len(chosen) - 1, min(CARDS, len(chosen))).round().astype(int))
        cards = [
            {
                "set": f"{one['set']}, lists of {one['size']}",
                "truth": one["label"],
                "before": one["pick"],
                "after": other["pick"],
                "picture": _thumbnail(pictures, one["row"]),
            }
            for one, other in (chosen[place] for place in places)
        ]
        shown.append({"title": title, "meaning": meaning, "total": len(chosen), "cards": cards})
    return shown


def _thumbnail(pictures: Pictures, row: int) -> str | None:
    try:
        return data_uri(decode(pictures.encoded([row])[0]), THUMBNAIL)
    except (RowError, UserError, OSError):
        return None
