"""The pictures of the report: cards of predictions won, lost, wrong and right; whole scenes with their boxes; crops.

A run's pictures are read one at a time, and only those that are shown, so that neither their number nor their size matters. A
box's crop is computed again from the picture by the code that made it for the ranker (`windows.crops` with the run's own
settings), instead of being kept by every run: a report costs a few milliseconds more, and shows other pixels if the picture
has changed since. Boxes are drawn by the page over the picture and not into it: lines and numbers keep their size on a phone.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from rar import boxes
from rar.corpus.decode import decode
from rar.corpus.frame import SAME, Frame, frame_of
from rar.corpus.listing import read_many
from rar.crops import windows
from rar.fusion import Calibration, n_shown
from rar.report.view import BoxView, Neighbor, RunView
from rar.schema import Candidate, RankStatus, RowError

THUMBNAIL = 144  # longest side of a picture and of a crop, pixels: sharp at 96 CSS pixels on a phone's dense screen
CARD_SCENE, SCENE = 320, 640  # longest side of a whole picture on a card, and on its own
PICTURES, RIGHT = 12, 6  # a gallery shows at most this many, and of what is merely right
SCENES = 6
DRAWN = 40  # boxes drawn into a picture at most
SHOWN_CANDIDATES = 6
JPEG = "data:image/jpeg;base64,"


class Gallery(NamedTuple):
    """Some predictions of a kind. total: how many of it there are; rows: those that are shown, evenly spread."""

    kind: str
    title: str
    meaning: str
    total: int
    rows: np.ndarray


def galleries(run: RunView) -> list[Gallery]:
    """What is shown of a run; a kind without predictions is left out. Without labels nothing is won or lost: a look at some."""
    found = run.found
    kinds = [
        ("won", "Won", "The retriever's first candidate was wrong, the final prediction is right.", run.won, PICTURES),
        ("lost", "Lost", "The retriever's first candidate was right, the final prediction is wrong.", run.lost, PICTURES),
        (
            "wrong",
            "Wrong throughout",
            "Neither the retriever's first candidate nor the final prediction is right.",
            found.labelled & ~found.correct & ~found.retriever_correct,
            PICTURES,
        ),
        ("right", "Right throughout", "The retriever's first candidate, kept.", found.correct & found.retriever_correct, RIGHT),
    ]
    if not found.labelled.any():
        kinds = [("predicted", "Predictions", "No labels to judge by.", np.ones(len(run.truth), dtype=bool), PICTURES)]
    shown = []
    for kind, title, meaning, chosen, most in kinds:
        if len(rows := np.flatnonzero(chosen)):
            shown.append(Gallery(kind, title, meaning, len(rows), spread(rows, most)))
    return shown


def sections(run: RunView) -> list[dict[str, Any]]:
    """The galleries of one run with their cards."""
    return [{**one._asdict(), "cards": cards(run, one.rows)} for one in galleries(run)]


def spread(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many of some rows, evenly spread."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int))]


def cards(run: RunView, rows: np.ndarray) -> list[dict[str, Any]]:
    """What a card shows of each of some predictions, its pictures included; what cannot be read says why."""
    made = []
    for row, card in zip(rows.tolist(), told(run, rows), strict=True):
        try:
            made.append(card | _pictures(run, row))
        except RowError as reason:
            made.append(card | {"unreadable": str(reason)})
    return made


def told(run: RunView, rows: np.ndarray) -> list[dict[str, Any]]:
    """Cards of some predictions without the pictures that were looked at."""
    records = run.predictions.take(pa.array(rows, pa.int64())).to_pylist()
    return [_told(run, row, record) for row, record in zip(rows.tolist(), records, strict=True)]


def _told(run: RunView, row: int, record: dict[str, Any]) -> dict[str, Any]:
    candidates = candidates_of(record, run.truth[row], run.calibration)
    return {
        "truth": run.truth[row],
        "predicted": record["class_name"],
        "retrieved": bool(run.found.recalled[row]),
        "status": record["rank_status"],
        "response": record["response"],
        "score": record["score"],
        "proposal": run.boxes.scores[row] if run.boxes else None,
        "uri": record["uri"],
        "file": str(record["uri"]).rsplit("/", 1)[-1],
        "pictures": [],
        "neighbors": [_neighbor(run.truth[row], one) for one in run.neighbors.get((record["row"], record["place"]), [])],
        "scene": None,
        "unreadable": None,
        "candidates": candidates[:SHOWN_CANDIDATES],
        "more": max(0, len(candidates) - SHOWN_CANDIDATES),
    }


def _neighbor(truth: str | None, one: Neighbor) -> dict[str, Any]:
    src = JPEG + base64.b64encode(one.picture).decode()
    return {"name": one.class_name, "score": one.score, "true": one.class_name == truth, "src": src}


def _pictures(run: RunView, row: int) -> dict[str, Any]:
    """The picture; for a box its crop, and the picture with all boxes drawn in. Raises RowError where there is none."""
    seen = picture(run, int(run.places[row]))
    small = {"pictures": [thumbnail(run, row, seen)]}
    if run.boxes is None:
        return small
    around = drawing(run, _of_picture(run, int(run.places[row])), seen, CARD_SCENE)
    return small | {"scene": around | {"mark": _mark(run, row, seen)}}


class Seen(NamedTuple):
    """A picture (H, W, 3) uint8, and how the boxes of its file lie on it (see corpus.frame)."""

    image: np.ndarray
    frame: Frame

    def shown(self, boxes_xyxy: np.ndarray) -> np.ndarray:
        """The part of each box (B, 4) inside the picture, in its pixels."""
        height, width = self.image.shape[:2]
        return boxes.clip_xyxy(self.frame.to_pixels(boxes_xyxy), width, height)


def picture(run: RunView, place: int) -> Seen:
    """The picture in a row of the index. Raises RowError where there is none any more, or one of another size."""
    if place < 0:
        raise RowError("not in the run's index")
    (data,) = read_many(*([run.index[column][place].as_py()] for column in ("uri", "offset", "size")))
    if isinstance(data, RowError):
        raise data
    image = decode(data)
    if run.boxes is None:
        return Seen(image, SAME)
    stated = run.index["width"][place].as_py(), run.index["height"][place].as_py()
    return Seen(image, frame_of(stated, (image.shape[1], image.shape[0]), data))


def thumbnail(run: RunView, row: int, seen: Seen) -> dict[str, str]:
    """A prediction's picture for an <img>, or of a box its crop. Raises RowError as `seen_crop` does."""
    if run.boxes is None:
        return {"what": "picture", "src": data_uri(seen.image, THUMBNAIL)}
    return {"what": "crop as the ranker sees it", "src": data_uri(seen_crop(run.boxes, row, seen), THUMBNAIL)}


def seen_crop(view: BoxView, row: int, seen: Seen) -> np.ndarray:
    """(S, S, 3) uint8: a box as the ranker sees it. Raises RowError for a box that is not in this picture."""
    height, width = seen.image.shape[:2]
    box = seen.frame.to_pixels(view.xyxy[[row]])
    if fault := boxes.check_boxes(box, width, height)[0]:
        raise RowError(fault)
    return windows.crops(seen.image, box, view.shown, view.shown.view)[0]


def data_uri(image: np.ndarray, side: int) -> str:
    """(H, W, 3) uint8 as a JPEG of at most `side` pixels a side, for an <img>'s src."""
    return JPEG + base64.b64encode(jpeg(image, side)).decode()


def jpeg(image: np.ndarray, side: int) -> bytes:
    """(H, W, 3) uint8 as a JPEG of at most `side` pixels a side."""
    small = Image.fromarray(image)
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=82, optimize=True)
    return buffer.getvalue()


def _of_picture(run: RunView, place: int) -> np.ndarray:
    """The predictions drawn of a picture: at most DRAWN, first those that ranking changed, then wrong, right, unjudged ones.

    Within each the best proposals come first. Returned in the run's order.
    """
    rows = np.flatnonzero(run.places == place)
    assert run.boxes is not None
    labelled, correct = run.found.labelled[rows], run.found.correct[rows]
    changed = (run.won | run.lost)[rows]
    order = np.lexsort((rows, -run.boxes.scores[rows], np.select([changed, labelled & ~correct, labelled], [0, 1, 2], 3)))
    return np.sort(rows[order[:DRAWN]])


def drawing(run: RunView, rows: np.ndarray, seen: Seen, side: int) -> dict[str, Any]:
    """A picture and the boxes to draw over it: one SVG path for the boxes of each kind, in the picture's own pixels."""
    assert run.boxes is not None
    height, width = seen.image.shape[:2]
    paths: dict[str, str] = {}
    for row, (x0, y0, x1, y1) in zip(rows.tolist(), seen.shown(run.boxes.xyxy[rows]).tolist(), strict=True):
        line = f"M{x0:.5g} {y0:.5g}H{x1:.5g}V{y1:.5g}H{x0:.5g}z"
        paths[_kind(run, row)] = paths.get(_kind(run, row), "") + line
    left_out = int((run.places == run.places[rows[0]]).sum()) - len(rows)
    return {"src": data_uri(seen.image, side), "width": width, "height": height, "paths": paths, "left_out": left_out}


def _kind(run: RunView, row: int) -> str:
    return "right" if run.found.correct[row] else "wrong" if run.found.labelled[row] else "unjudged"


def _mark(run: RunView, row: int, seen: Seen) -> dict[str, Any]:
    """Where a box lies in a picture, in percent of its sides, and the name predicted for it."""
    assert run.boxes is not None
    height, width = seen.image.shape[:2]
    x0, y0, x1, y1 = seen.shown(run.boxes.xyxy[[row]])[0].tolist()
    left, top = 100 * x0 / width, 100 * y0 / height
    return {
        "name": run.predictions["class_name"][row].as_py(),
        "kind": _kind(run, row),
        "left": left,
        "top": top,
        "width": 100 * x1 / width - left,
        "height": 100 * y1 / height - top,
    }


def candidates_of(record: Mapping[str, Any], truth: str | None, calibration: Calibration | None) -> list[dict[str, Any]]:
    """Candidates in ranked order. Bars are fractions of the row's widest; `chance` is the ranker's, among those it saw.

    What it did not see has none: all candidates where it was not asked or said nothing, and those beyond the number that the
    calibration lets it see. The scores stored for these only repeat the retriever's order.
    """
    retrieved = [Candidate(**candidate) for candidate in record["candidates"]]
    values = np.array([candidate.score for candidate in retrieved], dtype=np.float64)
    spread = values.max() - values.min() if len(values) else 0.0
    bars = 0.1 + 0.9 * (values - values.min()) / spread if spread > 0 else np.ones(len(values))
    asked = record["rank_status"] not in (RankStatus.SKIPPED, RankStatus.FALLBACK)
    shown = len(retrieved) if calibration is None else n_shown(retrieved, calibration)
    seen = np.array(record["scores"][: shown * asked], dtype=np.float64)
    chances = np.exp(seen - seen.max(initial=-math.inf))
    return [
        {
            "name": retrieved[position].class_name,
            "score": values[position],
            "bar": bars[position],
            "chance": chances[position] / chances.sum() if position < len(chances) else None,
            "unseen": asked and position >= shown,
            "was": position + 1,
            "true": retrieved[position].class_name == truth,
            "predicted": retrieved[position].class_name == record["class_name"],
        }
        for position in record["ranking"]
    ]


def scenes(run: RunView) -> list[dict[str, Any]]:
    """Whole pictures of a detection run: those with most boxes that ranking set right or wrong, then with most wrong ones.

    Without labels: those with most predictions that are not the retriever's first candidate.
    """
    if run.boxes is None:
        return []
    found = run.found
    telling = run.won | run.lost if found.labelled.any() else run.flipped
    known = np.flatnonzero(run.places >= 0)
    total, changed, wrong = (
        np.bincount(run.places[known], weights[known], run.index.num_rows)
        for weights in (np.ones(len(telling)), telling, found.labelled & ~found.correct)
    )
    order = np.lexsort((-wrong, -changed))  # stable: ties in the index's order
    return [_scene(run, place) for place in order[total[order] > 0][:SCENES].tolist()]


def _scene(run: RunView, place: int) -> dict[str, Any]:
    rows = _of_picture(run, place)
    uri = run.index["uri"][place].as_py()
    scene = {"uri": uri, "file": uri.rsplit("/", 1)[-1], "drawing": None, "unreadable": None, "entries": []}
    try:
        seen = picture(run, place)
    except RowError as reason:
        return scene | {"unreadable": str(reason)}
    entries = [_mark(run, row, seen) | _verdict(run, row) for row in rows.tolist()]
    return scene | {"drawing": drawing(run, rows, seen, SCENE), "entries": entries}


def _verdict(run: RunView, row: int) -> dict[str, Any]:
    """What is to be said of a box beside its name."""
    return {
        "truth": run.truth[row],
        "change": "won" if run.won[row] else "lost" if run.lost[row] else None,
        "score": run.predictions["score"][row].as_py(),
    }
