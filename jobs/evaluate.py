"""rar evaluate: AP of a COCO-results JSON against a COCO, LVIS or V3Det ground truth."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from jobs.common import guarded
from rar.evaluation.ap import Style

Detections = Annotated[str, typer.Option("--detections", help="COCO-results JSON: image_id, category_id, bbox, score.")]
Truth = Annotated[str, typer.Option("--truth", help="Ground truth JSON: images, annotations, categories.")]
Definition = Annotated[Style, typer.Option("--style", help="Whose definition of AP.")]


def evaluate(detections: Detections, truth: Truth, style: Definition = "coco") -> None:
    """Print AP and AR as a table; the last line of stdout is one JSON object. A group without ground truth is -1.

    Example: rar evaluate --detections runs/lvis/detections.json --truth lvis_v1_val.json --style lvis
    """
    guarded(lambda: run(detections, truth, style))


def run(detections: str, truth: str, style: Style) -> int:
    from rar.evaluation import ap

    values = ap.evaluate(detections, truth, style)
    print(table(values))
    print(json.dumps(values))
    return 0


def table(values: dict[str, float]) -> str:
    """One line a number, to three decimals as the official evaluators print; a group without ground truth has a dash."""
    return "\n".join(f"{name:<12} {f'{value:.3f}' if value >= 0 else '-':>6}" for name, value in values.items())


if __name__ == "__main__":
    typer.run(evaluate)
