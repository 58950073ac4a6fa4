"""A run whose memory is named by guesses: the ordinary chain, retrieval and ranking, judged by clusters and by meaning."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from rar import config
from rar.engine import session as sessions
from rar.evaluation.clustering import cluster_accuracy
from rar.run import build, recognise, work
from rar.runfolder import RunFolder


@pytest.mark.long
def test_guessed_names_through_retrieval_and_ranking(world: Path, ray_session: None, tmp_path: Path) -> None:
    """Support pictures stand under another class's name, always the same one: clusters are right where names are not."""
    names = sorted(folder.name for folder in (world / "novel/support").iterdir())[::15]
    other = dict(zip(names, [*names[1:], names[0]], strict=True))
    for part, name_of in (("support", other), ("test", {name: name for name in names})):
        rows = [(photo, name_of[name]) for name in names for photo in sorted((world / "novel" / part / name).iterdir())]
        with (tmp_path / f"{part}.csv").open("w") as file:
            csv.writer(file).writerows([("uri", "label"), *rows])
    settings = config.validated(
        config.Config,
        {
            "corpus": {"uri": str(tmp_path / "test.csv")},
            "memory": {"uri": str(tmp_path / "m.milvus"), "support": {"uri": str(tmp_path / "support.csv")}},
            "retriever": {"mode": "centroid", "top_k": 3},
            "route": {"mode": "always"},
            "run": {"vocabulary_free": True},
        },
    )
    with sessions.opened(settings.memory, create=True) as session:
        build.build_memory(session, settings, fresh=True)
        vocabulary = recognise.prepare(session, settings)
        folder = RunFolder.open(tmp_path / "run", "classify", settings, fresh=True, name="names", group="classify")
        values = recognise.run(session, settings, vocabulary, work.classify_work(settings), folder)
    predictions = folder.predictions()
    guesses = predictions["class_name"].to_pylist()
    labels = [Path(uri).parent.name for uri in predictions["uri"].to_pylist()]
    assert len(labels) == len(names) == 8 and set(predictions["rank_status"].to_pylist()) <= {"ranked", "repaired"}
    assert values["cluster_accuracy"] == cluster_accuracy(guesses, labels) > values["top1"]
    assert -1 <= values["semantic_similarity"] < 1
    assert json.loads((tmp_path / "run/metrics.json").read_text())["cluster_accuracy"] == values["cluster_accuracy"]
    retrieved = [row[0]["class_name"] for row in predictions["candidates"].to_pylist()]
    assert cluster_accuracy(retrieved, labels) > 0.4
