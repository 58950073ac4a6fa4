"""What the data is, for people: pictures by split and difficulty, recall of the truth, and where it stands in the lists."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rar.config import Config
from rar.tune import draw
from rar.tune.data import POOL, Collected
from rar.tune.draw import Lesson


def of(settings: Config, rows: pa.Table, collected: Collected, lists: dict[str, Any] | None) -> dict[str, Any]:
    """The data card. lists: what became of a preset's windows."""
    first = draw.epoch_of(settings, rows)(0)
    return {
        "preset": settings.tune.preset,
        "pictures": {"failed": collected.failed.num_rows, "skipped": collected.skipped},
        "splits": {name: _split(rows, name, settings.retriever.top_k) for name in dict.fromkeys(rows["split"].to_pylist())},
        "lists": _lists(first) | ({"windows": lists} if lists else {}),
    }


def _split(rows: pa.Table, name: str, top_k: int) -> dict[str, Any]:
    part = rows.filter(pc.equal(rows["split"], name))
    truth = part["truth"].to_numpy()
    per_class = Counter(part["label"].to_pylist()).values()
    deepest = min(POOL, int(pc.max(pc.list_value_length(part["candidates"])).as_py()))
    return {
        "rows": part.num_rows,
        "classes": len(per_class),
        "rows_of_a_class": [min(per_class), max(per_class)],
        "difficulty": dict(sorted(Counter(part["difficulty"].to_pylist()).items())),
        "recall": {str(k): round(float(((truth >= 0) & (truth < k)).mean()), 4) for k in sorted({1, top_k, deepest})},
        "retrieved_position": np.bincount(truth[truth >= 0], minlength=1).tolist(),
    }


def _lists(lessons: list[Lesson]) -> dict[str, Any]:
    """Of the first epoch."""
    refused = sum(lesson.answer == len(lesson.names) for lesson in lessons)
    answers = [lesson.answer for lesson in lessons if lesson.answer < len(lesson.names)]
    return {
        "of_an_epoch": len(lessons),
        "lengths": {str(size): count for size, count in sorted(Counter(len(lesson.names) for lesson in lessons).items())},
        "position_of_the_truth": np.bincount(answers, minlength=1).tolist(),
        "show_none_of_these": sum(lesson.none for lesson in lessons),
        "without_the_truth": refused,
    }


def told(card: dict[str, Any]) -> str:
    """The card in a few lines."""
    counted = card["pictures"]
    lines = [f"  {counted['failed']:,} pictures failed, {counted['skipped']:,} left out (copies, and labels that are no class)"]
    for name, part in card["splits"].items():
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in part["difficulty"].items())
        recall = ", ".join(f"{share:.3f} in {k}" for k, share in part["recall"].items())
        lines.append(f"  {name}: {part['rows']:,} of {part['classes']:,} classes ({kinds}); the truth is {recall}")
    lists = card["lists"]
    lines.append(f"  an epoch has {lists['of_an_epoch']:,} lists, {lists['without_the_truth']:,} of them without the truth")
    if windows := lists.get("windows"):
        kept = f"{windows['kept']:,} of {windows['windows']:,} windows hold the truth ({windows['yield']:.1%})"
        lines.append(f"  {kept}, {windows['truth_first_already']:.1%} of them in the first place already")
    return "\n".join(lines)
