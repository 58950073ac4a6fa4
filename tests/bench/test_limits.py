"""The worked model: what must hold of its arithmetic, whatever the rates; the stages that it measures are measured.

Not covered: whether the given rates are true.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rar import config
from rar.bench import limits
from rar.schema import UserError

MEASURED = {"cpu_s_read": 0.001, "cpu_s_decode": 0.004, "driver_s_a_shard": 0.01, "index_bytes": 90.0, "picture_bytes": 1.0}
rates = st.floats(0.1, 1e4)


@given(encoder=rates, ranker=rates, asked=st.floats(0, 1), gpus=st.integers(1, 512))
def test_gpus_are_shared_out_so_that_both_end_together(encoder: float, ranker: float, asked: float, gpus: int) -> None:
    known = limits.Given(encoder_a_gpu=encoder, ranker_a_gpu=ranker, asked=asked, gpus=gpus)
    row = limits.worked(known, MEASURED)["GPUs"]
    assert row["for_encoder"] + row["for_ranker"] == pytest.approx(gpus)
    seconds = 3600 * row["hours"]
    assert known.pictures == pytest.approx(row["for_encoder"] * encoder * seconds)
    assert known.pictures * asked == pytest.approx(row["for_ranker"] * ranker * seconds, abs=1e-3)


def test_the_slowest_of_what_every_run_needs_is_the_limit() -> None:
    plain = limits.worked(limits.Given(), MEASURED)
    assert limits.summary(plain)["limit"]["resource"] == "GPUs"
    starved = limits.worked(limits.Given(cores_a_gpu=0.01, milvus_nodes=1, searches_a_node=1), MEASURED)
    assert limits.summary(starved)["limit"] == {"resource": "cores", "hours": pytest.approx(1e9 * 0.005 / 0.64 / 3600)}
    assert starved["cores"]["keeps_up"] == pytest.approx(plain["cores"]["keeps_up"])


def test_what_is_assumed_is_checked() -> None:
    assert config.validated(limits.Given, {}, ["asked=0", "pictures=1e6"]).pictures == 1e6
    with pytest.raises(UserError, match="did you mean 'gpus'"):
        limits.run(["gpu=8"])


def test_every_stage_is_measured_on_pictures() -> None:
    found = limits.stages(3)
    assert all(found[f"cpu_s_{name}"] > 0 for name in ("read", "decode", "retrieve", "rank", "fuse", "write"))
    assert found["cpu_s_decode"] > found["cpu_s_rank"] and 5e4 < found["picture_bytes"] < 2e5
