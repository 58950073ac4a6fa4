"""What a memory gives the online ranker: pictures beside the names, and the label prior. The whole service, started once."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from ray import serve

from rar import miniature
from rar.bench import load
from rar.corpus.decode import decode
from rar.engine.exemplars import Pictures
from rar.gateway import app
from rar.ranker.rank import MllmRanker
from rar.run.calibrate import exemplars
from rar.runfolder import RunFolder
from tests.gateway.test_app import encoded
from tests.run.lab import Lab


@pytest.mark.slow
def test_exemplars_and_the_prior_rank_single_requests_as_they_do_batches(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bare ranker, given the same pictures and the prior that the run folder keeps, is the oracle."""
    monkeypatch.delenv(app.TOKEN, raising=False)
    settings = lab.settings(
        ranker={"exemplars": 1, "debias": "prior"}, route={"mode": "always"}, serve={"port": load.free_port()}
    )
    serve.shutdown()
    folder = RunFolder.open(tmp_path / "run", "serve", settings, fresh=False, name="test", group="serve")
    photos = sorted((lab.world / "novel" / "test").glob("*/*.png"))[::30]
    places = exemplars(settings)
    assert places is not None
    names = [photos[row].parent.name for row in (2, 0, 3)] + ["no class of the memory"]
    with app.serving(lab.session, settings, folder) as url:
        answers = []
        for photo in photos:
            body = json.dumps({"image": encoded(photo.read_bytes()), "candidates": names}).encode()
            request = urllib.request.Request(f"{url}/rank", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=120) as reply:
                answers.append(json.load(reply))
    serve.shutdown()
    prior = folder.read("prior.json")
    assert {"2", "3", "4", "5"} <= set(prior)
    shown = [Pictures().at(places.get(name, [])) for name in names]
    assert [len(pictures) for pictures in shown] == [1, 1, 1, 0]
    images = [decode(photo.read_bytes()) for photo in photos]
    local = MllmRanker(settings.ranker, str(miniature.MLLM))
    truth = local.rank(images, [names] * len(images), [shown] * len(images), prior)
    for answer, right in zip(answers, truth, strict=True):
        assert answer["scores"] == pytest.approx(right.scores, abs=load.NEAR) and answer["status"] == right.status
    without = local.rank(images, [names] * len(images), None, prior)
    assert max(np.abs(np.subtract(a.scores, b.scores)).max() for a, b in zip(truth, without, strict=True)) > 10 * load.NEAR
