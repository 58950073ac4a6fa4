"""The driver's side of training: a Ray Train `TorchTrainer` whose workers each run `train.work`, and what it left behind."""

from __future__ import annotations

import csv
import io
import json
import logging
from pathlib import Path
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchConfig, TorchTrainer

from rar import storage
from rar.config import Config, Placed
from rar.device import pick_device
from rar.engine import pipeline
from rar.engine.replica import model_path
from rar.engine.session import Session
from rar.runfolder import read_table
from rar.schema import Unavailable, UserError, first_line
from rar.tune.train import STATE, STEP, Job, clear_partial, course, last_checkpoint, work

CURVES = ("step", "loss", "grad_norm", "learning_rate", "rank_accuracy", "label_mass")


def fit(session: Session, settings: Config, rows: Path, folder: Path, adapter: Path) -> dict[str, Any]:
    """Train, or go on from the last whole checkpoint in `folder`; writes `adapter`. Returns what is told of the training."""
    tune = settings.tune
    folder.mkdir(parents=True, exist_ok=True)
    clear_partial(folder)
    gpus, cpus = session.reserves(Placed(device=settings.ranker.device, num_gpus=tune.num_gpus))
    threads = session.threads_of(tune.workers)
    job = Job(settings.model_dump_json(), model_path(settings.ranker), str(rows), str(folder), str(adapter), threads)
    on_gpu = pick_device(settings.ranker.device, "ranker.device").type == "cuda" and gpus > 0
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=tune.workers,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": cpus, **({"GPU": gpus} if on_gpu else {})},
        ),
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        run_config=RunConfig(name="ray", storage_path=str(folder.resolve())),
    )
    _, steps = course(settings, read_table(rows))
    try:
        with pipeline.progress(Steps(folder), steps, "tune"):
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _cause(error) from None
    told = json.loads((folder / "told.json").read_text())
    write_curves(folder, folder.parent / "curves.csv")
    return told


class Steps:
    """How far a training is, by what its first worker notes."""

    def __init__(self, folder: Path) -> None:
        self.note = folder / STEP

    def progress(self) -> tuple[int]:
        return (int(self.note.read_text() or 0) if self.note.exists() else 0,)


def _work(given: dict[str, Any]) -> None:
    """In a worker."""
    job: Job = given["job"]
    told = work(job)
    if get_context().get_world_rank() == 0:
        storage.write(Path(job.folder) / "told.json", json.dumps(told).encode())


def _cause(error: Any) -> Exception:
    """What a worker raised, where the user can mend it; else one line of it."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [getattr(error, "controller_failure", error)]
    for failure in failures:
        seen: Any = failure
        while seen is not None:
            if isinstance(seen, UserError):
                return seen
            seen = getattr(seen, "cause", None) or seen.__cause__
    text = str(failures[0]).strip().splitlines()
    named = [line.strip() for line in text if line.startswith("rar.schema.UserError: ")]
    if named:
        return UserError(named[-1].partition(": ")[2])
    return Unavailable(f"training failed: {text[-1] if text else first_line(error)}")


def history(folder: Path) -> list[dict[str, float]]:
    """One record a step, from the last whole checkpoint: what CURVES name, as far as it was measured there."""
    last = last_checkpoint(folder)
    steps: dict[int, dict[str, float]] = {}
    for entry in json.loads((last / STATE).read_text())["log_history"] if last else []:
        record = steps.setdefault(entry["step"], {"step": entry["step"]})
        record |= {name: entry[key] for name in CURVES[1:] for key in (name, f"eval_{name}") if key in entry}
    return [steps[step] for step in sorted(steps)]


def write_curves(folder: Path, target: Path) -> None:
    file = io.StringIO()
    writer = csv.DictWriter(file, CURVES, lineterminator="\n")
    writer.writeheader()
    writer.writerows(record for record in history(folder) if len(record) > 1)
    storage.write(target, file.getvalue().encode())
