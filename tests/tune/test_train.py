"""Small real trainings in this process: an adapter that serves, a curve that a stop does not change, and what goes wrong.

Not covered here: Ray Train and a killed command (test_run, slow), GPUs.
"""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.torch import load_file

from rar import config
from rar.config import Ranker
from rar.ranker.rank import MllmRanker
from rar.schema import UserError
from rar.tune import train
from rar.tune.data import DATA
from rar.tune.fit import history, write_curves
from rar.tune.train import Job
from tests.tiny_mllm import save_llava

NAMES = ["red cat", "blue dog", "green bird"]
COLOURS = [(200, 30, 30), (30, 30, 200), (30, 200, 30)]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_llava(tmp_path_factory.mktemp("model") / "llava"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of each of three colours, two of each to stop by."""
    root, records = tmp_path_factory.mktemp("data"), []
    for number in range(24):
        label, split = NAMES[number % 3], "val" if number >= 18 else "train"
        noise = np.random.default_rng(number).integers(-20, 20, (64, 64, 3))
        Image.fromarray((np.array(COLOURS[number % 3]) + noise).astype(np.uint8)).save(root / f"{number}.png")
        names = [NAMES[(number + turn) % 3] for turn in range(3)]
        candidates = [{"class_id": NAMES.index(name), "class_name": name, "score": -1.0} for name in names]
        one = {"image_id": str(number), "uri": str(root / f"{number}.png"), "label": label, "candidates": candidates}
        records.append(one | {"truth": 0, "difficulty": "easy", "split": split, "group": number})
    pq.write_table(pa.Table.from_pylist(records, DATA), root / "rows.parquet")
    return root / "rows.parquet"


@pytest.fixture
def job(llava: str, rows: Path, tmp_path: Path) -> Callable[..., Job]:
    def made(name: str = "run", ranker: dict[str, Any] | None = None, **tune: Any) -> Job:
        given = {
            "max_steps": 6,
            "batch_size": 4,
            "check_every": 3,
            "learning_rate": 3e-3,
            "max_list": 3,
            "lora_rank": 4,
            **tune,
        }
        asked = {"device": "cpu", "batch_size": 8, **(ranker or {})}
        settings = config.validated(config.Config, {"ranker": asked, "tune": given | tune, "retriever": {"top_k": 3}})
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return Job(settings.model_dump_json(), llava, str(rows), str(folder / "train"), str(folder / "adapter"), None)

    return made


def losses_of(job: Job) -> list[float]:
    return [record["loss"] for record in history(Path(job.folder)) if "loss" in record]


def test_an_adapter_is_trained_and_serves(job: Callable[..., Job], llava: str, tmp_path: Path) -> None:
    given = job(merged=True)
    told = train.work(given)
    assert told["steps"] == 6 and told["best_step"] in (3, 6) and told["trained"] > 0
    assert all("lora" in name for name in load_file(Path(given.adapter) / "adapter_model.safetensors"))
    pixels, listed = [np.full((64, 64, 3), COLOURS[0], np.uint8)], [NAMES]
    plain, adapted, merged = (
        MllmRanker(Ranker(device="cpu", adapter=adapter), model).rank(pixels, listed)[0].scores
        for adapter, model in ((None, llava), (given.adapter, llava), (None, str(tmp_path / "run" / "merged")))
    )
    assert adapted != pytest.approx(plain, abs=1e-4) and merged == pytest.approx(adapted, abs=1e-4)
    write_curves(Path(given.folder), tmp_path / "curves.csv")
    lines = (tmp_path / "curves.csv").read_text().splitlines()
    assert len(lines) == 7 and lines[0].startswith("step,loss") and lines[3].count(",") == 5 and lines[6].split(",")[4]


def test_the_last_checkpoint_serves_unless_it_is_clearly_worse() -> None:
    assert not train.clearly_below(0.60, 0.63, 43) and train.clearly_below(0.50, 0.63, 43)
    assert train.clearly_below(0.60, 0.63, 4300) and not train.clearly_below(0.63, 0.63, 43)


@pytest.mark.long
def test_a_clearly_better_checkpoint_is_what_is_written(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "clearly_below", lambda last, best, count: True)
    judged = iter([(6.0, 0.0), (1.0, 0.0)])
    monkeypatch.setattr(train.RankTrainer, "_judged", lambda self, lessons: next(judged))
    given = job()
    told = train.work(given)
    kept = load_file(Path(given.folder) / "checkpoint-3" / "adapter_model.safetensors")
    written = load_file(Path(given.adapter) / "adapter_model.safetensors")
    assert told["best_step"] == 3 and all(np.array_equal(kept[name], written[name]) for name in kept)


@pytest.mark.long
def test_the_last_step_is_judged_too(job: Callable[..., Job]) -> None:
    given = job(max_steps=4)
    train.work(given)
    judged = [record["step"] for record in history(Path(given.folder)) if "rank_accuracy" in record]
    assert judged == [3, 4] and train.last_checkpoint(Path(given.folder)) == Path(given.folder) / "checkpoint-4"


@pytest.mark.long
@pytest.mark.parametrize(("weights", "written"), [("lora", "adapter_model.safetensors"), ("full", "model.safetensors")])
def test_a_training_that_was_stopped_ends_as_one_that_was_not(job: Callable[..., Job], weights: str, written: str) -> None:
    whole, parts = (job(name, weights=weights, learning_rate=1e-3) for name in ("whole", "parts"))
    for one in (whole, parts):
        train.work(one)
    expected = losses_of(whole)
    assert len(expected) == 6 and losses_of(parts) == pytest.approx(expected, abs=1e-6)
    folder = Path(parts.folder)  # killed while the second checkpoint was written
    (folder / "checkpoint-6" / train.STATE).write_text("{")
    assert train.last_checkpoint(folder) == folder / "checkpoint-3"
    train.clear_partial(folder)
    assert not (folder / "checkpoint-6").exists()
    shutil.rmtree(parts.adapter)
    train.work(parts)
    assert losses_of(parts) == pytest.approx(expected, abs=1e-5)
    first, second = (load_file(Path(given.adapter) / written) for given in (whole, parts))
    assert all(np.allclose(first[name], second[name], atol=1e-5) for name in first)


@pytest.mark.long
@pytest.mark.parametrize(
    ("ranker", "tune"),
    [
        ({"method": "generate"}, {}),
        ({"method": "generate"}, {"anchor": 1.0, "accumulate": 2}),
        ({"method": "generate"}, {"loss": "text"}),
        ({"method": "first"}, {"anchor": 1.0}),
        ({"method": "likelihood"}, {"anchor": 1.0}),
        ({"method": "likelihood"}, {"loss": "text", "anchor": 1.0}),
        ({}, {"anchor": 1.0}),
        ({}, {"loss": "text"}),
        ({}, {"listwise": 1.0, "accumulate": 2}),
        ({}, {"weights": "full", "gradient_checkpointing": True, "learning_rate": 1e-3}),
        ({}, {"vision": True}),
        ({}, {"vision": "only"}),
        ({}, {"vision": "only", "weights": "full", "learning_rate": 1e-3}),
        ({"none_of_these": True}, {"shuffle": False}),
    ],
)
def test_every_way_to_train_takes_a_step(job: Callable[..., Job], ranker: dict[str, Any], tune: dict[str, Any]) -> None:
    given = job(ranker=ranker, max_steps=2, check_every=2, **tune)
    train.work(given)
    assert len(losses_of(given)) == 2 and all(np.isfinite(losses_of(given)))
    written = Path(given.adapter)
    assert (written / ("config.json" if tune.get("weights") == "full" else "adapter_config.json")).exists()
    if tune.get("vision") and "weights" not in tune:
        names = list(load_file(written / "adapter_model.safetensors"))
        assert any("vision" in name for name in names) and any("projector" in name for name in names)
        assert any("language_model" in name for name in names) == (tune["vision"] is True)


@pytest.mark.long
def test_accumulated_passes_are_one_batch(job: Callable[..., Job]) -> None:
    one, cut = job("one", mass=0.5), job("cut", mass=0.5, accumulate=4)
    for given in (one, cut):
        train.work(given)
    assert losses_of(cut) == pytest.approx(losses_of(one), abs=1e-4)


@pytest.mark.long
def test_a_loss_that_is_no_number_ends_it_and_keeps_the_last_checkpoint(job: Callable[..., Job]) -> None:
    wild = job(max_steps=9, check_every=1, learning_rate=1e30)
    with pytest.raises(UserError, match=r"is no number at step \d+: lower tune.learning_rate; .* the last good checkpoint"):
        train.work(wild)
    last = train.last_checkpoint(Path(wild.folder))
    assert last is not None
    assert all(np.isfinite(value.numpy()).all() for value in load_file(last / "adapter_model.safetensors").values())


@pytest.mark.long
def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(job: Callable[..., Job]) -> None:
    given = job(max_steps=3)
    train.work(given)
    more = job(max_steps=6)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # no file may grow beyond, as on a disk that is full
    try:
        with pytest.raises(UserError, match=r"no checkpoint could be written .* make room") as caught:
            train.work(more)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert train.last_checkpoint(Path(more.folder)) == Path(more.folder) / "checkpoint-3"
    assert not (Path(more.folder) / "checkpoint-6").exists()
    train.work(more)
    assert json.loads((Path(more.folder) / "checkpoint-6" / train.STATE).read_text())["global_step"] == 6


@pytest.mark.parametrize(
    ("ranker", "tune", "wanted"),
    [
        ({"method": "yes_no"}, {}, "not yes_no"),
        ({}, {"anchor": 1.0, "weights": "full"}, "set tune.weights: lora"),
        ({}, {"anchor": 1.0, "gradient_checkpointing": True}, "keeps no prefix"),
        ({"method": "generate"}, {"gradient_checkpointing": True}, "keeps no prefix"),
        ({"adapter": "some"}, {}, "leave ranker.adapter out"),
        ({"precision": "fp16"}, {}, "use bf16"),
        ({"exemplars": 1}, {}, "without exemplars"),
        ({}, {"preset": "paper-code"}, "set ranker.method: generate"),
        ({}, {"max_list": 26}, "labels up to 25 candidates"),
        ({}, {"lengths": [30]}, "labels up to 25 candidates"),
        ({}, {"accumulate": 3}, "choose a multiple"),
    ],
)
def test_what_cannot_be_trained(job: Callable[..., Job], ranker: dict[str, Any], tune: dict[str, Any], wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        train.work(job(ranker=ranker, **tune))
