"""Data from a real memory: held-out candidates, crops of boxes, other data sets, the paper's windows, exports.

With the shared lab (120 novel classes, two pictures each). Not covered: large corpora, cloud stores.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import yaml

from rar.corpus.decode import decode
from rar.ranker.prompt import generate_prompt, letters_prompt
from rar.ranker.wording import LABELS
from rar.run import calibrate
from rar.run.fitting import entries_of
from rar.run.vocabulary import collection, open_memory
from rar.schema import UserError
from rar.tune import card, data, draw, export, paper
from rar.tune.pictures import Pictures
from tests.run.lab import Lab


@pytest.fixture(scope="module")
def collected(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> data.Collected:
    return data.collect(lab.session, lab.settings(), tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def rows(lab: Lab, collected: data.Collected) -> pa.Table:
    return data.divided(collected.rows, lab.settings().tune, 0)


def test_pictures_of_the_memory_get_candidates_that_have_not_seen_them(lab: Lab, collected: data.Collected) -> None:
    table, settings = collected.rows, lab.settings(retriever={"top_k": data.POOL})
    assert (table.num_rows, collected.failed.num_rows, collected.skipped) == (240, 0, 0)
    vocabulary = open_memory(lab.session, settings)
    ids = table["image_id"].to_pylist()
    expected, truth, _ = calibrate.held_out_candidates(lab.session, settings, vocabulary, ids)
    for row in table.to_pylist():
        names = [one["class_name"] for one in row["candidates"]]
        assert names == [one.class_name for one in expected[row["image_id"]]] and len(set(names)) == data.POOL
        assert vocabulary.names[truth[row["image_id"]]] == row["label"]
        assert row["truth"] == (names.index(row["label"]) if row["label"] in names else -1)
        assert row["difficulty"] == ("easy" if row["truth"] == 0 else "hard" if 0 < row["truth"] < 5 else "missed")
    assert table["difficulty"].to_pylist().count("hard") > 20


def test_boxes_become_pictures_as_the_ranker_sees_them(lab: Lab, tmp_path: Path) -> None:
    settings = lab.settings(tune={"corpus": {"uri": str(lab.world / "scenes.json")}})
    found = data.collect(lab.session, settings, tmp_path)
    side = settings.detect.shown.size
    boxes = sum(len(one) for one in data.listed(settings).index["boxes_xyxy"].to_pylist())
    assert found.rows.num_rows > 0 and found.rows.num_rows + found.failed.num_rows + found.skipped == boxes
    for row, image in zip(found.rows.to_pylist(), Pictures(found.rows)(range(found.rows.num_rows)), strict=True):
        assert len(row["box_xyxy"]) == 4 and image.shape == (side, side, 3)
        assert np.array_equal(image, decode(Path(row["picture"]).read_bytes()))


def test_another_corpus_is_retrieved_for_and_another_data_set_judged_by(lab: Lab, tmp_path: Path) -> None:
    settings = lab.settings(tune={"corpus": {"uri": str(lab.world / "novel" / "test")}})
    found = data.collect(lab.session, settings, tmp_path)
    assert found.rows.num_rows == 120 and set(found.rows["difficulty"].to_pylist()) >= {"easy", "hard"}
    other = {"corpus": {"uri": str(lab.world / "novel" / "test")}, "memory": lab.settings().model_dump(mode="json")["memory"]}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    settings = lab.settings(tune={"others": {"again": str(tmp_path / "other.yaml")}, "judged": 50})
    table = data.collect_other(lab.session, settings, "again", tmp_path)
    assert table.num_rows == 50 and set(table["split"].to_pylist()) == {"again"}
    lists = {row["image_id"]: row["candidates"] for row in found.rows.to_pylist()}
    for row in table.to_pylist():  # in batches of other pictures: last digits may differ
        for found_now, before in zip(row["candidates"], lists[row["image_id"]], strict=True):
            assert found_now["class_id"] == before["class_id"]
            assert found_now["score"] == pytest.approx(before["score"], abs=1e-5)


def test_without_labelled_pictures_there_is_nothing_to_learn(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set tune\.corpus or memory\.support"):
        data.listed(lab.settings(memory={"support": None}))


@pytest.mark.parametrize("preset", ["paper-code", "paper-text"])
def test_the_papers_windows_are_what_a_loop_makes(lab: Lab, rows: pa.Table, preset: str) -> None:
    settings = lab.settings(tune={"preset": preset}, ranker={"method": "generate"})
    table, told = paper.with_windows(lab.session, settings, rows)
    lists = table.filter(pc.equal(table["split"], "train")).to_pylist()
    train = rows.filter(pc.equal(rows["split"], "train")).to_pylist()
    entries = entries_of(collection(settings, lab.session.memory_address, "images"))
    assert entries is not None
    vector_of = {name.rsplit("-", 1)[0]: vector for name, vector in zip(entries.entry_ids, entries.vectors, strict=True)}
    asked = {row["image_id"] for row in lists}
    index = train if preset == "paper-code" else [row for row in train if row["image_id"] not in asked]
    assert told["kept"] == len(lists) and told["windows"] == told["pictures"] * 16
    if preset == "paper-code":  # every picture finds itself first, so it is asked about
        assert asked == {row["image_id"] for row in train} == {row["image_id"] for row in index}
        near = [row for row in train if row["image_id"] == lists[0]["image_id"]]
        cosines = {row["image_id"]: float(vector_of[near[0]["image_id"]] @ vector_of[row["image_id"]]) for row in index}
        best = sorted(index, key=lambda row: -cosines[row["image_id"]])[:20]
        windows = [[row["label"] for row in best[start : start + 5]] for start in range(16)]
        expected = [window for window in windows if near[0]["label"] in window]
        found = [row for row in lists if row["image_id"] == lists[0]["image_id"]]
        assert [[one["class_name"] for one in row["candidates"]] for row in found] == expected
    for row in lists:
        names = [one["class_name"] for one in row["candidates"]]
        answer = [names[place] for place in row["target"]]
        assert row["label"] in names and len(names) == 5
        if preset == "paper-code":
            assert answer == sorted(names, key=lambda name: name != row["label"])
        else:
            assert answer == names
    (lesson, *_), shuffled = draw.epoch_of(settings, table)(0), preset == "paper-text"
    names = [one["class_name"] for one in table["candidates"][lesson.row].as_py()]
    assert sorted(lesson.names) == sorted(names) and (shuffled or lesson.names == names)
    assert [lesson.names[place] for place in lesson.order] == [names[place] for place in table["target"][lesson.row].as_py()]


@pytest.mark.parametrize("method", ["letters", "generate"])
def test_exports_ask_what_ranking_asks(lab: Lab, rows: pa.Table, tmp_path: Path, method: str) -> None:
    settings = lab.settings(ranker={"method": method})
    lessons = draw.epoch_of(settings, rows)(0)
    llava = json.loads(export.write(settings, rows, tmp_path, "llava").read_text())
    swift = [json.loads(line) for line in export.write(settings, rows, tmp_path, "swift").read_text().splitlines()]
    assert len(llava) == len(swift) == len(lessons) and len({one["id"] for one in llava}) == len(llava)
    for lesson, one, other in zip(lessons, llava, swift, strict=True):
        asked, answer = (turn["value"] for turn in one["conversations"])
        assert [turn["from"] for turn in one["conversations"]] == ["human", "gpt"]
        names = [*lesson.names, *(["none of these"] if lesson.none else [])]
        prompt = letters_prompt(names) if method == "letters" else generate_prompt(lesson.names)
        assert asked == f"<image>\n{prompt}" and other["messages"][0]["content"] == f"<image>{prompt}"
        assert other["messages"][1] == {"role": "assistant", "content": answer}
        assert method == "generate" or answer == LABELS[lesson.answer]
        assert [one["image"]] == other["images"] and decode(Path(one["image"]).read_bytes()).shape == (96, 96, 3)


def test_the_card_counts_what_there_is(lab: Lab, rows: pa.Table, collected: data.Collected) -> None:
    found = card.of(lab.settings(), rows, collected, None)
    assert sum(part["rows"] for part in found["splits"].values()) == rows.num_rows
    train = found["splits"]["train"]
    assert sum(train["difficulty"].values()) == train["rows"] == found["lists"]["of_an_epoch"]
    truth = rows.filter(pc.equal(rows["split"], "train"))["truth"].to_numpy()
    assert train["recall"]["5"] == pytest.approx(((truth >= 0) & (truth < 5)).mean(), abs=1e-4)
    lists = found["lists"]
    assert sum(lists["position_of_the_truth"]) + lists["without_the_truth"] == lists["of_an_epoch"]
    assert "an epoch has" in card.told(found)
