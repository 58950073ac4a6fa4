"""The paper's published numbers (published.yaml), as rows of a table: reference columns beside what was measured."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import NamedTuple

import yaml


class Published(NamedTuple):
    """One number of the paper. value: percent. differs: what in its protocol is other than this project's, a line each."""

    table: int
    dataset: str  # a name of `rar data`, or "average"
    shots: int | None  # None: no shots, or all training pictures (the title says which)
    method: str
    metric: str
    value: float
    title: str
    differs: tuple[str, ...]


@cache
def published() -> tuple[Published, ...]:
    """Every number of the file, in its order; cells that the paper leaves empty are left out."""
    data = yaml.safe_load(resources.files(__package__).joinpath("published.yaml").read_text())
    return tuple(
        Published(one["table"], dataset, one.get("shots"), method, metric, value, one["title"], tuple(one["differs"]))
        for one in data["tables"]
        for method, cells in one["rows"].items()
        for metric in one["metrics"]
        for dataset, value in zip(one["datasets"], cells[metric], strict=True)
        if value is not None
    )
