"""Two runs picture by picture, held against a join by file name that is written out here."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from jobs.cli import app
from rar.report import against
from rar.report.view import RunView, read_run
from rar.schema import UserError
from tests.report.test_page import Page
from tests.runs import classify_run, detect_run, write_truth


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def ranked(root: Path) -> Path:
    return classify_run(root, "rar", "classify", 0.9, seed=1, ranks=True)


@pytest.fixture(scope="module")
def plain(root: Path) -> Path:
    return classify_run(root, "retriever", "classify", 0, seed=2, ranks=False)


def by_file(run: RunView) -> dict[str, dict[str, Any]]:
    rows = run.predictions.to_pylist()
    return {row["uri"]: row | {"truth": truth} for row, truth in zip(rows, run.truth, strict=True)}


def reason(row: dict[str, Any]) -> str:
    """Why a wrong prediction is wrong, by its columns alone."""
    names = [one["class_name"] for one in row["candidates"]]
    if row["truth"] not in names:
        return against.WHY["absent"]
    if row["rank_status"] == "skipped":
        return against.WHY["unasked"]
    return against.WHY["unread" if row["rank_status"] == "fallback" else "ranked"]


def test_counts_and_reasons_agree_with_a_join_by_name(ranked: Path, plain: Path) -> None:
    a, b = read_run(ranked), read_run(plain)
    told = against.comparison(a, b)
    mine, other = by_file(a), by_file(b)
    right = {
        uri: (mine[uri]["class_name"] == mine[uri]["truth"], row["class_name"] == row["truth"]) for uri, row in other.items()
    }
    counts = Counter(right.values())
    kinds = {"both_right": (True, True), "both_wrong": (False, False), "won": (True, False), "lost": (False, True)}
    assert {kind: told[kind] for kind in kinds} == {kind: counts[key] for kind, key in kinds.items()}
    assert min(counts.values()) > 1 and told["shared"] == told["judged"] == 80 and told["unshared"] == 0
    assert told["differ"] == sum(mine[uri]["class_name"] != other[uri]["class_name"] for uri in right)
    assert told["gain"] == pytest.approx((counts[True, False] - counts[False, True]) / 80) and told["low"] < told["gain"]
    for side, kind, loser, winner in (("won", (True, False), other, mine), ("lost", (False, True), mine, other)):
        flips = [uri for uri, one in right.items() if one == kind]
        expected = Counter(reason(loser[uri]) for uri in flips)
        assert {row["why"]: row[side][0] for row in told["reasons"] if row[side][0]} == dict(expected)
        by_retrieval = sum(winner[uri]["candidates"][0]["class_name"] == winner[uri]["truth"] for uri in flips)
        assert sum(row[side][1] for row in told["reasons"]) == by_retrieval
        assert sum(row[side][2] for row in told["reasons"]) == len(flips) - by_retrieval
    for gallery, kind in zip(told["galleries"], ((True, False), (False, True)), strict=False):
        for item in gallery["items"]:
            assert right[item["card"]["uri"]] == kind
            assert item["card"]["uri"] == item["other"]["uri"]
            assert item["why"] == reason((other if kind[0] else mine)[item["card"]["uri"]])


def relisted(run: Path, folder: Path, rows: list[int]) -> RunView:
    """The run as it would be of a listing that has only some of its pictures, in another order."""
    shutil.copytree(run, folder)
    known = [pq.read_table(file) for file in sorted((folder / "predictions").glob("*.parquet"))]
    whole, index = pa.concat_tables(known), pq.read_table(folder / "index.parquet")
    numbers = pa.array(range(len(rows)), pa.int64())
    for file in sorted((folder / "predictions").glob("*.parquet")):
        file.unlink()
    pq.write_table(whole.take(rows).set_column(0, "row", numbers), folder / "predictions" / "part-000000.parquet")
    pq.write_table(index.take(rows).set_column(0, "row", numbers), folder / "index.parquet")
    return read_run(folder)


def test_runs_of_other_listings_are_compared_where_they_share_pictures(ranked: Path, tmp_path: Path) -> None:
    some = relisted(ranked, tmp_path / "some", list(reversed(range(10, 80))))
    told = against.comparison(read_run(ranked), some)
    assert (told["shared"], told["unshared"], told["differ"], told["won"], told["lost"]) == (70, 10, 0, 0, 0)
    assert (told["gain"], told["p"], told["galleries"]) == (0.0, 1.0, [])


def test_files_that_have_moved_are_known_by_their_content(ranked: Path, tmp_path: Path) -> None:
    """Of byte-identical ones any may stand for any, so pictures of the same content and label are counted as one here."""
    some = relisted(ranked, tmp_path / "some", list(range(10, 80)))
    moved = [f"/elsewhere/{number}.jpg" for number in range(70)]
    place = some.predictions.column_names.index("uri")
    some = dataclasses.replace(some, predictions=some.predictions.set_column(place, "uri", [moved]))
    paired = against.pair(read_run(ranked), some)
    ids = [run.predictions["image_id"].to_pylist() for run in (paired.a, paired.b)]
    assert len(paired.rows) == len(set(paired.rows_a.tolist())) == 70
    assert all(ids[0][i] == ids[1][j] for i, j in paired.rows)


def test_equal_pictures_pair_in_the_order_of_the_index_and_unlike_labels_judge_nothing(ranked: Path, tmp_path: Path) -> None:
    twice = relisted(ranked, tmp_path / "twice", [3, 4, 3, 3])
    pairing = against.pair(twice, read_run(ranked))
    assert pairing.rows == [(0, 3), (1, 4)]  # the other run has the picture once
    assert against.pair(twice, twice).rows == [(0, 0), (1, 1), (2, 2), (3, 3)]
    index = pq.read_table(tmp_path / "twice" / "index.parquet")
    labels = pa.array(["another", *index["label"].to_pylist()[1:]])
    place = index.column_names.index("label")
    pq.write_table(index.set_column(place, "label", labels), tmp_path / "twice" / "index.parquet")
    told = against.comparison(read_run(tmp_path / "twice"), read_run(ranked))
    assert (told["shared"], told["judged"], told["unshared"]) == (2, 1, 80)


def test_runs_without_a_common_picture_are_a_users_mistake(root: Path, ranked: Path) -> None:
    boxes = detect_run(root, write_truth(root), "given", {})
    with pytest.raises(UserError, match="share no picture"):
        against.comparison(read_run(boxes), read_run(ranked))


def test_the_command_writes_a_whole_page(ranked: Path, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    done = CliRunner().invoke(app, ["report", str(ranked), "--against", str(plain), "--out", str(out)])
    assert done.exit_code == 0, done.stderr
    text = out.read_text()
    page = Page(text)
    told = against.comparison(read_run(ranked), read_run(plain))
    assert page.open == [] and "rar against retriever" in page.texts
    assert f"rar alone right: {told['won']}. retriever alone right: {told['lost']}." in " ".join(text.split())
    assert all(row["why"] in page.texts for row in told["reasons"]) and 'data-kind="against"' in text
    alone = CliRunner().invoke(app, ["report", str(ranked), "--against", str(ranked), "--out", str(out)])
    assert alone.exit_code == 2 and "other than that of --against" in alone.stderr


def test_unlabelled_runs_show_where_they_differ(ranked: Path, plain: Path, tmp_path: Path) -> None:
    views = []
    for run in (ranked, plain):
        folder = Path(shutil.copytree(run, tmp_path / run.name))
        index = pq.read_table(folder / "index.parquet")
        place = index.column_names.index("label")
        pq.write_table(index.set_column(place, "label", pa.nulls(len(index), pa.string())), folder / "index.parquet")
        (folder / "metrics.json").write_text(json.dumps({}))
        views.append(read_run(folder))
    told = against.comparison(*views)
    names = [np.array(view.predictions["class_name"].to_pylist(), object) for view in views]
    (gallery,) = told["galleries"]
    assert told["judged"] == 0 and gallery["total"] == told["differ"] == (names[0] != names[1]).sum()
    assert {item["why"] for item in gallery["items"]} == {None}
