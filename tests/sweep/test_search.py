"""A search judges settings on the memory alone; what it finds is what trying all of them finds."""

from __future__ import annotations

from pathlib import Path

import pytest

from rar import config
from rar.engine.session import Session
from rar.schema import UserError
from rar.sweep import grid, search

DATA = {
    "base": {"ranker": {"method": "none"}, "run": {"shard_size": 16}},
    "datasets": {"drawn": {"miniature": {"classes": 8, "support": 4, "tests": 1}}},
    "shots": [4],
    "seeds": [0],
    "arms": {"any": {}},
    "search": {"retriever.mode": ["centroid", "fused"]},
}


def test_a_grid_without_search_is_told_what_to_write(tmp_path: Path) -> None:
    made = config.validated(grid.Grid, {**DATA, "search": {}})
    with pytest.raises(UserError, match="has no `search`"):
        search.run(made, "drawn", tmp_path, 1, print)


def test_drawn_values_are_laid_over_base() -> None:
    made = config.validated(grid.Grid, {**DATA, "base": {"retriever": {"n_neighbors": 7}}})
    source = {"corpus": {"uri": "x"}, "memory": {"support": {"uri": "y"}, "classes": ["a"]}}
    drawn = {"retriever.mode": "lda", "memory.shots": 2, "retriever.top_k": 3}
    settings = search.settings_for(made, "drawn", source, drawn)
    assert (settings.retriever.mode, settings.memory.shots, settings.retriever.top_k) == ("lda", 2, 3)
    assert settings.retriever.n_neighbors == 7 and made.base == {"retriever": {"n_neighbors": 7}}


@pytest.mark.slow
def test_the_best_is_the_best_of_all_and_a_second_start_goes_on(ray_session: Session, tmp_path: Path) -> None:
    made = config.validated(grid.Grid, DATA)
    said: list[str] = []
    found = search.run(made, "drawn", tmp_path, 4, said.append)
    values = {line.split('"')[3]: float(line.split()[2]) for line in said}
    assert found["trials"] == 4 and found["leave_one_out"] == pytest.approx(max(values.values()), abs=1e-4)
    assert values[found["best"]["retriever.mode"]] == max(values.values())
    assert search.run(made, "drawn", tmp_path, 5, said.append)["trials"] == 5 and len(said) == 5


@pytest.mark.slow
def test_settings_that_are_refused_are_told_in_a_line_each_and_the_others_are_judged(
    ray_session: Session, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = config.validated(grid.Grid, {**DATA, "search": {"retriever.mode": ["centroid", "centre"]}})
    said: list[str] = []
    found = search.run(made, "drawn", tmp_path, 8, said.append)
    refused = [line for line in said if ": refused: " in line]
    assert 0 < len(refused) < 8 == found["trials"] + len(refused) and found["best"] == {"retriever.mode": "centroid"}
    assert all("config: retriever.mode" in line for line in refused) and "Traceback" not in capfd.readouterr().err
