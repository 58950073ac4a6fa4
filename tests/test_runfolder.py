from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rar import config, identity, storage
from rar.runfolder import RunFolder, stages_of, summed
from rar.schema import ERRORS, INDEX, PREDICTIONS, UserError


def configured(*overrides: str) -> config.Config:
    return config.validated(config.Config, {"corpus": {"uri": "photos"}}, overrides)


def opened(path: Path, *overrides: str, verb: str = "classify", fresh: bool = False) -> RunFolder:
    return RunFolder.open(path, verb, configured(*overrides), fresh=fresh, name="birds", group="zoo")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def predicted(*image_ids: str) -> pa.Table:
    row: dict[str, Any] = {
        "row": 0,
        "place": None,
        "uri": "photos/a.jpg",
        "box_xyxy": None,
        "candidates": [{"class_id": 3, "class_name": "wren", "score": 0.5}],
        "ranking": [0],
        "rank_status": "skipped",
        "response": "",
        "scores": [],
        "routed": True,
        "class_id": 3,
        "class_name": "wren",
        "score": 1.0,
    }
    return pa.Table.from_pylist([{"image_id": image_id, **row} for image_id in image_ids], PREDICTIONS)


def failed(*uris: str) -> pa.Table:
    rows = [{"row": 1, "image_id": None, "uri": uri, "stage": "read", "error": "gone"} for uri in uris]
    return pa.Table.from_pylist(rows, ERRORS)


def test_a_new_folder_says_what_it_is(tmp_path: Path) -> None:
    folder = opened(tmp_path / "runs" / "new", "memory.token=sesame", "run.seed=7")
    known = folder.read("run.json")
    assert (known["verb"], known["name"], known["group"], known["seed"]) == ("classify", "birds", "zoo", 7)
    assert known["schema_version"] == 2
    assert known["identity"] == identity.of_run(configured("run.seed=7"))
    assert {"python", "rar", "torch", "pymilvus"} <= set(known["versions"])
    assert config.validated(config.Config, known["config"]) == configured("run.seed=7")  # the token is the only thing left out
    assert (folder.path / "predictions").is_dir() and (folder.path / "errors").is_dir()


def test_the_token_is_never_written(tmp_path: Path) -> None:
    folder = opened(tmp_path, "memory.token=sesame")
    folder.write_shard(0, predicted("a"), failed("b"), {})
    folder.finish({"ok": 1}, {"top1": 1.0}, 2.0, configured("memory.token=sesame"))
    assert b"sesame" not in b"".join(contents(tmp_path).values())


def test_an_empty_folder_may_be_taken(tmp_path: Path) -> None:
    assert opened(tmp_path).read("run.json")["verb"] == "classify"


@pytest.mark.parametrize("same", [(), ("ranker.max_replicas=8", "memory.token=sesame")])
def test_an_equal_config_goes_on(tmp_path: Path, same: Sequence[str]) -> None:
    opened(tmp_path).write_shard(0, predicted("a"), failed(), {})
    before = contents(tmp_path)
    folder = opened(tmp_path, *same)
    assert contents(tmp_path) == before
    assert folder.pending(2) == [1]


@pytest.mark.parametrize(
    ("overrides", "verb", "told"),
    [
        (("run.seed=1",), "classify", "run.seed was 0, is 1"),
        (("retriever.top_k=7", "memory.shots=4"), "classify", "memory.shots was null, is 4; retriever.top_k was 5, is 7"),
        ((), "detect", "it is of `rar classify`"),
    ],
)
def test_another_config_or_verb_is_refused_in_words_and_nothing_changes(
    tmp_path: Path, overrides: Sequence[str], verb: str, told: str
) -> None:
    opened(tmp_path).write_shard(0, predicted("a"), failed("b"), {})
    before = contents(tmp_path)
    with pytest.raises(UserError) as raised:
        opened(tmp_path, *overrides, verb=verb)
    assert str(raised.value) == f"{tmp_path} holds another run: {told}; use --fresh to replace it, or another --out"
    assert contents(tmp_path) == before


def test_weights_code_memory_and_version_are_refused_by_name(tmp_path: Path) -> None:
    clip = tmp_path / "clip"
    clip.mkdir()
    (clip / "weights").write_text("one")
    folder = opened(tmp_path / "run", f"encoder.model={clip}")
    folder.pin_memory("a")
    folder.pin_memory("a")
    with pytest.raises(UserError, match=r"the memory has changed \(a, now b\)"):
        folder.pin_memory("b")
    (clip / "weights").write_text("two")
    with pytest.raises(UserError, match="the weights of the encoder have changed; use --fresh"):
        opened(folder.path, f"encoder.model={clip}")
    (clip / "weights").write_text("one")
    known = folder.read("run.json")
    known["identity"]["code"]["ranker"] = "of yesterday"
    folder.write("run.json", known)
    with pytest.raises(UserError, match=r"rar itself has changed \(ranker\)"):
        opened(folder.path, f"encoder.model={clip}")
    folder.write("run.json", {**known, "schema_version": 1})
    with pytest.raises(UserError, match="another version of rar"):
        opened(folder.path, f"encoder.model={clip}")


@pytest.mark.parametrize("overrides", [(), ("run.seed=1",)])
def test_fresh_starts_over(tmp_path: Path, overrides: Sequence[str]) -> None:
    opened(tmp_path).write_shard(0, predicted("a"), failed("b"), {})
    folder = opened(tmp_path, *overrides, fresh=True)
    assert folder.pending(1) == [0]
    assert folder.errors().num_rows == 0
    assert folder.read("run.json")["identity"] == identity.of_run(configured(*overrides))


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_that_is_no_run_is_never_touched(tmp_path: Path, fresh: bool) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not a run folder and not empty; choose another --out"):
        opened(tmp_path, fresh=fresh)
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


def test_the_first_index_is_kept(tmp_path: Path) -> None:
    first = pa.Table.from_pylist([{"row": 0, "uri": "a.jpg"}, {"row": 1, "uri": "b.jpg", "label": "wren"}], INDEX)
    folder = opened(tmp_path)
    assert folder.freeze_index(first).equals(first)
    assert folder.freeze_index(first.slice(0, 1)).equals(first)
    assert opened(tmp_path).freeze_index(INDEX.empty_table()).equals(first)


def test_a_path_that_looks_like_a_partition_adds_no_column(tmp_path: Path) -> None:
    folder = opened(tmp_path / "seed=1" / "class_id=5")
    index = pa.Table.from_pylist([{"row": 0, "uri": "a.jpg"}], INDEX)
    folder.write_shard(0, predicted("a"), failed("b"), {})
    assert folder.freeze_index(index).equals(index)
    assert folder.predictions().equals(predicted("a"))
    assert folder.errors().equals(failed("b"))


def test_pending_are_the_shards_without_a_mark(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    assert folder.pending(4) == [0, 1, 2, 3]
    for shard in (2, 0):
        folder.write_shard(shard, predicted(str(shard)), failed(), {})
    assert folder.pending(4) == [1, 3]
    folder.write_shard(3, predicted(), failed("all", "gone"), {})  # a shard may hold nothing but errors
    assert folder.pending(4) == [1]
    folder.write_empty([0, 1])  # or nothing at all
    assert folder.pending(4) == [] and folder.progress() == (2, 2)
    (folder.path / "done" / "part-000002_1_0.json").unlink()  # files alone do not count
    assert folder.pending(4) == [2] and folder.part("predictions", 2).exists()


def test_a_shard_written_again_has_one_mark_with_its_new_tally(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    folder.write_shard(0, predicted("a"), failed("b"), {})
    folder.write_shard(0, predicted("a", "b"), failed(), {})
    assert [mark.name for mark in (folder.path / "done").iterdir()] == ["part-000000_2_0.json"]
    assert folder.progress() == (2, 0)


def test_a_kill_between_the_two_files_leaves_the_shard_pending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = opened(tmp_path)

    class Killed(BaseException):
        pass

    @contextmanager
    def writing(file: Path) -> Iterator[IO[bytes]]:
        if file.parent.name == "predictions":
            raise Killed
        with whole(file) as stream:
            yield stream

    whole = storage.writing
    with monkeypatch.context() as patched:
        patched.setattr(storage, "writing", writing)
        with pytest.raises(Killed):
            folder.write_shard(0, predicted("a"), failed("b"), {})
    assert folder.part("errors", 0).exists()
    assert folder.pending(1) == [0]
    folder.write_shard(0, predicted("a"), failed("b"), {})
    with monkeypatch.context() as patched:  # of a shard that is done
        patched.setattr(storage, "writing", writing)
        with pytest.raises(Killed):
            folder.write_shard(0, predicted("a", "b"), failed(), {})
    assert folder.pending(1) == [0]
    folder.write_shard(0, predicted("a", "b"), failed(), {})  # this time b could be read
    assert folder.pending(1) == []
    assert folder.progress() == (2, 0)


def test_a_kill_while_a_file_is_written_leaves_nothing_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = opened(tmp_path)
    folder.write_shard(0, predicted("a"), failed(), {})
    before = folder.read("run.json")

    def half(file: Path, target: Path) -> None:
        os.truncate(file, file.stat().st_size // 2)
        raise KeyboardInterrupt

    def kept(file: Path, missing_ok: bool = False) -> None:
        if file.suffix != ".tmp":  # who is killed tidies nothing up
            unlink(file, missing_ok)

    unlink = Path.unlink
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", half)
        patched.setattr(Path, "unlink", kept)
        for write in (
            lambda: folder.write_shard(1, predicted("b"), failed(), {}),
            lambda: folder.write("run.json", {}),
        ):
            with pytest.raises(KeyboardInterrupt):
                write()
    assert list(tmp_path.rglob("*.tmp"))  # the halves lie there, under names that nothing reads
    assert folder.pending(2) == [1]
    assert folder.predictions().equals(predicted("a"))
    assert (folder.errors().num_rows, folder.progress(), folder.stats()["write.rows"]) == (0, (1, 0), 1)
    assert opened(tmp_path).read("run.json") == before


def test_files_are_whole_and_scratch_files_gone(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    folder.write_shard(12, predicted("a"), failed("b"), {})
    folder.finish({}, {}, 1.0, configured())
    assert sorted(contents(tmp_path)) == [
        "done/part-000012_1_1.json",
        "errors/part-000012.parquet",
        "metrics.json",
        "predictions/part-000012.parquet",
        "run.json",
    ]


def test_a_shard_written_twice_counts_once(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    for _ in range(2):
        folder.write_shard(0, predicted("a"), failed("b"), {"read.rows": 2, "mllm.calls": 1})
    assert folder.progress() == (1, 1)
    assert [folder.stats()[key] for key in ("read.rows", "write.rows", "mllm.calls")] == [2, 2, 1]


def test_predictions_and_errors_come_back_in_shard_order_with_their_schemas(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    for shard in (11, 2, 0):
        folder.write_shard(shard, predicted(f"{shard}a", f"{shard}b"), failed(f"{shard}c"), {"read.rows": 3})
    folder.write_faults(failed("before"))
    assert folder.predictions().schema.equals(PREDICTIONS, check_metadata=True)
    assert folder.errors().schema.equals(ERRORS, check_metadata=True)
    assert folder.predictions().equals(predicted("0a", "0b", "2a", "2b", "11a", "11b"))
    assert folder.errors()["uri"].to_pylist() == ["0c", "2c", "11c", "before"]
    assert folder.progress() == (6, 4)


def test_an_empty_run_has_empty_tables(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    assert folder.predictions().equals(PREDICTIONS.empty_table())
    assert folder.errors().equals(ERRORS.empty_table())
    assert (folder.progress(), folder.stats()) == ((0, 0), {})


def test_other_columns_or_types_are_refused(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    with pytest.raises(ValueError):
        folder.write_shard(0, predicted("a").drop_columns(["routed"]), failed(), {})
    assert folder.pending(1) == [0]


def test_files_can_be_read_by_anyone(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    folder.write_shard(0, predicted("a"), failed("b"), {"read.rows": 1})
    assert pq.read_table(tmp_path / "predictions").to_pylist() == predicted("a").to_pylist()
    assert pq.read_table(tmp_path / "errors").to_pylist() == failed("b").to_pylist()


@given(shards=st.lists(st.dictionaries(st.sampled_from(["read.rows", "read.seconds", "mllm.calls"]), st.integers(0, 99))))
def test_stats_are_summed_over_shards(tmp_path_factory: pytest.TempPathFactory, shards: list[dict[str, float]]) -> None:
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    for part in ("predictions", "errors", "done"):
        (folder.path / part).mkdir()
    for shard, stats in enumerate(shards):
        folder.write_shard(shard, predicted(), failed(), stats)
    for key in ("read.rows", "read.seconds", "mllm.calls"):
        assert folder.stats()[key] == sum(stats.get(key, 0) for stats in shards)


def test_finish_completes_run_json(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    stats = {"read.rows": 4, "read.seconds": 2.0, "embed.rows": 4, "embed.seconds": 0.5, "mllm.calls": 3}
    folder.write_shard(0, predicted("a"), failed("b"), stats)
    folder.write_shard(1, predicted("c"), failed(), {**stats, "mllm.prompt_tokens": 70})
    before = folder.read("run.json")
    assert not folder.finished
    folder.finish({"input": 3, "ok": 2, "failed": 1, "skipped": 0}, {"top1": 0.5}, 2.5, configured("detect.score=class"))
    known = folder.read("run.json")
    assert {key: known[key] for key in before if key != "config"} == {key: before[key] for key in before if key != "config"}
    assert known["config"]["detect"]["score"] == "class"  # what the metrics were measured by
    assert known["measured"] == identity.of_metrics(configured("detect.score=class")) and folder.finished
    assert known["counts"] == {"input": 3, "ok": 2, "failed": 1, "skipped": 0}
    stages = {stage: [entry[key] for key in ("rows", "seconds", "rows_per_second")] for stage, entry in known["stages"].items()}
    assert stages.pop("write")[0] == 3
    assert stages == {"read": [8, 4.0, 2.0], "embed": [8, 1.0, 8.0]} and known["slowest"] == "read"
    assert known["mllm"] == {"calls": 6, "candidates": 0, "prompt_tokens": 70, "output_tokens": 0, "seconds": 0.0}
    assert known["seconds"] == 2.5
    assert folder.read("metrics.json") == {"top1": 0.5}


TWO_TASKS = {"read.rows": 10, "read.seconds": 2.0, "embed.rows": 10, "embed.seconds": 3.0, "embed.waited": 1.0}


def test_the_time_between_two_runs_is_nobodys() -> None:
    """Shards of 6 s each: from 94 to 100 and 97 to 103, and, by the run that took it up, from 994 to 1000."""
    marks: list[dict[str, float]] = [{**TWO_TASKS, "ended": moment, "mllm.seconds": 5.0} for moment in (100.0, 103.0, 1000.0)]
    stats = summed(marks)
    assert stats["pipeline.seconds"] == pytest.approx(15) and stats["pipeline.tasks"] == 2
    assert stats["read.seconds"] == 6.0 and stats["mllm.seconds"] == 15.0 and "ended" not in stats
    assert summed([marks[2], {}, marks[0], marks[1]]) == stats, "in whatever order they are listed"


def test_a_models_stage_is_busy_by_its_processes_and_any_other_by_the_tasks() -> None:
    stats = summed([{**TWO_TASKS, "ended": moment} for moment in (100.0, 103.0)])  # 9 s, of which two tasks at once for 3
    found = stages_of({**stats, "embed.at_once": 1})
    assert found["read"] == {"rows": 20, "seconds": 4.0, "rows_per_second": 5.0, "at_once": 2, "busy": round(4 / 18, 3)}
    model = {"rows": 20, "seconds": 6.0, "rows_per_second": 3.3, "waited": 2.0, "at_once": 1, "busy": round(6 / 9, 3)}
    assert found["embed"] == model


def test_waiting_for_the_ranker_is_not_its_work() -> None:
    """Ten seconds in the stage, of which the one replica worked four; an endpoint's queue is not ours to know."""
    stats = summed([{"rank.rows": 8, "rank.seconds": 10.0, "mllm.seconds": 4.0, "ended": 100.0}])
    asked = stages_of({**stats, "rank.at_once": 1})["rank"]
    assert (asked["seconds"], asked["waited"], asked["busy"]) == (10.0, 6.0, 0.4)
    assert stages_of({**stats, "rank.at_once": 2})["rank"]["busy"] == 0.2
    assert stages_of(stats)["rank"]["busy"] == 1.0 and "waited" not in stages_of(stats)["rank"]


def test_what_another_run_did_is_told_and_has_no_share_of_this_ones_time() -> None:
    stats = summed([{"embed.rows": 10, "embed.before": 50.0, "retrieve.rows": 10, "retrieve.seconds": 2.0, "ended": 100.0}])
    found = stages_of({**stats, "embed.at_once": 1})
    assert found["embed"] == {"rows": 10, "seconds": 50.0, "rows_per_second": 0.2}
    assert stats["pipeline.seconds"] == pytest.approx(2.0) and found["retrieve"]["busy"] == 1.0


def test_without_times_there_is_no_busy_share(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    folder.finish({}, {}, 1.0, configured(), {"embed.rows": 4, "embed.seconds": 2.0})
    known = folder.read("run.json")
    assert known["stages"] == {"embed": {"rows": 4, "seconds": 2.0, "rows_per_second": 2.0}} and known["slowest"] is None


def test_the_seconds_of_a_resumed_run_add_up(tmp_path: Path) -> None:
    for seconds in (2.5, 4.0):
        opened(tmp_path).finish({"ok": 1}, {}, seconds, configured())
    assert opened(tmp_path).read("run.json")["seconds"] == 6.5


def test_a_stage_of_no_measurable_time_has_a_finite_rate(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    folder.write_shard(0, predicted("a"), failed(), {"read.rows": 1, "read.seconds": 0.0})
    folder.finish({}, {}, 0.0, configured())
    assert math.isfinite(folder.read("run.json")["stages"]["read"]["rows_per_second"])


def test_metrics_that_are_no_number_become_null(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    folder.finish({}, {"top1": 0.25, "conditional_rank_accuracy": float("nan")}, 1.0, configured())
    text = (tmp_path / "metrics.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"top1": 0.25, "conditional_rank_accuracy": None}


def test_json_never_holds_what_json_lacks(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    with pytest.raises(ValueError):
        folder.write("metrics.json", {"threshold": math.inf})
    assert not (tmp_path / "metrics.json").exists()


WRITER = """
import sys
from pathlib import Path
from rar.runfolder import RunFolder
for _ in range(200):
    RunFolder(Path(sys.argv[1])).write("metrics.json", {"filler": sys.argv[2] * 50_000})
"""


def test_two_processes_may_write_one_file(tmp_path: Path) -> None:
    """Ray may run a write task twice at once; each writes a scratch file of its own."""
    folder = opened(tmp_path)
    folder.write("metrics.json", {"filler": "c" * 50_000})
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), letter]) for letter in "ab"]
    while any(writer.poll() is None for writer in writers):
        assert folder.read("metrics.json")["filler"] in ("a" * 50_000, "b" * 50_000, "c" * 50_000)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))
