from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rar import config, schema
from rar.report import cards
from rar.report.page import _errors, write_report
from rar.report.view import read_run
from rar.runfolder import RunFolder
from tests.runs import HOSTILE, classify_run, detect_run, write_truth


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    truth = write_truth(root)
    return [
        classify_run(root, "retriever", "classify / novel classes", 0, seed=1, ranks=False),
        classify_run(root, "rar", "classify / novel classes", 0.9, seed=1, ranks=True),
        classify_run(root, HOSTILE, "classify / seen classes", 0.9, seed=3, ranks=True, images=30),
        detect_run(root, truth, "given", {}),
        detect_run(root, truth, "proposals", {"proposals": "boxes.json"}),
    ]


@pytest.fixture(scope="module")
def page(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    write_report(runs, out, title=f"Report on {HOSTILE}")
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
    assert all(header.get("scope") in ("col", "row", "rowgroup") for header in parsed.all("th"))
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
    arms = re.findall(r"<tr data-arm=.*?</tr>", text, flags=re.DOTALL)
    assert len(arms) == len(runs)
    for folder, row in zip(runs, arms, strict=True):
        shown = check_cells(row, json.loads((folder / "metrics.json").read_text()))
        assert {"top1", "candidate_recall", "mean_k"} <= shown or {"ap", "proposal_recall", "mean_k"} <= shown
    tables = re.findall(r'<table class="by-group">.*?</table>', text, flags=re.DOTALL)
    assert len(tables) == 2  # of the two groups of detection
    for folder, table in zip(runs[3:], tables, strict=True):
        shown = check_cells(table, json.loads((folder / "metrics.json").read_text()))
        assert {"ap", "ap_medium", "ap_common", "ar_100", "ar_medium", "proposal_recall_medium"} <= shown
        assert not {"top1", "candidate_recall"} & shown and "small</th>" not in table  # -1 is no number


def test_a_large_run_is_drawn_from_some_shards_and_says_so(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = in_shards(runs[1], tmp_path / "large", 10)
    monkeypatch.setattr("rar.report.view.SHOWN", 30)
    view = read_run(large)
    assert view.predictions.num_rows == len(view.truth) == 30
    assert view.predictions["row"].to_pylist() == [*range(10), *range(40, 50), *range(70, 80)]
    write_report([large], tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "are of 30 of its 80 predictions" in text
    check_cells(text, json.loads((large / "metrics.json").read_text()))  # numbers are of all rows


def test_of_a_large_detection_run_no_more_than_some_shards_are_read(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = in_shards(runs[3], tmp_path / "large", 2)
    rows, _ = RunFolder(large).progress()
    monkeypatch.setattr("rar.report.view.SHOWN", 6)
    monkeypatch.delattr(RunFolder, "predictions")
    view = read_run(large)
    assert view.boxes is not None and rows > 12
    assert view.predictions.num_rows == len(view.truth) == len(view.boxes.xyxy) == 6
    write_report([large], tmp_path)
    assert f"are of 6 of its {rows} predictions" in (tmp_path / "report.html").read_text()


def in_shards(run: Path, target: Path, rows: int) -> Path:
    """A copy of a run in as many small shards as it takes."""
    whole = RunFolder(run).predictions()
    large = shutil.copytree(run, target)
    for part in ("predictions", "done"):
        shutil.rmtree(large / part)
        (large / part).mkdir()
    for shard, start in enumerate(range(0, whole.num_rows, rows)):
        RunFolder(large).write_shard(shard, whole.slice(start, rows), schema.ERRORS.empty_table(), {})
    return large


def check_cells(row: str, values: dict[str, float | None]) -> set[str]:
    """Hold the table cells of some HTML against a metrics.json; the keys that were shown."""
    cells = re.findall(r'<td data-key="(\w+)">(.*?)</td>', row, flags=re.DOTALL)
    for key, cell in cells:
        plain = re.sub(r"<[^>]+>", " ", cell).replace("−", "-").split()
        value = values.get(key)
        if value is None or value == -1:
            assert plain == ["–"], (key, plain)
            continue
        as_it_is = key in ("flips_won", "flips_lost", "parse_failures", "mean_k")
        assert float(plain[0]) == pytest.approx(value if as_it_is else 100 * value, abs=0.051), key
        low = values.get(f"{key}.ci_low")
        if low is not None:
            assert float(plain[1]) == pytest.approx(100 * low, abs=0.051), key
    return {key for key, _ in cells}


def test_what_no_run_has_is_no_column(runs: list[Path], tmp_path: Path) -> None:
    """Of a run without a ranker nothing is said of one; failed is a word for rows alone."""
    write_report([runs[0]], tmp_path)
    text = (tmp_path / "report.html").read_text()
    values = json.loads((runs[0] / "metrics.json").read_text())
    shown = check_cells(text, values)
    none = {key for key in ("ranked_fraction", "flips_won", "flips_lost", "parse_failures", "rank_gain") if values[key] == 0}
    assert len(none) == 5 and not none & shown and {"top1", "top5", "candidate_recall"} <= shown
    assert "MLLM calls" not in text and "Prompt tokens" not in text
    assert "3 failed, 0 skipped" in text and not re.search(r'data-kind="(failed|won|lost)"', text)


def test_neighbors_of_the_memory_are_shown_where_they_were_kept(runs: list[Path], tmp_path: Path) -> None:
    folder = shutil.copytree(runs[1], tmp_path / "run")
    view = read_run(folder)
    row = int(cards.galleries(view)[0].rows[0])
    truth, picture = view.truth[row], cards.jpeg(cards.picture(view, int(view.places[row])).image, 96)
    near = {"row": view.predictions["row"][row].as_py(), "place": None, "score": 0.875, "picture": picture}
    pq.write_table(pa.Table.from_pylist([near | {"class_name": truth}]), folder / "neighbors.parquet")
    write_report([folder], tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert text.count("nearest in the memory") == 1 and f'alt="{truth} in the memory"' in text and "0.875" in text
    Page(text)


def test_the_best_arm_is_bold_and_one_arm_alone_is_not(runs: list[Path], page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    values = [json.loads((folder / "metrics.json").read_text())["top1"] for folder in runs[:2]]
    bold = re.findall(r'<td data-key="top1">[^/]*?<strong>([\d.]+)</strong>', text)
    assert bold == [f"{100 * max(values):.1f}"]


def test_galleries_show_each_kind_with_its_pictures(runs: list[Path], page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    won = int(read_run(runs[1]).won.sum())
    assert won > cards.PICTURES and f"({cards.PICTURES} of {won}, evenly spread)" in text
    assert {"won", "lost", "wrong", "right"} <= set(re.findall(r'data-kind="(\w+)"', text))
    assert 'alt="crop as the ranker sees it, true class' in text and 'class="placeholder"' in text
    assert 'alt="scene_0.jpg with 2 boxes, listed below"' in text and 'alt="whole picture; this box is predicted' in text


def test_arms_that_share_their_numbers_share_a_row(runs: list[Path], tmp_path: Path) -> None:
    folders = [shutil.copytree(runs[4], tmp_path / name) for name in ("one", "other")]
    for number, folder in enumerate(folders):
        info = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(info | {"name": folder.name}))
        values = json.loads((folder / "metrics.json").read_text())
        (folder / "metrics.json").write_text(json.dumps(values | {"ap_common": 0.3 + number}))
    write_report(folders, tmp_path)
    table = re.findall(r'<table class="by-group">.*?</table>', (tmp_path / "report.html").read_text(), flags=re.DOTALL)[0]
    headings = re.findall(r'<th scope="row(?:group)?"[^>]*>(.*?)</th>', table)
    assert headings == ["AP", "one", "other", "Proposal recall", "every arm", "AR", "every arm"]


def test_only_the_pictures_shown_are_read(runs: list[Path], tmp_path: Path) -> None:
    write_report([runs[1]], tmp_path / "all.html")
    before = (tmp_path / "all.html").read_text()
    shown = set(re.findall(r'title="([^"]+\.jpg)"', before))
    pictures = sorted(Path(runs[1]).parent.glob("pictures/*.jpg"))
    hidden = [picture for picture in pictures if str(picture) not in shown]
    assert len(hidden) > 20
    kept = {picture: picture.read_bytes() for picture in hidden}
    try:
        for picture in hidden:
            picture.write_bytes(b"")
        write_report([runs[1]], tmp_path / "few.html")
    finally:
        for picture, data in kept.items():
            picture.write_bytes(data)
    assert (tmp_path / "few.html").read_text() == before


def test_errors_are_counted_by_reason_without_their_paths(runs: list[Path]) -> None:
    got = _errors(read_run(runs[0]).errors)
    assert [(one["stage"], one["reason"], one["count"]) for one in got] == [
        ("decode", "…: truncated file", 2),
        ("read", "file not found", 1),
    ]
    assert got[0]["examples"] == [f"/data/{HOSTILE}.jpg", "/data/b.jpg"]


def test_the_busiest_stage_is_marked(runs: list[Path], tmp_path: Path) -> None:
    write_report([runs[1]], tmp_path / "report.html")
    info, text = read_run(runs[1]).info, (tmp_path / "report.html").read_text()
    shown = re.findall(r"busy (\d+)\u202f%(: <strong>the slowest</strong>)?", text.replace("&#8239;", "\u202f"))
    assert [int(busy) for busy, _ in shown] == [round(100 * stage["busy"]) for stage in info["stages"].values()]
    assert [bool(slowest) for _, slowest in shown] == [stage == info["slowest"] == "embed" for stage in info["stages"]]
    del info["slowest"]
    for stage in info["stages"].values():
        del stage["busy"]
    old = shutil.copytree(runs[1], tmp_path / "old")  # of an rar that did not tell
    (old / "run.json").write_text(json.dumps(info))
    write_report([old], tmp_path / "old.html")
    write_report([old], tmp_path / "old.html")
    assert not re.findall(r"busy \d+", (tmp_path / "old.html").read_text())


def test_secrets_stay_out_of_the_page(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "s3cr3t-token" not in text and "memory.milvus" in text


def test_counts_that_do_not_add_up_are_said_so(runs: list[Path], tmp_path: Path) -> None:
    broken = shutil.copytree(runs[0], tmp_path / "broken")
    info = json.loads((broken / "run.json").read_text())
    info["counts"]["input"] += 1
    (broken / "run.json").write_text(json.dumps(info))
    write_report([broken], tmp_path / "broken.html")
    write_report([runs[0]], tmp_path)
    assert "does not add up" in (tmp_path / "broken.html").read_text()
    assert "does not add up" not in (tmp_path / "report.html").read_text()


def test_a_detection_run_that_nothing_judges_still_has_a_useful_page(runs: list[Path], tmp_path: Path) -> None:
    unjudged = shutil.copytree(runs[4], tmp_path / "unjudged")
    info = json.loads((unjudged / "run.json").read_text())
    info["config"]["corpus"] |= {"uri": "/gone/truth.json"}
    (unjudged / "run.json").write_text(json.dumps(info))
    (unjudged / "metrics.json").write_text(json.dumps({"mean_k": 3.4}))
    write_report([unjudged], tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "file not found: /gone/truth.json" in text and "Predicted most often" in text and "No labels to judge by." in text
    assert 'class="card scene"' in text and "Scores of the predictions" in text
    assert 'class="by-group"' not in text and "interval bar" not in text
    assert Page(text).open == []


def test_a_run_without_labels_metrics_or_predictions_still_has_a_page(runs: list[Path], tmp_path: Path) -> None:
    unlabelled = shutil.copytree(runs[1], tmp_path / "unlabelled")
    index = pq.read_table(unlabelled / "index.parquet").drop_columns("label").append_column("label", pa.nulls(83, pa.string()))
    pq.write_table(index, unlabelled / "index.parquet")
    (unlabelled / "metrics.json").unlink()
    write_report([unlabelled], tmp_path / "unlabelled.html")
    assert "No labels to judge by." in (tmp_path / "unlabelled.html").read_text()
    empty = shutil.copytree(unlabelled, tmp_path / "empty")
    shutil.rmtree(empty / "predictions")
    write_report([empty], tmp_path / "empty.html")
    Page((tmp_path / "empty.html").read_text())


def test_the_same_runs_give_the_same_page(runs: list[Path], page: Path, tmp_path: Path) -> None:
    write_report(runs, tmp_path / "again.html", title=f"Report on {HOSTILE}")
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()


@pytest.mark.long
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the chromium browser")
def test_a_browser_renders_it_without_a_complaint(runs: list[Path], page: Path, tmp_path: Path) -> None:
    write_report([runs[1]], tmp_path / "against.html", against=runs[0])
    for one in (page, tmp_path / "against.html"):
        rendered(one, tmp_path)


def rendered(page: Path, tmp_path: Path) -> None:
    """Chromium draws the page, and its console stays empty."""
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


def test_no_run_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(schema.UserError, match="no run folder"):
        write_report([], tmp_path / "report.html")


def test_a_memorys_folder_is_a_page_of_what_it_holds(runs: list[Path], tmp_path: Path) -> None:
    settings = config.validated(config.Config, {"memory": {"classes": ["cat", "dog"]}})
    made = RunFolder.open(tmp_path / "memory", "memory", settings, fresh=True, name="birds", group="memory")
    lost = {"uri": f"/data/{HOSTILE}.jpg", "stage": "read", "error": "file not found"}
    made.write_faults(pa.Table.from_pylist([lost], schema.ERRORS))
    values = {"classes": 1234.0, "entries.images": 20.0, "held_out.fused.top1": 0.8125, "held_out.tip.top1": float("nan")}
    made.finish({"input": 21, "ok": 20, "failed": 1, "skipped": 0}, values, 3.5, settings)
    write_report([made.path], tmp_path / "memory.html")
    text = (tmp_path / "memory.html").read_text()
    assert "Memory birds" in text and Page(text).open == []
    cells = dict(re.findall(r'<th scope="row">([\w.]+)</th><td>([^<]*)</td>', text))
    assert cells == {"classes": "1,234", "entries.images": "20", "held_out.fused.top1": "0.812", "held_out.tip.top1": "–"}
    assert "file not found" in text and "<script" not in text
    write_report([made.path, runs[0]], tmp_path / "both.html")  # beside a run
    assert "Memory birds" in (tmp_path / "both.html").read_text() and "retriever" in (tmp_path / "both.html").read_text()


def test_a_folder_of_another_verb_or_version_is_one_line(runs: list[Path], tmp_path: Path) -> None:
    folder = shutil.copytree(runs[0], tmp_path / "other")
    info = json.loads((folder / "run.json").read_text())
    for changed, told in (({"verb": "serve"}, "a folder of `rar serve`"), ({"schema_version": 1}, "another version of rar")):
        (folder / "run.json").write_text(json.dumps(info | changed))
        with pytest.raises(schema.UserError, match=told):
            write_report([folder], tmp_path / "other.html")
