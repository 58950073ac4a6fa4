"""Data sets that a sweep lays out itself: drawn worlds, and recorded embeddings split anew for every seed.

A drawn world is `support.csv`, `test.csv` and `classes.txt` over PNGs; the test manifest goes round the classes, so that its
first rows show each class once. Recorded embeddings (an .npz of contract 4.4) become a support and a test .npz a seed: of each
class a third, at least one picture, is tested, and the others are what shots are drawn from.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rar import identity, storage
from rar.config import Config
from rar.corpus import support
from rar.miniature.data import DRAWN, two_processes
from rar.miniature.world import Spec, render, rng_of, vocabulary
from rar.run.work import classify_work, detect_work
from rar.schema import UserError
from rar.sweep import replay
from rar.sweep.grid import DataSet, Grid, Piece, World, cells, settings_of

Source = Callable[[int], Piece]  # seed -> sections of a config

RECORDED = {"model": "recorded"}  # no hub has such a model

TESTED = 1 / 3  # of each class of recorded embeddings
FEW = 16  # classes' photos that are drawn before two processes have begun


def prepare(name: str, dataset: DataSet, folder: Path, seeds: Sequence[int]) -> Source:
    """Lay a data set out below `folder`, where that is not done yet. Raises UserError for what is not there."""
    if dataset.miniature is not None:
        piece = draw(dataset.miniature, folder / f"{name}-{identity.fingerprint(dataset.miniature.model_dump())[:8]}")
        return lambda seed: piece
    if dataset.recorded is None:
        return lambda seed: {}
    if dataset.replayed:
        piece = answers(dataset.recorded)
        return lambda seed: piece
    pieces = {seed: split(Path(dataset.recorded), folder / f"{name}-{seed}", seed, dataset.guesses) for seed in seeds}
    return lambda seed: pieces[seed]


def placeholder(dataset: DataSet) -> Piece:
    """Sections as `prepare` will give them, for a plan: nothing is laid out, so that of a drawn world no file is there."""
    if dataset.miniature is not None:
        return {"corpus": {"uri": "drawn"}, "memory": {"support": {"uri": "drawn"}, "classes": ["drawn"]}}
    if dataset.recorded is None:
        return {}
    if dataset.replayed:
        return answers(dataset.recorded)
    return {"corpus": {"uri": dataset.recorded}, "memory": {"support": {"uri": dataset.recorded}}}


def check(grid: Grid) -> None:
    """Raises UserError for a piece that makes no config: a mistyped key of an arm is told before anything is laid out.

    What is not there (files, data sets) is not looked for; a cell that lacks it fails by itself.
    """
    for cell in dict.fromkeys(replace(one, shots=one.shots or 1, seed=0) for one in cells(grid)):
        try:
            source = placeholder(grid.datasets[cell.dataset])
        except UserError:
            continue
        settings_of(grid, cell, source)


def test_pictures(dataset: DataSet, settings: Config) -> int:
    """How many pictures, or boxes, a cell of these settings tests on; a user's data set is listed, its support set, too.

    Raises UserError for what is not there.
    """
    assert settings.corpus is not None
    if dataset.miniature is not None:
        count = dataset.miniature.classes * dataset.miniature.tests
    elif dataset.replayed:
        return len(replay.halves(len(json.loads(Path(str(dataset.recorded)).read_text())["truth"]), 0)[1])
    elif dataset.recorded is not None:
        count = int(tested(recorded_arrays(Path(dataset.recorded))[1], 0).sum())
    else:
        if settings.memory.support is not None:
            support.read(settings.memory)
        work = detect_work(settings) if dataset.verb == "detect" else classify_work(settings)
        return int(work.rows_of_images.sum())
    return min(count, settings.corpus.limit or count)


def draw(world: World, folder: Path) -> Piece:
    specs, parts = vocabulary("novel", world.seed)[: world.classes], {"support": world.support, "test": world.tests}
    if not (folder / "classes.txt").exists():
        shutil.rmtree(folder, ignore_errors=True)
        tasks = [(number, part) for number in range(len(specs)) for part in parts]
        drawing = partial(_photos, world, folder, specs)
        if len(tasks) < FEW:
            list(map(drawing, tasks))
        else:
            with two_processes() as pool:
                list(pool.map(drawing, tasks, chunksize=4))
        for part, count in parts.items():
            with (folder / f"{part}.csv").open("w", newline="") as stream:
                rows = [(f"{part}/{n:03d}-{photo:03d}.png", one.name) for photo in range(count) for n, one in enumerate(specs)]
                csv.writer(stream).writerows([("uri", "label"), *rows])
        storage.write(folder / "classes.txt", "\n".join(one.name for one in specs).encode())  # last: it marks the whole
    return {
        "corpus": {"uri": str(folder / "test.csv")},
        "memory": {"support": {"uri": str(folder / "support.csv")}, "classes": str(folder / "classes.txt")},
    }


def _photos(world: World, folder: Path, specs: Sequence[Spec], task: tuple[int, str]) -> None:
    from PIL import Image, ImageFilter

    number, part = task
    (folder / part).mkdir(parents=True, exist_ok=True)
    for photo in range(world.support if part == "support" else world.tests):
        rng = rng_of(world.seed, f"sweep {part}", specs[number].name, photo)
        image = Image.fromarray(render(specs[number], DRAWN, rng))
        if world.blur:
            image = image.filter(ImageFilter.GaussianBlur(world.blur))
        pixels = np.asarray(image, np.float32) + 255 * world.noise * rng.standard_normal((DRAWN, DRAWN, 3))
        Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8)).save(folder / part / f"{number:03d}-{photo:03d}.png")


def answers(file: str) -> Piece:
    """Sections of recorded answers. Raises UserError where there are none."""
    if not Path(file).is_file():
        raise UserError(f"there is no {file}; name recorded answers, or leave the data set out with --only")
    return {"corpus": {"uri": file}, "encoder": {"model": "ViT-B-16/openai"}, "ranker": RECORDED}


def recorded_arrays(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (N, D) and class ids (N,). Raises UserError."""
    if not file.is_file():
        raise UserError(f"there is no {file}; name recorded embeddings, or leave the data set out with --only")
    with np.load(file, allow_pickle=False) as stored:
        if missing := [name for name in ("embeddings", "class_id") if name not in stored.files]:
            raise UserError(f"{file} holds no array {missing[0]!r}; it needs embeddings (N, D) and class_id (N,)")
        return stored["embeddings"], stored["class_id"].astype(np.int64)


def tested(class_ids: np.ndarray, seed: int) -> np.ndarray:
    """(N,) bool: a random third of each class, at least one picture."""
    rng, chosen = np.random.default_rng([seed, 17]), np.zeros(len(class_ids), bool)
    for class_id in np.unique(class_ids):
        rows = rng.permutation(np.flatnonzero(class_ids == class_id))
        chosen[rows[: max(1, round(TESTED * len(rows)))]] = True
    return chosen


def split(file: Path, folder: Path, seed: int, guesses: bool = False) -> Piece:
    """Support and test embeddings of one seed. guesses: the support's labels are first guesses, of NAME.json."""
    vectors, class_ids = recorded_arrays(file)
    names, held = class_names(file, class_ids), tested(class_ids, seed)
    folder.mkdir(parents=True, exist_ok=True)
    guessed = np.array(first_guesses(file)) if guesses else names
    for part, chosen, labels in (("support", ~held, guessed), ("test", held, names)):
        rows = np.flatnonzero(chosen)
        target = folder / f"{part}.npz"
        if not target.exists():
            arrays: dict[str, Any] = {"embeddings": vectors[rows], "ids": rows.astype(str), "label": labels[rows]}
            with storage.writing(target) as stream:
                np.savez(stream, **arrays)
    return {
        "run": {"vocabulary_free": guesses},
        "corpus": {"uri": str(folder / "test.npz"), "format": "embeddings"},
        "memory": {"support": {"uri": str(folder / "support.npz"), "format": "embeddings"}},
        "encoder": {"model": "precomputed", "source": file.stem},
    }


def class_names(file: Path, class_ids: np.ndarray) -> np.ndarray:
    """(N,) names: of NAME.json beside the file, or classes.json, or the numbers."""
    beside, listed = file.with_suffix(".json"), file.with_name("classes.json")
    if beside.is_file():
        names = dict(enumerate(json.loads(beside.read_text())["class_names"]))
    elif listed.is_file():
        names = {one["class_id"]: one["class_name"] for one in json.loads(listed.read_text())}
    else:
        names = {}
    return np.array([str(names.get(class_id, f"class {class_id}")) for class_id in class_ids.tolist()])


def first_guesses(file: Path) -> list[str]:
    """One name a picture, as a language model guessed it first. Raises UserError where none are recorded."""
    beside = file.with_suffix(".json")
    told = json.loads(beside.read_text()) if beside.is_file() else {}
    if "guessed_names" not in told:
        raise UserError(f"{beside} holds no guessed_names; set guesses: false")
    return [names[0] for names in told["guessed_names"]]
