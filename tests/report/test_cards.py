from __future__ import annotations

import base64
import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rar.corpus.decode import decode
from rar.corpus.frame import SAME
from rar.crops import windows
from rar.fusion import Calibration
from rar.report import cards
from rar.report.view import RunView, read_run
from rar.schema import RowError
from tests.runs import BOXES_XYXY, classify_run, detect_run, write_truth

CHOSEN = {"shown": {"size": 64, "view": "context", "outside": "grey"}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    write_truth(root)
    return root


@pytest.fixture(scope="module")
def given(root: Path) -> RunView:
    return read_run(detect_run(root, root / "truth.json", "given", CHOSEN))


@pytest.fixture(scope="module")
def proposed(root: Path) -> RunView:
    return read_run(detect_run(root, root / "truth.json", "proposals", {**CHOSEN, "proposals": "boxes.json"}))


@pytest.fixture(scope="module")
def classified(root: Path) -> RunView:
    return read_run(classify_run(root, "rar", "classify", 0.9, seed=1, ranks=True))


def opened(source: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,")))))


def test_a_card_of_a_box_shows_the_crop_as_the_ranker_saw_it(given: RunView) -> None:
    assert given.boxes is not None
    image = decode(Path(given.predictions["uri"][3].as_py()).read_bytes())
    seen = windows.crops(image, np.array([BOXES_XYXY[1]]), given.boxes.shown, "context")[0]
    assert (cards.seen_crop(given.boxes, 3, cards.Seen(image, SAME)) == seen).all()
    (card,) = cards.cards(given, np.array([3]))
    (shown,) = card["pictures"]
    assert np.abs(opened(shown["src"]).astype(int) - seen).mean() < 4  # JPEG
    assert (opened(shown["src"])[2, 2] == 128).all()  # grey outside


def test_a_card_of_a_box_marks_it_in_its_picture(given: RunView, proposed: RunView) -> None:
    (card,) = cards.cards(given, np.array([0]))
    scene = card["scene"]
    assert (scene["width"], scene["height"], scene["left_out"]) == (240, 180, 0)
    assert "".join(scene["paths"].values()).count("z") == 2 and "M20 30H90V100H20z" in "".join(scene["paths"].values())
    mark = scene["mark"]
    assert [mark[side] for side in ("left", "top", "width", "height")] == pytest.approx([100 / 12, 50 / 3, 175 / 6, 350 / 9])
    assert mark["kind"] == ("right" if given.found.correct[0] else "wrong")
    assert math.isnan(card["proposal"]) and cards.cards(proposed, np.array([1]))[0]["proposal"] == pytest.approx(0.8)
    (far,) = cards.cards(proposed, np.array([2]))
    assert far["truth"] is None and far["scene"]["mark"]["kind"] == "unjudged"
    assert far["scene"]["paths"]["unjudged"] == "M100 150H126V176H100z"


@pytest.mark.parametrize("resize", [1, 2])
def test_boxes_of_another_frame_are_drawn_and_cut_where_they_lie(given: RunView, tmp_path: Path, resize: int) -> None:
    """The picture is stored turned by a quarter (and made smaller after its boxes were drawn), and EXIF turns it back."""
    (plain,) = cards.cards(given, np.array([0]))
    upright = Image.fromarray(decode(Path(given.predictions["uri"][0].as_py()).read_bytes()))
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    stored.resize((stored.width // resize, stored.height // resize)).save(tmp_path / "turned.png", exif=exif)
    columns = {"uri": str(tmp_path / "turned.png"), "width": upright.height, "height": upright.width}  # the stored frame's
    index = given.index
    for name, value in columns.items():
        values = [value, *index[name].to_pylist()[1:]]
        index = index.set_column(index.schema.get_field_index(name), index.schema.field(name), [values])
    assert given.boxes is not None
    corners = given.boxes.xyxy.copy()
    x0, y0, x1, y1 = corners[0]
    corners[0] = y0, upright.width - x1, y1, upright.width - x0  # a quarter to the left, as the picture was stored
    run = dataclasses.replace(given, index=index, boxes=dataclasses.replace(given.boxes, xyxy=corners))
    (card,) = cards.cards(run, np.array([0]))
    for side in ("left", "top", "width", "height"):
        assert card["scene"]["mark"][side] == pytest.approx(plain["scene"]["mark"][side])
    (shown,), (expected,) = card["pictures"], plain["pictures"]
    assert np.abs(opened(shown["src"]).astype(int) - opened(expected["src"])).mean() < (3 if resize == 1 else 8)


def test_a_card_of_a_picture_shows_the_picture(classified: RunView) -> None:
    (card,) = cards.cards(classified, np.array([0]))
    assert card["scene"] is None and card["proposal"] is None
    assert [shown["what"] for shown in card["pictures"]] == ["picture"]
    assert max(opened(card["pictures"][0]["src"]).shape) <= cards.THUMBNAIL


def test_a_picture_that_is_gone_or_has_shrunk_says_so(classified: RunView, given: RunView, tmp_path: Path) -> None:
    (card,) = cards.cards(classified, np.array([5]))
    assert card["pictures"] == [] and "found" in card["unreadable"]
    with pytest.raises(RowError, match="not in the run's index"):
        cards.picture(given, -1)
    assert given.boxes is not None
    with pytest.raises(RowError, match="lies outside the 20 x 20 image"):
        cards.seen_crop(given.boxes, 1, cards.Seen(np.zeros((20, 20, 3), np.uint8), SAME))


RECORD = {
    "candidates": [
        {"class_id": place, "class_name": name, "score": score}
        for place, (name, score) in enumerate((("a", 0.3), ("b", 0.2), ("c", 0.1)))
    ],
    "ranking": [2, 0, 1],
    "rank_status": "ranked",
    "scores": np.log([0.2, 0.1, 0.1]).tolist(),
    "class_name": "c",
}


def test_candidates_come_in_ranked_order_with_their_bars() -> None:
    got = cards.candidates_of(RECORD, "a", None)
    assert [(one["name"], one["was"], one["true"], one["predicted"]) for one in got] == [
        ("c", 3, False, True),
        ("a", 1, True, False),
        ("b", 2, False, False),
    ]
    assert [one["chance"] for one in got] == pytest.approx([0.25, 0.5, 0.25])
    assert [one["bar"] for one in got] == pytest.approx([0.1, 1.0, 0.55])
    far = cards.candidates_of(RECORD | {"scores": [-2000.0, -2001.0, -3000.0]}, None, None)
    assert [one["chance"] for one in far] == pytest.approx([0, 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))])


@pytest.mark.parametrize("status", ["skipped", "fallback"])
def test_a_silent_ranker_has_no_chances(status: str) -> None:
    got = cards.candidates_of(RECORD | {"rank_status": status}, "a", None)
    assert [(one["chance"], one["unseen"]) for one in got] == [(None, False)] * 3
    assert all(one["chance"] is None for one in cards.candidates_of(RECORD | {"scores": []}, None, None))
    empty: dict[str, Any] = {"candidates": [], "ranking": [], "scores": [], "class_name": None, "rank_status": status}
    assert cards.candidates_of(empty, None, None) == []


def test_candidates_that_the_ranker_was_not_shown_are_marked() -> None:
    shows_two = Calibration(least_probability=0.32)  # of 0.367, 0.332, 0.301
    got = cards.candidates_of(RECORD, "a", shows_two)
    assert [(one["name"], one["unseen"]) for one in got] == [("c", True), ("a", False), ("b", False)]
    assert got[0]["chance"] is None and [one["chance"] for one in got[1:]] == pytest.approx([2 / 3, 1 / 3])


def test_scenes_are_the_pictures_that_ranking_changed_most(given: RunView) -> None:
    scenes = cards.scenes(given)
    changed = np.bincount(given.places, given.won | given.lost)
    shown = [given.index["uri"].to_pylist().index(scene["uri"]) for scene in scenes]
    assert len(scenes) == cards.SCENES and changed[shown].tolist() == sorted(changed, reverse=True)[: cards.SCENES]
    for scene, place in zip(scenes, shown, strict=True):
        rows = np.flatnonzero(given.places == place)
        assert [entry["name"] for entry in scene["entries"]] == [given.predictions["class_name"][row].as_py() for row in rows]
        assert [entry["truth"] for entry in scene["entries"]] == [given.truth[row] for row in rows]
        won = [entry["change"] == "won" for entry in scene["entries"]]
        assert won == given.won[rows].tolist() and scene["drawing"]["left_out"] == 0
    assert cards.scenes(given) == scenes


def test_scenes_of_a_run_that_nothing_judges_are_those_with_other_names_than_the_retrievers(proposed: RunView) -> None:
    blind = dataclasses.replace(
        proposed, truth=[None] * len(proposed.truth), found=type(proposed.found)(*(part & False for part in proposed.found))
    )
    flipped = np.bincount(blind.places, blind.flipped)
    assert flipped.min() < flipped.max()
    first = blind.index["uri"].to_pylist().index(cards.scenes(blind)[0]["uri"])
    assert flipped[first] == flipped.max()
    assert [section["kind"] for section in cards.sections(blind)] == ["predicted"]


def test_a_crowded_picture_shows_what_ranking_changed_first_and_counts_the_rest(
    proposed: RunView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cards, "DRAWN", 1)
    for scene in cards.scenes(proposed):
        assert len(scene["entries"]) == 1 and scene["drawing"]["left_out"] == 2
        place = proposed.index["uri"].to_pylist().index(scene["uri"])
        rows = np.flatnonzero(proposed.places == place)
        changed = (proposed.won | proposed.lost)[rows].any()
        assert (scene["entries"][0]["change"] is not None) == changed
        assert scene["entries"][0]["kind"] != "unjudged"


def test_a_scene_that_is_gone_says_so(root: Path) -> None:
    run = read_run(detect_run(root, root / "truth.json", "gone", {}))
    gone = dataclasses.replace(run, index=run.index.set_column(1, "uri", [["/gone.jpg"] * 8]))
    assert all("found" in scene["unreadable"] and scene["drawing"] is None for scene in cards.scenes(gone))


def test_whole_images_have_no_scenes(classified: RunView) -> None:
    assert cards.scenes(classified) == []
