"""rar detect CONFIG: boxes of a COCO/LVIS JSON, or a detector's proposals -> class predictions, AP, report."""

from __future__ import annotations

from jobs.classify import run
from jobs.common import ConfigFile, DryRun, Fresh, Out, Sets, guarded


def detect(config_file: ConfigFile, out: Out = None, sets: Sets = None, dry_run: DryRun = False, fresh: Fresh = False) -> None:
    """Recognise the boxes of images against a memory.

    Example: rar detect lvis.yaml --set detect.proposals=boxes.json --out runs/lvis
    """
    guarded(lambda: run("detect", config_file, out, sets or [], dry_run, fresh))


if __name__ == "__main__":
    import typer

    typer.run(detect)
