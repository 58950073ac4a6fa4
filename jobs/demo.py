"""rar demo: the whole main job on the built-in miniature world, offline, on this machine.

Draws photos and scenes, builds three memories (novel classes, seen classes, the scenes' classes), then runs six arms over the
same embedded images: what each adds is seen by comparing two of them. Each arm is an ordinary run folder.
"""

from __future__ import annotations

import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.common import guarded, quiet, say

if TYPE_CHECKING:
    from rar.engine.session import Session

NEAREST = {"mode": "knn", "n_neighbors": 20, "sharpness": 1000.0}  # the paper's rule: a class is as near as its nearest image
FREE_TEXT = {"method": "generate", "max_new_tokens": 48, "batch_size": 64}
ARMS: dict[str, dict[str, Any]] = {
    "zero_shot": {"retriever": {"mode": "text"}, "ranker": {"method": "none"}},
    "knn": {"retriever": NEAREST, "ranker": {"method": "none"}},
    "retriever": {"retriever": {"mode": "fused"}, "ranker": {"method": "none"}},
    "mllm_only": {"retriever": {"mode": "all"}, "ranker": FREE_TEXT},
    "rar_paper": {"retriever": NEAREST, "ranker": FREE_TEXT},
    "rar": {"retriever": {"mode": "fused"}, "ranker": {"method": "letters"}},
}
ALWAYS = ("mllm_only", "rar_paper")  # the ranker's order is final, as in the paper
BOXES = {"crop": {"size": 96, "outside": "blur"}, "shown": {"size": 96}}  # as the small models' figures were measured
TASKS = ("novel", "seen", "scenes")
EVERY = 60  # mllm_only reads 120 or more names an image: it is asked for every 60th one

Out = Annotated[Path, typer.Option("--out", help="Folder for the world, the memories and the runs.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=8, help="World seed: other photos and other novel classes.")]
Shots = Annotated[int, typer.Option("--shots", min=1, help="Support photos a class.")]
Tests = Annotated[int, typer.Option("--tests", min=1, help="Test photos a novel class; a seen class has half as many.")]
Scenes = Annotated[int, typer.Option("--scenes", min=1, help="Pictures with boxes for detection.")]


def demo(out: Out = Path("runs/demo"), seed: Seed = 0, shots: Shots = 4, tests: Tests = 9, scenes: Scenes = 100) -> None:
    """Run retrieve-and-rank on the miniature world: memory, classify, detect, report, and a table of arms.

    Example: rar demo --seed 1 --out runs/demo1
    """
    guarded(lambda: run(out, seed, shots, tests, scenes))


def run(out: Path, seed: int, shots: int, tests: int, scenes: int) -> int:
    quiet()
    started = time.monotonic()
    from rar.miniature.data import write_world

    say(f"drawing the world of seed {seed}: 120 novel and 120 seen classes, {scenes} scenes")
    with ThreadPoolExecutor(1) as pool:  # Ray and Milvus start while the photos are drawn
        drawn = pool.submit(write_world, out / "world", seed, shots=shots, tests=tests, scenes=scenes)
        metrics, folders = _run_arms(out, seed, started, drawn)
    _report(out, metrics, folders)
    print(table(metrics))
    say(f"report: {out / 'report.html'}   metrics: {out / 'metrics.json'}   {metrics['seconds']:.0f} s")
    return 0


def settings_of(out: Path, seed: int, task: str, arm: str) -> Any:
    """The config of one arm on one task, as a user would write it in YAML."""
    from rar import config

    world = out / "world"
    support = {"uri": str(world / task / "support")}
    classes: Any = None
    corpus: dict[str, Any] = {"uri": str(world / task / "test")}
    if task == "scenes":
        support = {"uri": str(world / "scenes_support.csv")}
        classes, corpus = str(world / "scenes.json"), {"uri": str(world / "scenes.json")}
    data = {
        "corpus": corpus,
        "memory": {"name": task, "uri": str(out / "memory.milvus"), "support": support, "classes": classes},
        "detect": BOXES,
        "run": {"seed": seed},
        "route": {"mode": "always" if arm in ALWAYS else "calibrated"},
        **ARMS[arm],
    }
    return config.validated(config.Config, data)


def _run_arms(out: Path, seed: int, started: float, drawn: Future[None]) -> tuple[dict[str, float], list[Path]]:
    from rar.engine import client, session
    from rar.miniature.data import write_scene_support
    from rar.run import build

    shutil.rmtree(out / "runs", ignore_errors=True)
    shutil.rmtree(out / "memory.milvus", ignore_errors=True)
    metrics: dict[str, float] = {}
    folders: list[Path] = []
    with session.opened(settings_of(out, seed, "novel", "rar").memory, create=True) as opened, ThreadPoolExecutor(1) as pool:
        rankers = [settings_of(out, seed, "novel", arm).ranker for arm in ("rar", *ALWAYS)]
        deployed = [pool.submit(client.deploy, opened, ranker) for ranker in rankers]
        drawn.result()
        write_scene_support(out / "world", seed)
        for task in TASKS:
            say(f"{task}: building the memory")
            build.build_memory(opened, settings_of(out, seed, task, "rar"), fresh=False)
        for future in deployed:
            future.result()
        for task in TASKS:
            folders += _run_task(opened, out, seed, task, metrics)
    metrics["images"] = sum(metrics.pop(f"images.{task}") for task in TASKS)
    metrics["seconds"] = round(time.monotonic() - started, 1)
    return _combined(metrics), folders


def _run_task(opened: Session, out: Path, seed: int, task: str, metrics: dict[str, float]) -> list[Path]:
    """Embed a task's images once, then send them through every arm."""
    from rar.run import nearest, recognise, steps
    from rar.run.work import classify_work, detect_work
    from rar.runfolder import RunFolder

    verb = "detect" if task == "scenes" else "classify"
    base = settings_of(out, seed, task, "rar")
    work = detect_work(base) if verb == "detect" else classify_work(base)
    facts = opened.encoder(base.encoder).facts
    vectors = steps.vectors(opened, base, work, facts).materialize()
    folders = []
    for arm in ARMS:
        settings = settings_of(out, seed, task, arm)
        own = work if arm != "mllm_only" else replace(work, index=work.index.take(list(range(0, work.index.num_rows, EVERY))))
        folder = RunFolder.open(out / "runs" / f"{task}-{arm}", verb, settings, fresh=True, name=arm, group=f"{verb}: {task}")
        began = time.monotonic()
        vocabulary = recognise.prepare(opened, settings)
        values = recognise.run(
            opened, settings, vocabulary, own, folder, steps.shared(vocabulary, vectors) if own is work else None
        )
        if arm == "rar":  # the page unfolds its pictures
            nearest.keep(opened, settings, vocabulary, folder)
        say(f"  {task} {arm}: " + _headline(values) + f" ({time.monotonic() - began:.1f} s)")
        metrics |= _keys(task, arm, values)
        folders.append(folder.path)
    metrics[f"images.{task}"] = int(work.rows_of_images.sum())
    return folders


def _headline(values: dict[str, float]) -> str:
    shown = [key for key in ("ap", "ap_rare", "top1", "candidate_recall", "ranked_fraction") if key in values]
    return ", ".join(f"{key} {values[key]:.3f}" for key in shown)


def _keys(task: str, arm: str, values: dict[str, float]) -> dict[str, float]:
    """metrics.json's keys (design 4.3)."""
    if task == "scenes":
        wanted = {f"detect.{arm}.{key}": values[key] for key in ("ap", "ap_rare", "ap_common", "ap_frequent")}
        return wanted | {f"detect.{arm}.top1": values["top1"]}
    kept = ("top1", "top1.ci_low", "top1.ci_high", "top5", "candidate_recall", "ranked_fraction", "parse_failures", "images")
    return {f"classify.{task}.{arm}.{key}": values[key] for key in kept}


def _combined(metrics: dict[str, float]) -> dict[str, float]:
    """`classify.<arm>.top1` over novel and seen together, and what is said of `rar` as a whole."""
    for arm in ARMS:
        parts = [(metrics[f"classify.{g}.{arm}.images"], metrics[f"classify.{g}.{arm}.top1"]) for g in ("novel", "seen")]
        metrics[f"classify.{arm}.top1"] = sum(n * top1 for n, top1 in parts) / sum(n for n, _ in parts)
    groups = [f"classify.{group}.rar" for group in ("novel", "seen")]
    images = sum(metrics[f"{group}.images"] for group in groups)
    asked = sum(metrics[f"{group}.ranked_fraction"] * metrics[f"{group}.images"] for group in groups)
    metrics["classify.rar.ranked_fraction"] = asked / images
    metrics["classify.rar.parse_failures"] = sum(metrics[f"{group}.parse_failures"] for group in groups)
    return dict(sorted(metrics.items()))


def _report(out: Path, metrics: dict[str, float], folders: list[Path]) -> None:
    import json

    from rar.report.page import write_report

    (out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    write_report(folders, out / "report.html", title="rar demo: the miniature world")


def table(metrics: dict[str, float]) -> str:
    """The arms side by side, for the terminal."""
    lines = [f"{'arm':<10} {'novel top-1 [95 %]':>24} {'seen top-1 [95 %]':>24} {'scenes AP':>10} {'AP rare':>8} {'asked':>6}"]
    for arm in ARMS:
        cells = []
        for group in ("novel", "seen"):
            key = f"classify.{group}.{arm}.top1"
            cells.append(f"{metrics[key]:.3f} [{metrics[key + '.ci_low']:.3f}, {metrics[key + '.ci_high']:.3f}]")
        asked = metrics[f"classify.novel.{arm}.ranked_fraction"]
        ap, rare = metrics[f"detect.{arm}.ap"], metrics[f"detect.{arm}.ap_rare"]
        lines.append(f"{arm:<10} {cells[0]:>24} {cells[1]:>24} {ap:>10.3f} {rare:>8.3f} {asked:>6.0%}")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(demo)
