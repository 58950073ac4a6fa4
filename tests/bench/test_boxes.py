"""The simulated detection run is one that a run could have left, and measuring it is measured.

Not covered: whether real proposals, candidates and rankings are like these.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rar.bench import boxes
from rar.corpus import truth as truths
from rar.run import measure
from rar.run.work import Work
from rar.runfolder import RunFolder, read_table
from rar.schema import ERRORS, PREDICTIONS, UserError

SIZE = 2 * boxes.A_PICTURE + 50


def test_the_simulated_run_is_whole(tmp_path: Path) -> None:
    assert boxes.simulate(tmp_path, SIZE) == 3
    truth = truths.read(str(tmp_path / "truth.json"))
    assert not truth.faults and len(truth.boxes.id) == 3 * boxes.OBJECTS and len(truth.categories) == 1203
    absent = [set(truth.category_ids.places(picture.negative or ()).tolist()) for picture in truth.pictures]
    assert all(category not in absent[image] for image, category in zip(truth.boxes.image, truth.boxes.category, strict=True))
    made = RunFolder(tmp_path / "run")
    work = Work(read_table(made.path / "index.parquet"), True, ERRORS.empty_table())
    shards = work.expected(boxes.settings_of(tmp_path).run.shard_size)
    assert made.pending(len(shards)) == [] and made.progress() == (SIZE, 0)
    assert [part.num_rows for part in made.parts_of_predictions()] == list(shards.values())
    found = made.predictions()
    assert found.schema.equals(PREDICTIONS) and found["place"].to_pylist()[:3] == [0, 1, 2]
    listed = [{one["class_id"] for one in row} for row in found["candidates"].to_pylist()]
    assert {len(row) for row in listed} == {boxes.TOP_K}  # five different classes
    asked = np.array(found["rank_status"].to_pylist()) != "skipped"
    assert 0.5 < asked.mean() < 0.7 and made.stats()["mllm.candidates"] == boxes.TOP_K * asked.sum()
    assert {len(scores) for scores in np.array(found["scores"].to_pylist(), object)[asked]} == {boxes.TOP_K}


def test_it_is_measured_alone_as_here(tmp_path: Path) -> None:
    boxes.simulate(tmp_path, SIZE)
    made = RunFolder(tmp_path / "run")
    values = measure.measured(boxes.settings_of(tmp_path), made, read_table(made.path / "index.parquet"), boxed=True)
    assert 0.1 < values["ap"] < 1 and 0.5 < values["proposal_recall"] <= 1 and values["duplicates"] == 0
    assert values["mean_k"] == boxes.TOP_K
    alone = boxes.measured_alone(tmp_path)
    assert alone["ap"] == values["ap"] and alone["seconds"] > 0 and alone["peak_mib"] >= alone["idle_mib"] > 0


def test_a_whole_run_of_two_sizes() -> None:
    found = boxes.run([300, 700])
    rows = found["sizes"]
    assert [row["pictures"] for row in rows.values()] == [1, 3]
    for key, line in found["growth"].items():
        low, high = rows["300"][key], rows["700"][key]
        assert line["slope"] == pytest.approx((high - low) / 400) and line["r2"] == pytest.approx(1)
        assert line["intercept"] + 700 * line["slope"] == pytest.approx(high)
    assert rows["700"]["boxes_per_second"] == pytest.approx(700 / rows["700"]["seconds"])


@pytest.mark.parametrize("sizes", [[1000], [1000, 1000], [0, 1000]])
def test_growth_needs_two_sizes(sizes: list[int]) -> None:
    with pytest.raises(UserError, match="two sizes"):
        boxes.run(sizes)
