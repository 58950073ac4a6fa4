"""What goes wrong on workers, on a real Ray and Serve: pictures that models fail on, processes that die, mistakes found late.

Not covered: real GPUs, several nodes.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
import ray
from PIL import Image
from ray import serve

from rar import config
from rar.engine import client, faults, pipeline, reading, session, waiting
from rar.engine.actors import Pool
from rar.engine.session import Session
from rar.run.work import detect_work
from rar.schema import Unavailable, UserError
from tests.engine import fussy
from tests.engine.fussy import BLUE, GREEN, RED


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(6):
        Image.new("RGB", (40, 30), (number * 40, 90, 20)).save(folder / f"good{number}.png")
    for name, colour in {"red": RED, "green": GREEN, "blue": BLUE}.items():
        Image.new("RGB", (40, 30), colour).save(folder / f"{name}.png")
    return folder


def test_a_detector_that_raises_on_one_picture_fails_exactly_that_row(photos: Path, tmp_path: Path) -> None:
    from tests.crops.test_detector import save_owlv2  # workers import this module: torch would cost each of them seconds

    detect = config.Detect.model_validate({"detector": {"model": str(save_owlv2(tmp_path / "owl")), "threshold": 0.0}})
    index = detect_work(config.validated(config.Config, {"corpus": {"uri": str(photos)}, "detect": detect.model_dump()})).index
    shard = index.append_column("shard", pa.array([0] * index.num_rows, pa.int32()))
    found = fussy.FussyPropose(detect)(reading.load(shard)).to_pylist()
    failed = [(Path(row["uri"]).name, row["stage"], row["error"]) for row in found if row["error"]]
    assert failed == [("green.png", "detect", "RuntimeError: CUDA out of memory. Tried to allocate 20.00 GiB")]
    assert all(row["boxes_xyxy"] for row in found if not row["error"])


class Raises:
    """A stage."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, table: pa.Table) -> pa.Table:
        raise self.error


@ray.remote(max_restarts=0)
class Doomed:
    def end(self) -> None:
        os._exit(1)


def _in_a_task(error: Exception) -> None:
    table = pa.table({"x": [1]})
    with faults.crossing():
        pipeline.collect(pipeline.through(pipeline.shards_of(table, pipeline.evenly(table, 1)), "x", Raises(error)))


def test_mistakes_found_in_a_task_cross_as_themselves(ray_session: Session) -> None:
    with pytest.raises(UserError) as mistake:
        _in_a_task(UserError("lower retriever.top_k"))
    assert type(mistake.value) is UserError and str(mistake.value) == "lower retriever.top_k"
    with pytest.raises(Unavailable) as away:
        _in_a_task(Unavailable("Milvus at x stayed away"))
    assert type(away.value) is Unavailable and str(away.value) == "Milvus at x stayed away"
    with pytest.raises(Unavailable, match="no space is left where the run writes; make room") as full:
        _in_a_task(OSError(errno.ENOSPC, "No space left on device", "/runs/a"))
    assert "\n" not in str(full.value)
    with pytest.raises(Unavailable, match=r"storage does not answer; .* goes on \(Service Unavailable\)$"):
        _in_a_task(OSError(errno.EBUSY, "Service Unavailable"))
    with pytest.raises(UserError, match=r"^a file of the run: Permission denied; see to it that this user may"):
        _in_a_task(PermissionError(errno.EACCES, "Permission denied", "/runs/a"))
    with pytest.raises(UserError, match=r"^/runs/a: Permission denied; see to it"), faults.crossing():
        raise PermissionError(errno.EACCES, "Permission denied", "/runs/a")


def test_a_crash_in_a_task_stays_a_crash(ray_session: Session) -> None:
    with pytest.raises(Exception, match="a bug") as crash:
        _in_a_task(ValueError("a bug"))
    assert not isinstance(crash.value, UserError | Unavailable)


def test_a_process_that_is_gone_is_one_line(ray_session: Session) -> None:
    with pytest.raises(Unavailable, match="a process of the run died") as gone, faults.crossing():
        ray.get(Doomed.remote().end.remote())  # type: ignore[attr-defined]
    assert "\n" not in str(gone.value)


def _hangs(table: pa.Table) -> pa.Table:
    time.sleep(8)
    return table


def test_a_stage_that_hangs_ends_the_run_in_one_line(ray_session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ray.data.DataContext.get_current()
    assert context.execution_no_progress_timeout_s == session.STALLED * ray_session.patience_s
    monkeypatch.setattr(context, "execution_no_progress_timeout_s", 2)
    table, began = pa.table({"x": [1]}), time.monotonic()
    with (
        pytest.raises(Unavailable, match=r"no shard of the run was done within six times run.patience_s") as told,
        faults.crossing(),
    ):
        pipeline.collect(pipeline.through(pipeline.shards_of(table, pipeline.evenly(table, 1)), "x", _hangs))
    assert time.monotonic() - began < 7 and "\n" not in str(told.value)


@pytest.mark.long
def test_a_worker_finds_the_serve_that_replaced_the_one_it_knew(ray_session: Session) -> None:
    worker = fussy.Worker.remote()  # type: ignore[attr-defined]
    for _ in range(2):
        serve.start(proxy_location="Disabled", logging_config=client.QUIET)
        serve.run(serve.deployment(name="ranker")(fussy.Answers).bind(), name="answers", route_prefix=None)
        (answer,) = ray.get(worker.ask.remote(client.Ask("answers")), timeout=60)
        assert answer.order == (0, 1)
        serve.shutdown()


def told(pool: Pool, shards: int) -> list[pa.Table]:
    """What a pool says to shards that are sent all at once."""
    tables = [pa.table({"shard": [number], "pixels": [b""], "stage": [None], "error": [None]}) for number in range(shards)]
    with ThreadPoolExecutor(shards) as threads:
        return list(threads.map(pool.run, tables))


def pool_of(load: type[fussy.Slow], most: int) -> Pool:
    start = partial(session._start_actor, {"num_cpus": 0}, load, None, None)
    return Pool(start, (1, most), "encoder", load.failed, 60, delays_s=(0.1, 1.0))


@pytest.mark.long
def test_a_pool_grows_while_shards_wait_and_shrinks_when_none_do(ray_session: Session) -> None:
    pool = pool_of(fussy.Slow, 3)
    first = pool.facts
    found = told(pool, 24)
    assert [table["shard"][0].as_py() for table in found] == list(range(24))
    assert {table["process"][0].as_py() for table in found} > {first}, "no actor was added"
    until = time.monotonic() + 60
    while (size := ray.get(pool.desk.size.remote())) > 1:
        assert time.monotonic() < until, f"{size} actors stay though no shard comes"
        time.sleep(0.1)
    assert told(pool, 1)[0]["process"].to_pylist()


@pytest.mark.long
def test_a_shard_that_kills_takes_no_other_with_it(ray_session: Session) -> None:
    poisoned, *others = told(pool_of(fussy.Mortal, 1), 6)
    assert "the encoder's process died 3 times on this shard" in poisoned["error"][0].as_py()
    assert [table["error"].to_pylist() for table in others] == [[None]] * 5


@pytest.mark.long
def test_shards_go_on_in_another_process_where_a_device_is_gone(ray_session: Session) -> None:
    found = told(pool_of(fussy.Breaking, 1), 6)
    assert [table["error"].to_pylist() for table in found] == [[None]] * 6
    assert len({table["process"][0].as_py() for table in found}) >= 3


@pytest.mark.long
def test_a_picture_that_a_device_is_gone_with_is_found_by_other_replicas(
    ray_session: Session, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "RankerReplica", fussy.BreakingReplica)
    settings = config.Ranker(max_new_tokens=11)
    client.deploy(ray_session, settings)
    ask = client.ask(ray_session, settings)
    assert ask is not None
    images = [(photos / f"{name}.png").read_bytes() for name in ("good1", "good2", "blue", "good3")]
    found = ask(images, [["a", "b", "c"]] * 4)
    assert [one.status for one in found] == ["ranked", "ranked", "fallback", "ranked"]
    assert found[2].response == f"[Broken: RuntimeError: {fussy.GONE}]"
    client.undeploy(settings)


@pytest.mark.slow
def test_a_shard_that_kills_its_process_again_and_again_becomes_errors(ray_session: Session) -> None:
    pool = ray_session._pool("encoder", fussy.Deadly, config.Encoder(source="deadly"), config.Encoder())
    shard = pa.table({"shard": [0, 0], "pixels": [b"", None], "stage": [None, "read"], "error": [None, "gone"]})
    found = pool.run(shard).to_pylist()
    assert [row["stage"] for row in found] == ["embed", "read"]
    assert "the encoder's process died 3 times on this shard" in found[0]["error"] and found[1]["error"] == "gone"


@pytest.mark.long
def test_an_application_that_cannot_start_is_one_line_each_time(ray_session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config.Ranker(max_new_tokens=9)
    monkeypatch.setattr(client, "RankerReplica", fussy.Faulty)
    for _ in range(2):
        with pytest.raises(Unavailable, match=r"cannot start: .*flash attention is not there") as caught:
            client.deploy(ray_session, settings)
        assert "\n" not in str(caught.value)


def test_a_wait_ends_and_says_what_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(waiting, "SAID_EVERY_S", 0.0)
    left = [False, False, True]
    waiting.until(lambda seconds: left.pop(0), lambda: "1 GPU is wanted", "the encoder", 60)
    assert "waiting for the encoder (0 s): 1 GPU is wanted" in capsys.readouterr().err
    with pytest.raises(Unavailable, match=r"the encoder did not come within run.patience_s 0.01: 1 GPU is wanted"):
        waiting.until(threading.Event().wait, lambda: "1 GPU is wanted", "the encoder", 0.01)


class Counts:
    """What rows are written to, as far as progress asks it: it answers once, and then as it was told to."""

    def __init__(self, then: Exception | None = None) -> None:
        self.then, self.asked = then, 0

    def progress(self) -> tuple[int, int]:
        self.asked += 1
        if self.then is not None and self.asked > 1:
            raise self.then
        return 3, 0


def test_a_run_that_stands_still_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(pipeline, "SAID_EVERY_S", 0.01)
    monkeypatch.setattr(pipeline, "STILL_S", 0.0)
    for target in (Counts(), Counts(OSError("slow down"))):
        with pipeline.progress(target, 9, "run", lambda: "0 of 6 CPUs are free"):
            while target.asked < 3:
                time.sleep(0.01)
    told = capsys.readouterr().err
    assert "run: 3 of 9 rows" in told and "nothing for 0 s: 0 of 6 CPUs are free" in told
    assert "run: how far it is cannot be told now (OSError: slow down)" in told and "Traceback" not in told
