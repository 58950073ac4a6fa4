from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from rar import metrics, report, schema

HOSTILE = "<script>alert('x')</script> & \"quoted\" $x$"
SHAPES = ("circle", "square", "bar")
COLOURS = {"red": "#c8322f", "green": "#2f9e57", "blue": "#3b62c9", "amber": "#d9962b"}
NAMES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES] + [HOSTILE]


def draw(name: str, size: tuple[int, int] = (160, 120), box_xyxy: Sequence[float] = (40, 20, 120, 100)) -> bytes:
    image = Image.new("RGB", size, "#e8e4da")
    canvas = ImageDraw.Draw(image)
    colour, _, shape = name.partition(" ")
    paint = {"circle": canvas.ellipse, "square": canvas.rectangle}.get(shape, canvas.rounded_rectangle)
    paint(list(box_xyxy), fill=COLOURS.get(colour, "#777777"), outline="#222222", width=3)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def prediction(data: bytes, uri: str, truth: str, skill: float, rng: np.random.Generator, ranks: bool) -> dict[str, Any]:
    """A plausible row: the retriever is right with 55 %, a ranker of this skill moves the true class to the front."""
    others = [name for name in NAMES if name != truth]
    names = [str(name) for name in rng.choice(others, 4, replace=False)]
    names.insert(0 if rng.random() < 0.55 else int(rng.integers(1, 4)), truth)
    names = names if rng.random() < 0.93 else [name for name in names if name != truth]
    scores = np.sort(rng.normal(0.27, 0.02, len(names)))[::-1]
    asked = ranks and rng.random() < (0.4 if names[0] == truth else 0.9)  # routing knows a little
    order = list(range(len(names)))
    logits = rng.normal(0, 1, len(names))
    if asked and truth in names:
        first = names.index(truth) if rng.random() < skill else int(rng.integers(len(names)))
        order = [first, *(position for position in order if position != first)]
        logits[first] = logits.max() + rng.exponential(1.5)
    status = ("fallback" if rng.random() < 0.04 else "repaired" if rng.random() < 0.05 else "ranked") if asked else "skipped"
    order = order if status != "fallback" else list(range(len(names)))
    right = names[order[0]] == truth
    return {
        "image_id": schema.content_id(data),
        "uri": uri,
        "box_xyxy": None,
        "candidates": [
            {"class_id": NAMES.index(name), "class_name": name, "score": float(score)}
            for name, score in zip(names, scores, strict=True)
        ],
        "ranking": order,
        "rank_status": status,
        "response": f"[{', '.join(names[position] for position in order)}]" if asked else "",
        "scores": np.log(np.exp(logits) / np.exp(logits).sum()).tolist() if asked else [],
        "routed": asked,
        "class_id": NAMES.index(names[order[0]]),
        "class_name": names[order[0]],
        "score": float(np.clip(rng.beta(7, 2) if right else rng.beta(3, 3), 0, 1)),
    }


def run_json(name: str, group: str, verb: str, counts: dict[str, int], calls: int) -> dict[str, Any]:
    stages = {"decode": 1.31, "embed": 6.02, "retrieve": 0.44, "rank": 0.09 * calls, "write": 0.21}
    return {
        "schema_version": 1,
        "verb": verb,
        "name": name,
        "group": group,
        "config": {"memory": {"uri": "memory.milvus", "token": "s3cr3t-token"}, "retriever": {"mode": "fused", "top_k": 5}},
        "fingerprint": "0123456789abcdef",
        "seed": 0,
        "versions": {"python": "3.11", "torch": "2.7.0"},
        "git_commit": "abc1234",
        "started": "2026-01-02T10:11:12",
        "seconds": 12.3,
        "counts": counts,
        "stages": {
            stage: {"rows": counts["ok"], "seconds": seconds, "rows_per_second": counts["ok"] / max(seconds, 0.01)}
            for stage, seconds in stages.items()
        },
        "mllm": {"calls": calls, "prompt_tokens": 91 * calls, "output_tokens": calls},
    }


def write_run(
    folder: Path, info: dict[str, Any], index: pa.Table, rows: list[dict[str, Any]], values: dict[str, float]
) -> Path:
    for part in ("predictions", "errors"):
        (folder / part).mkdir(parents=True)
    half = len(rows) // 2
    for number, shard in enumerate((rows[:half], rows[half:])):
        pq.write_table(pa.Table.from_pylist(shard, schema=schema.PREDICTIONS), folder / f"predictions/{number:05d}.parquet")
    errors = [
        {"image_id": None, "uri": f"/data/{HOSTILE}.jpg", "stage": "decode", "error": f"/data/{HOSTILE}.jpg: truncated file"},
        {"image_id": None, "uri": "/data/b.jpg", "stage": "decode", "error": "/data/b.jpg: truncated file"},
        {"image_id": None, "uri": "/data/c.jpg", "stage": "read", "error": "file not found"},
    ]
    pq.write_table(
        pa.Table.from_pylist(errors[: info["counts"]["failed"]], schema=schema.ERRORS), folder / "errors/00000.parquet"
    )
    pq.write_table(index, folder / "index.parquet")
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "metrics.json").write_text(metrics.to_json(values))
    return folder


def classify_run(root: Path, name: str, group: str, skill: float, seed: int, ranks: bool, images: int = 80) -> Path:
    rng = np.random.default_rng(seed)
    pictures = root / "pictures"
    pictures.mkdir(exist_ok=True)
    labels, uris, rows = [], [], []
    for number in range(images):
        truth = NAMES[number % len(NAMES)]
        data = draw(truth, box_xyxy=(30 + number % 7, 15, 110 + number % 7, 95))
        path = pictures / f"{number:04d}.jpg"
        if number != 5:  # one picture is gone by the time the report is written
            path.write_bytes(data)
        labels.append(truth)
        uris.append(str(path))
        rows.append(prediction(data, str(path), truth, skill, rng, ranks))
    if ranks:
        rows[5] |= {"class_name": NAMES[0], "rank_status": "ranked"}
        rows[5]["candidates"][0]["class_name"] = NAMES[5]
    index = pa.table(
        {"row": range(images), "uri": uris, "offset": [None] * images, "size": [None] * images, "label": labels},
        schema=schema.INDEX,
    )
    values = metrics.classification(pa.Table.from_pylist(rows, schema=schema.PREDICTIONS), labels)
    counts = {"input": images + 3, "ok": images, "failed": 3, "skipped": 0}
    info = run_json(name, group, "classify", counts, sum(row["rank_status"] != "skipped" for row in rows))
    return write_run(root / f"{group.replace('/', '-')}-{name}", info, index, rows, values)


def detect_run(root: Path) -> Path:
    rng = np.random.default_rng(7)
    scenes, rows = [], []
    for number in range(8):
        names = [NAMES[(number + shift) % 12] for shift in (0, 5)]
        boxes = [[20.0, 30.0, 90.0, 100.0], [130.0, 60.0, 210.0, 140.0]]
        image = Image.new("RGB", (240, 180), "#dfe6ea")
        for name, (left, top, right, bottom) in zip(names, boxes, strict=True):
            tile = Image.open(io.BytesIO(draw(name, (int(right - left), int(bottom - top)), (8, 8, 60, 60))))
            image.paste(tile, (int(left), int(top)))
        path = root / f"scene_{number}.jpg"
        image.save(path)
        scenes.append(
            {
                "row": number,
                "uri": str(path),
                "offset": None,
                "size": None,
                "label": None,
                "boxes_xyxy": boxes,
                "box_labels": names,
            }
        )
        for name, box in zip(names, boxes, strict=True):
            rows.append(
                prediction(path.read_bytes(), str(path), name, 0.8, rng, True) | {"box_xyxy": [value + 2 for value in box]}
            )
    values = {"ap": 0.412, "ap_rare": -1.0, "ap_common": 0.405, "ap_frequent": 0.4305}
    info = run_json("rar", "detect / scenes", "detect", {"input": 16, "ok": 16, "failed": 0, "skipped": 0}, 9)
    return write_run(root / "detect-rar", info, pa.Table.from_pylist(scenes), rows, values)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [
        classify_run(root, "retriever", "classify / novel classes", 0, seed=1, ranks=False),
        classify_run(root, "rar", "classify / novel classes", 0.9, seed=1, ranks=True),
        classify_run(root, HOSTILE, "classify / seen classes", 0.9, seed=3, ranks=True, images=30),
        detect_run(root),
    ]


@pytest.fixture(scope="module")
def page(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    report.write_report(runs, out, title=f"Report on {HOSTILE}")
    return out


class Page(HTMLParser):
    """Collects what the tests ask about, and refuses badly nested tags."""

    VOID = ("meta", "link", "img", "br", "path", "use", "line", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def parsed(page: Path) -> Page:
    return Page(page.read_text(encoding="utf-8"))


def test_the_page_is_well_formed_and_accessible(parsed: Page) -> None:
    assert parsed.open == []
    assert parsed.all("html")[0]["lang"] == "en"
    assert parsed.all("img") and all(image["alt"] for image in parsed.all("img"))
    assert all(header.get("scope") in ("col", "row") for header in parsed.all("th"))
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_page_is_self_contained(page: Path, parsed: Page) -> None:
    assert not parsed.all("script") and not parsed.all("iframe")
    for tag, attributes in parsed.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, value)
        assert not any(name.startswith("on") for name in attributes), attributes
    styles = re.sub(r'xmlns(:xlink)?="[^"]*"', "", page.read_text(encoding="utf-8"))
    assert not re.search(r"url\((?!#)|@import|https?://", styles)
    assert page.stat().st_size < 2_000_000


def test_hostile_names_are_inert_and_readable(page: Path, parsed: Page) -> None:
    assert "<script" not in page.read_text(encoding="utf-8")
    shown = [text for text in parsed.texts if HOSTILE in text]
    assert len(shown) > 5  # title, arm, candidates, error paths
    assert any("hostile" not in text and "$x$" in text for text in shown)


def test_numbers_shown_equal_metrics_json(runs: list[Path], page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    bodies = [row for row in re.findall(r"<tr>.*?</tr>", text, flags=re.DOTALL) if "data-key" in row]
    assert len(bodies) == len(runs)
    for folder, row in zip(runs, bodies, strict=True):
        values = json.loads((folder / "metrics.json").read_text())
        cells = dict(re.findall(r'<td data-key="(\w+)">(.*?)</td>', row, flags=re.DOTALL))
        assert {"top1", "candidate_recall"} <= set(cells) or {"ap", "ap_common"} <= set(cells)
        for key, cell in cells.items():
            plain = re.sub(r"<[^>]+>", " ", cell).replace("−", "-").split()
            value = values[key]
            if value is None or (key.startswith("ap") and value == -1):
                assert plain == ["–"], (key, plain)
                continue
            counted = key in ("flips_won", "flips_lost", "parse_failures")
            assert float(plain[0]) == pytest.approx(value if counted else 100 * value, abs=0.051), key
            if f"{key}.ci_low" in values and values[f"{key}.ci_low"] is not None:
                assert float(plain[1]) == pytest.approx(100 * values[f"{key}.ci_low"], abs=0.051), key


def test_the_best_arm_is_bold_and_one_arm_alone_is_not(runs: list[Path], page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    values = [json.loads((folder / "metrics.json").read_text())["top1"] for folder in runs[:2]]
    bold = re.findall(r'<td data-key="top1">[^/]*?<strong>([\d.]+)</strong>', text)
    assert bold == [f"{100 * max(values):.1f}"]


def test_galleries_show_each_kind_with_its_pictures(runs: list[Path], page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    run = report.read_run(runs[1])
    won = int((run.found.correct & ~run.found.retriever_correct).sum())
    assert won > report.PICTURES and f"({report.PICTURES} of {won}, evenly spread)" in text
    assert {"won", "lost", "failed"} <= set(re.findall(r'data-kind="(\w+)"', text))
    assert 'alt="crop, true class' in text and 'alt="whole picture with the box, true class' in text
    for source in re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)[:3]:
        assert max(Image.open(io.BytesIO(base64.b64decode(source))).size) <= report.THUMBNAIL


def test_a_picture_that_is_gone_becomes_a_placeholder(runs: list[Path], page: Path) -> None:
    assert 'class="placeholder"' in page.read_text(encoding="utf-8")
    card = report._cards(report.read_run(runs[1]), np.array([5]))[0]
    assert card["pictures"] == [] and card["unreadable"]


def test_candidates_come_in_ranked_order_with_their_bars() -> None:
    record = {
        "candidates": [{"class_name": name, "score": score} for name, score in (("a", 0.3), ("b", 0.2), ("c", 0.1))],
        "ranking": [2, 0, 1],
        "scores": np.log([0.2, 0.1, 0.1]).tolist(),
        "class_name": "c",
    }
    got = report._candidates(record, truth="a")
    assert [(one["name"], one["was"], one["true"], one["predicted"]) for one in got] == [
        ("c", 3, False, True),
        ("a", 1, True, False),
        ("b", 2, False, False),
    ]
    assert [one["chance"] for one in got] == pytest.approx([0.25, 0.5, 0.25])
    assert [one["bar"] for one in got] == pytest.approx([0.1, 1.0, 0.55])
    assert all(one["chance"] is None for one in report._candidates(record | {"scores": []}, truth=None))


def test_a_box_takes_the_label_of_the_box_it_overlaps(runs: list[Path]) -> None:
    run = report.read_run(runs[3])
    assert run.truth[:2] == [NAMES[0], NAMES[5]]
    index = run.index.slice(0, 1)
    far = run.predictions.slice(0, 1).set_column(2, "box_xyxy", pa.array([[200.0, 0.0, 230.0, 20.0]], pa.list_(pa.float32())))
    assert report._truth(far, index, np.array([0])) == [None]
    assert report._iou(np.array([[0.0, 0, 2, 2], [5, 5, 6, 6]]), np.array([1.0, 0, 3, 2])) == pytest.approx([1 / 3, 0])


@pytest.mark.parametrize("box", [(-20, -20, 30, 30), (90, 70, 500, 500), (50, 50, 50, 50), (400, 400, 500, 500)])
def test_any_box_has_a_crop(box: tuple[float, ...]) -> None:
    crop, scene = report._pictures(np.zeros((80, 100, 3), np.uint8), box)
    assert (crop["what"], scene["what"]) == ("crop", "whole picture with the box")
    assert report._pictures(np.zeros((80, 100, 3), np.uint8), None)[0]["what"] == "picture"


def test_errors_are_counted_by_reason_without_their_paths(runs: list[Path]) -> None:
    got = report._errors(report.read_run(runs[0]).errors)
    assert [(one["stage"], one["reason"], one["count"]) for one in got] == [
        ("decode", "…: truncated file", 2),
        ("read", "file not found", 1),
    ]
    assert got[0]["examples"] == [f"/data/{HOSTILE}.jpg", "/data/b.jpg"]


def test_secrets_stay_out_of_the_page(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "s3cr3t-token" not in text and "(hidden)" in text


def test_counts_that_do_not_add_up_are_said_so(runs: list[Path], tmp_path: Path) -> None:
    broken = shutil.copytree(runs[0], tmp_path / "broken")
    info = json.loads((broken / "run.json").read_text())
    info["counts"]["input"] += 1
    (broken / "run.json").write_text(json.dumps(info))
    report.write_report([broken], tmp_path / "broken.html")
    report.write_report([runs[0]], tmp_path)
    assert "does not add up" in (tmp_path / "broken.html").read_text()
    assert "does not add up" not in (tmp_path / "report.html").read_text()


def test_a_run_without_labels_metrics_or_predictions_still_has_a_page(runs: list[Path], tmp_path: Path) -> None:
    unlabelled = shutil.copytree(runs[1], tmp_path / "unlabelled")
    index = pq.read_table(unlabelled / "index.parquet").drop_columns("label").append_column("label", pa.nulls(80, pa.string()))
    pq.write_table(index, unlabelled / "index.parquet")
    (unlabelled / "metrics.json").unlink()
    report.write_report([unlabelled], tmp_path / "unlabelled.html")
    assert "No labels to judge by." in (tmp_path / "unlabelled.html").read_text()
    empty = shutil.copytree(unlabelled, tmp_path / "empty")
    shutil.rmtree(empty / "predictions")
    report.write_report([empty], tmp_path / "empty.html")
    Page((tmp_path / "empty.html").read_text())


def test_a_folder_that_is_no_run_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(schema.UserError, match=r"holds no run\.json"):
        report.write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(schema.UserError, match="no run folder"):
        report.write_report([], tmp_path / "report.html")


def test_the_same_runs_give_the_same_page(runs: list[Path], page: Path, tmp_path: Path) -> None:
    report.write_report(runs, tmp_path / "again.html", title=f"Report on {HOSTILE}")
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the chromium browser")
def test_a_browser_renders_it_without_a_complaint(page: Path, tmp_path: Path) -> None:
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/profile",
        "--enable-logging=stderr",
    ]
    done = subprocess.run(
        [*command, "--v=0", f"--screenshot={tmp_path}/page.png", "--window-size=400,1600", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    assert len(Image.open(tmp_path / "page.png").convert("RGB").getcolors(1_000_000) or []) > 50
