"""A memory of boxes: built from a JSON, asked for boxes of pictures, and held apart from others by how they were cut out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rar.config import Config
from rar.engine.exemplars import Pictures
from rar.run import build, calibrate
from rar.run.vocabulary import collection, odd_treatment, open_memory
from rar.run.work import detect_work
from rar.schema import UserError
from tests.run.lab import Lab


def settings(lab: Lab, **sections: Any) -> Config:
    scenes = {"uri": str(lab.world / "scenes.json")}
    known: dict[str, Any] = {"corpus": scenes, "memory": {"name": "boxes", "support": scenes}, "ranker": {"method": "none"}}
    known |= {"retriever": {"mode": "knn", "sharpness": 1000.0}, "detect": {"crop": {"size": 48}}}
    return lab.settings(**{name: {**known.get(name, {}), **sections.get(name, {})} for name in {**known, **sections}})


@pytest.mark.long
def test_boxes_find_themselves_in_a_memory_of_boxes(lab: Lab, tmp_path: Path) -> None:
    own = settings(lab)
    built = build.build_memory(lab.session, own, fresh=True)
    boxes = detect_work(own).labels
    assert built.failed.num_rows == 0 and built.metrics["entries.images"] == len(boxes) > 8
    again = build.build_memory(lab.session, own, fresh=False)
    assert again.metrics["embedded"] == 0
    _, values = lab.run(own, tmp_path / "run", "detect")
    assert values["top1"] == 1.0
    vocabulary = open_memory(lab.session, own)
    assert odd_treatment(own, vocabulary) == []
    other = settings(lab, detect={"crop": {"size": 48, "outside": "black"}})
    (line,) = odd_treatment(other, vocabulary)
    assert "outside grey (here black)" in line
    with pytest.raises(UserError, match=r"boxes cut out by another detect\.crop"):
        build.build_memory(lab.session, other, fresh=False)
    whole = settings(lab, memory={"support": {"uri": str(lab.world / "novel" / "support")}})
    with pytest.raises(UserError, match="do not mix"):
        build.build_memory(lab.session, whole, fresh=False)
    digest = vocabulary.digest
    build.build_memory(lab.session, other, fresh=True)
    assert open_memory(lab.session, other).digest != digest  # the treatment is part of the memory's identity
    names = settings(lab, memory={"support": None, "classes": ["a thing"]}, detect={"crop": other.detect.crop.model_dump()})
    build.build_memory(lab.session, names, fresh=False)
    assert collection(names, lab.session.memory_address, "images").meta()["crop"]["outside"] == "black"


def test_whole_pictures_are_told_of_where_boxes_are_hidden_around(lab: Lab) -> None:
    for outside, lines in (("grey", 0), ("none", 0), ("blur", 1), ("black", 1)):
        own = lab.settings(detect={"crop": {"outside": outside}})
        assert len(odd_treatment(own, open_memory(lab.session, own))) == lines


def test_the_ranker_is_shown_support_boxes_and_not_their_pictures(lab: Lab) -> None:
    own = settings(lab)
    places = calibrate.support_places(own, 1)
    assert {len(place) for found in places.values() for place in found} == {4}
    pictures = Pictures().at([found[0] for found in places.values()])
    assert len(pictures) == len(places) and {picture.shape for picture in pictures} == {(336, 336, 3)}
