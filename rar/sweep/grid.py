"""A grid of experiments as one YAML: data sets x shots x seeds x encoders x arms x top_k -> cells, each a config of its own.

Data sets, encoders and arms are named pieces of a config, laid over `base` in that order; what a cell runs is what a user
would write by hand. A preset is such a file that ships with rar (`presets/`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from rar import config
from rar.config import Config, Strict
from rar.schema import UserError

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.+]*$"  # of a part of a cell's name, which joins them by "-"

Piece = dict[str, Any]  # sections of a config


class World(Strict):
    """A drawn data set: classes of the miniature world, novel to its models, in two parts."""

    seed: int = Field(0, ge=0, le=8, description="world seed: other classes and photos")
    classes: int = Field(
        60, ge=2, le=120, description="how many of the world's 120 novel classes, in its order: siblings together"
    )
    support: int = Field(24, ge=1, description="photos a class that the shots are drawn from")
    tests: int = Field(4, ge=1, description="test photos a class")
    blur: float = Field(0.0, ge=0, description="Gaussian radius in pixels that makes every photo harder, of 96 pixels")
    noise: float = Field(0.0, ge=0, le=1, description="standard deviation of noise on every photo, of the whole range")


class DataSet(Strict):
    """One data set of a grid: pieces of a config, or a source that the sweep lays out itself."""

    config: Piece = Field({}, description="corpus, memory.support, encoder.templates, ...")
    verb: Literal["classify", "detect"] = "classify"
    metric: str = Field("top1", description="the key of metrics.json that arms are compared by")
    miniature: World | None = Field(None, description="draw a miniature world")
    recorded: str | None = Field(
        None, description="recorded embeddings (.npz) or CLIP + GPT-4V answers (.json) of ../shared/data"
    )
    guesses: bool = Field(False, description="of recorded embeddings: the support's names are a language model's first guesses")
    shots: list[int] | None = Field(None, description="other shot counts than the grid's")
    arms: list[str] | None = Field(None, description="of the grid's arms; default: all")
    published: str | None = Field(None, description="its name in the paper's tables, for reference columns")

    @property
    def replayed(self) -> bool:
        """Whether its cells are recorded answers, of which no model is asked."""
        return self.recorded is not None and self.recorded.endswith(".json")


class Arm(Strict):
    """One way to recognise. `per_shots: false` looks at no support picture: one cell a data set, with 0 shots."""

    config: Piece = Field({}, description="retriever, ranker, route, ...")
    per_shots: bool = True
    title: str = Field("", description="what it is, in a few words")


class Grid(Strict):
    """`rar sweep CONFIG`: every combination is a cell."""

    title: str = "rar sweep"
    base: Piece = Field({}, description="sections of a config that all cells share")
    root: str = Field("", description="the folder that holds data sets by name; {root} in a uri stands for it")
    datasets: dict[str, DataSet] = Field(min_length=1)
    shots: list[int] = Field([1, 2, 4, 8, 16], min_length=1, description="support pictures a class; 0: names alone")
    seeds: list[int] = Field([0, 1, 2], min_length=1)
    encoders: dict[str, Piece] = Field({"": {}}, description="name -> sections of a config; one nameless by default")
    arms: dict[str, Arm] = Field(min_length=1)
    top_k: list[int] = Field([5], min_length=1)
    search: dict[str, list[Any]] = Field({}, description="of --search: dotted key of a config -> values to try")
    ours: str | None = Field(None, description="the arm that claims are made of")
    retriever: str | None = Field(None, description="the arm that is `ours` without its ranker")
    parallel: int = Field(1, ge=1, description="memories worked on at the same time")

    @model_validator(mode="after")
    def _names(self) -> Grid:
        for kind in ("datasets", "encoders", "arms"):
            for name in getattr(self, kind):
                if not re.match(NAME, name) and (kind, name) != ("encoders", ""):
                    raise ValueError(f"{kind}: {name!r} is no name: letters, digits, _ . and + (it is part of a cell's name)")
        for key in ("ours", "retriever"):
            if getattr(self, key) is not None and getattr(self, key) not in self.arms:
                raise ValueError(f"{key}: {getattr(self, key)!r} is none of the arms {', '.join(self.arms)}")
        for name, one in self.datasets.items():
            if strange := sorted(set(one.arms or []) - set(self.arms)):
                raise ValueError(f"datasets.{name}.arms: {strange[0]!r} is none of the arms {', '.join(self.arms)}")
        return self


@dataclass(frozen=True)
class Cell:
    """One run of a grid. shots: 0 where no support picture is looked at."""

    dataset: str
    shots: int
    seed: int
    encoder: str
    arm: str
    top_k: int

    @property
    def name(self) -> str:
        parts = [self.dataset, f"{self.shots}shot", f"seed{self.seed}", *[self.encoder] * bool(self.encoder), self.arm]
        return "-".join([*parts, f"k{self.top_k}"])


def load(name: str, overrides: Sequence[str] = ()) -> Grid:
    """A grid from a YAML file, or a preset by its name. Raises UserError."""
    file = Path(name)
    known = presets()
    if not file.is_file() and name in known:
        file = known[name]
    elif not file.is_file():
        raise UserError(f"{name} is neither a file nor a preset; presets are {', '.join(known)}")
    return config.validated(Grid, config.read(file), overrides)


def presets() -> dict[str, Path]:
    folder = Path(str(resources.files("rar.sweep") / "presets"))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def cells(grid: Grid) -> list[Cell]:
    """All cells, those that share most work next to each other: a memory's arms follow one another."""
    found = []
    for (dataset, one), encoder in itertools.product(grid.datasets.items(), grid.encoders):
        arms = {name: arm for name, arm in grid.arms.items() if one.arms is None or name in one.arms}
        once = [name for name, arm in arms.items() if not arm.per_shots]
        drawn = [name for name, arm in arms.items() if arm.per_shots]
        for arm, top_k in itertools.product(once, grid.top_k):
            found.append(Cell(dataset, 0, grid.seeds[0], encoder, arm, top_k))
        for shots, seed, arm, top_k in itertools.product(one.shots or grid.shots, grid.seeds, drawn, grid.top_k):
            found.append(Cell(dataset, shots, seed, encoder, arm, top_k))
    return found


def settings_of(grid: Grid, cell: Cell, source: Piece, memory: str | None = None) -> Config:
    """The config of a cell. source: what `sources.prepare` says of its data set. memory: where its memory lies.

    Raises UserError.
    """
    data: Piece = {}
    for piece in (
        grid.base,
        grid.datasets[cell.dataset].config,
        source,
        grid.encoders[cell.encoder],
        grid.arms[cell.arm].config,
    ):
        data = merged(data, piece)
    for corpus in (data.get("corpus"), data.get("memory", {}).get("support")):
        if isinstance(corpus, dict):
            if corpus.get("dataset") and not corpus.get("root"):
                corpus["root"] = grid.root
            if "uri" in corpus:
                corpus["uri"] = str(corpus["uri"]).replace("{root}", grid.root)
    data = merged(data, {"memory": _drawn(data.get("memory", {}), cell.shots), "run": {"seed": cell.seed}})
    data["retriever"] = {"top_k": cell.top_k, **data.get("retriever", {})}
    if memory is not None and "://" in data["memory"].get("uri", ""):  # a server holds all memories, by name
        data["memory"]["name"] = "sweep_" + re.sub(r"\W", "_", Path(memory).stem)
    elif memory is not None:
        data["memory"]["uri"] = memory
    try:
        return config.validated(config.Config, data)
    except UserError as error:
        raise UserError(f"{cell.name}: {error}") from None


def _drawn(memory: Piece, shots: int) -> Piece:
    """What `shots` make of a memory; without any, names alone: those of the classes, or of the support's labels."""
    if shots:
        return {"shots": shots}
    if "classes" in memory or not memory.get("support"):
        return {"support": None}
    return {"support": None, "classes": list(_class_names(config.Corpus(**memory["support"])))}


@lru_cache(maxsize=64)  # a sweep asks for each cell, and ImageNet's folders take a minute to list
def _class_names(corpus: config.Corpus) -> tuple[str, ...]:
    from rar.corpus.datasets import named

    return tuple(named.read(corpus).classes)


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> Piece:
    """One mapping laid over another, section by section; neither is changed."""
    result = deepcopy(dict(under))
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = merged(result[name], value) if both else deepcopy(value)
    return result


Group = tuple[str, str, int, int]  # data set, encoder, shots, seed: what shares a memory


def group_of(cell: Cell) -> Group:
    return cell.dataset, cell.encoder, cell.shots, cell.seed


def groups(chosen: Sequence[Cell]) -> Iterator[list[Cell]]:
    """The cells of each memory, in their order."""
    found: dict[Group, list[Cell]] = {}
    for cell in chosen:
        found.setdefault(group_of(cell), []).append(cell)
    yield from found.values()
