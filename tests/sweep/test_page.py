"""The page of a sweep in headless Chromium: what a person reads there is what the run folders gave; nothing is fetched."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rar import config
from rar.sweep import board, page, state, tables
from rar.sweep.grid import Grid, cells
from tests.browser import browser, needs_chromium
from tests.sweep.test_board import GRID, results

__all__ = ["browser"]  # a fixture
pytestmark = [needs_chromium, pytest.mark.long]
FOUND = results({"text": 0.3, "retriever": 0.4, "rar": 0.9})
HOSTILE = "<script>alert('x')</script> & \"quoted\""


def written(folder: Path, grid: Grid, found: list[board.Result]) -> Path:
    """The page of these results, one cell failed and one left."""
    every = cells(grid)
    done = {one.cell.name: 1.0 for one in found}
    rest = [cell.name for cell in every if cell.name not in done]
    sweep = state.Sweep(grid, folder, {}, done=done, failed={name: HOSTILE for name in rest[:1]})
    file = folder / "report.html"
    file.write_text(page.render(sweep, every, found, board.board(grid, found)))
    return file


@pytest.fixture(scope="module", params=[1200, 390], ids=["desk", "phone"])
def opened(request: pytest.FixtureRequest, browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The opened page of a grid that is not done; whatever the browser complains about, or asks for, fails the test."""
    file = written(tmp_path_factory.mktemp("sweep"), GRID, FOUND[:-2])
    context = browser.new_context(viewport={"width": request.param, "height": 800})
    shown, complaints = context.new_page(), []
    shown.on("pageerror", lambda error: complaints.append(str(error)))
    shown.on("console", lambda message: complaints.append(message.text))
    shown.on("request", lambda one: None if one.url == file.as_uri() or one.url[:5] == "data:" else complaints.append(one.url))
    shown.goto(file.as_uri())
    yield shown
    context.close()
    assert complaints == []


def rows_of(shown: Any, heading: str) -> list[list[str]]:
    """The cells of the table under a heading, as they are read."""
    table = shown.locator(f"h2:text-is('{heading}') ~ div.scroll table").first
    return [
        [" ".join(cell.split()) for cell in row.locator("th, td").all_inner_texts()] for row in table.locator("tbody tr").all()
    ]


def test_the_leaderboard_says_what_the_table_file_says(opened: Any) -> None:
    rows = rows_of(opened, "Leaderboard")
    made = board.board(GRID, FOUND[:-2])
    assert [(row[0].split()[0], int(row[1])) for row in rows] == [(row.dataset, row.shots) for row in made.rows]
    for shown, row in zip(rows, made.rows, strict=True):
        for text, arm in zip(shown[3:], made.arms, strict=True):
            one = row.entries[arm]
            assert text.startswith(f"{100 * one.value:.1f} {100 * one.low:.1f} to {100 * one.high:.1f}"), (row, arm)
            assert ("by seed" in text) == (one.over_seeds == one.over_seeds)
    assert opened.locator("td strong").all_inner_texts() == [f"{100 * row.entries['rar'].value:.1f}" for row in made.rows]


def test_what_failed_and_what_is_left_is_told_and_names_are_inert(opened: Any) -> None:
    tiles = [" ".join(one.split()) for one in opened.locator(".tiles li").all_inner_texts()]
    total = len(cells(GRID))
    assert tiles[:3] == [f"{len(FOUND) - 2} of {total} cells done", "1 cell failed", "1 cell left"]
    assert opened.locator(f"text={HOSTILE}").count() == 1


def test_it_fits_the_screen_and_figures_are_drawn(opened: Any) -> None:
    """Wide tables scroll within themselves; the page does not scroll sideways."""
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    boxes = [one.bounding_box() for one in opened.locator("figure svg").all()]
    titles = opened.locator("figure h4").all_inner_texts()
    over_shots = [f"{name}: over shots" for name in ("easy", "hard", "average")]
    assert titles == [*over_shots, "average, 2 shots: accuracy against cost", "What ranking adds"]
    assert all(box["width"] > 200 and box["height"] > 100 for box in boxes)


def test_cells_are_listed_with_links_to_their_pages(opened: Any) -> None:
    opened.locator("summary").last.click()
    rows = list(csv.DictReader(io.StringIO(tables.as_csv(FOUND[:-2]))))
    links = opened.locator("details a")
    assert links.count() == len(rows) and links.first.is_visible()
    names = [f"{row['dataset']}-{row['shots']}shot-seed{row['seed']}-{row['arm']}-k{row['top_k']}" for row in rows]
    assert [one.get_attribute("href") for one in links.all()] == [f"cells/{name}/report.html" for name in names]


def test_arms_over_k_have_a_figure_where_the_grid_has_several(browser: Any, tmp_path: Path) -> None:
    grid = config.validated(Grid, {**GRID.model_dump(), "top_k": [3, 5]})
    found = [one._replace(cell=one.cell.__class__(**{**vars(one.cell), "top_k": k})) for k in (3, 5) for one in FOUND]
    shown = browser.new_page()
    shown.goto(written(tmp_path, grid, found).as_uri())
    titles = shown.locator("figure h4").all_inner_texts()
    wanted = [f"{name}, 2 shots: over top_k" for name in ("easy", "hard", "average")]
    assert [title for title in titles if "top_k" in title] == wanted
    gains = {(row[0], row[1]) for row in rows_of(shown, "What ranking adds")}
    assert gains == {(f"{name}/k{k}", shots) for name in ("easy", "hard") for k in (3, 5) for shots in "12"}
    shown.close()
