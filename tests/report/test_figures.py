from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from rar.report import figures

NAME = "<b>$x$ & y"


def three(salt: str) -> list[str]:
    curve = (np.array([0.0, 0.5]), np.array([0.4, 0.7]))
    return [
        figures.points(["a", NAME], {"top-1": [(0.5, 0.4, 0.6), (0.7, np.nan, np.nan)]}, salt),
        figures.histogram({"right": np.array([0.9, 0.8, 0.8]), "wrong": np.array([0.1])}, figures.SERIES[:2], "score", salt),
        figures.lines({NAME: curve}, "asked", "top-1", salt),
    ]


@pytest.mark.parametrize("number", range(3))
def test_a_figure_is_one_scalable_svg_in_the_pages_colours(number: int) -> None:
    svg = three("salt")[number]
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg") and "viewBox" in root.attrib and "width" not in root.attrib
    assert "var(--" in svg and not re.search(r"#[0-9a-fA-F]{6}", svg.replace("#m", "").replace("#p", ""))
    assert "<style" not in svg and "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", svg)


def test_names_are_text_taken_literally() -> None:
    for svg in (three("salt")[0], three("salt")[2]):
        assert NAME in [text.strip() for text in ElementTree.fromstring(svg).itertext()]


def test_figures_are_deterministic_and_their_ids_apart() -> None:
    assert three("salt") == three("salt")
    for one, other in zip(three("one"), three("other"), strict=True):
        ids, others = (set(re.findall(r'id="([^"]*)"', svg)) for svg in (one, other))
        assert ids and not ids & others
        assert set(re.findall(r"(?:#)([mp][0-9a-f]{10})", one)) <= ids


def test_dots_stand_where_the_values_are() -> None:
    svg = figures.points(["a", "b", "c"], {"top-1": [(0.2, 0.1, 0.3), (0.4, 0.3, 0.5), (0.8, 0.7, 0.9)]}, "salt")
    marks = re.findall(r'<use xlink:href="#m[0-9a-f]+" x="([\d.]+)" y="([\d.]+)" style="fill: var\(--series-1\)', svg)
    x = [float(mark[0]) for mark in marks]
    assert len(x) == 3 and (x[2] - x[1]) == pytest.approx(2 * (x[1] - x[0]), rel=1e-3)
    assert [float(mark[1]) for mark in marks] == sorted(float(mark[1]) for mark in marks)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])  # as a run's scores are, and as they are counted
@pytest.mark.parametrize("around", [0.0, 1.0, 0.3, -4000.0])
def test_scores_that_are_equal_but_for_rounding_are_drawn(around: float, dtype: type[np.floating]) -> None:
    few = np.full(3, around, dtype)
    for scores in (few[:1], np.nextafter(few, np.array([np.inf, np.inf, -np.inf], dtype)), few + np.array([0, 0, 2e-6], dtype)):
        assert "<svg" in figures.histogram({"predictions": scores}, (figures.GOOD,), "score", "salt")


def test_a_histogram_of_one_kind_needs_no_legend() -> None:
    svg = figures.histogram({"predictions": np.array([0.1, 0.9])}, (figures.GOOD,), "score", "salt")
    words = [text.strip() for text in ElementTree.fromstring(svg).itertext()]
    assert words.count("predictions") == 1 and "score" in words  # the axis' label alone
    assert svg.count("fill: var(--good)") == 20  # bars
