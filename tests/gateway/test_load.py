"""The service under more load than it takes, with a killed replica (rar/bench/load.py). Serve is this test's alone."""

from __future__ import annotations

import pytest
from ray import serve

from rar.bench import load
from rar.engine.session import Session
from rar.gateway import app


@pytest.mark.slow
def test_under_load_nothing_is_lost_and_replicas_come_and_go(ray_session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(app.TOKEN, "not a secret")
    serve.shutdown()
    found = load.run(seconds=60, clients=200)
    serve.shutdown()
    assert found["lost"] == found["wrong"] == found["refused_without_retry_after"] == 0, found
    assert found["killed"] == 1 and found["refused"] > 0 and found["answered"] > 0
    assert max(found["replicas"]) == 2 and found["seconds_until_one_replica"] is not None
    assert all(growth < 30 for growth in found["growth_mb"].values()), found["growth_mb"]
