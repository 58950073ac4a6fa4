"""Building, extending, thinning and freezing a memory, on embeddings that need no model; and what a run makes of it.

With real Ray and Milvus Lite. Not covered: pictures (tests/test_pipeline.py), a Milvus server (tests/test_memory.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rar import config
from rar.engine.keeping import Kept
from rar.engine.session import Session
from rar.memory import catalog
from rar.memory.collection import Collection, open_store
from rar.run import build, calibrate, recognise
from rar.run.fitting import entries_of, head_of
from rar.run.vocabulary import class_names, collection, open_memory
from rar.run.work import classify_work
from rar.runfolder import RunFolder
from rar.schema import UserError
from tests.conftest import ROOT

DIM, CLASSES = 16, ["ant", "bee", "cat", "dog", "eel", "fly"]


def around(names: list[str], each: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Vectors near a direction of their class's own."""
    centres = np.random.default_rng(0).normal(size=(len(CLASSES), DIM))
    labels = [name for name in names for _ in range(each)]
    noise = np.random.default_rng(seed).normal(size=(len(labels), DIM))
    return (centres[[CLASSES.index(label) for label in labels]] + 0.4 * noise).astype(np.float32), labels


def write(file: Path, names: list[str], each: int, seed: int) -> str:
    found, labels = around(names, each, seed)
    np.savez(file, embeddings=found, labels=np.array(labels))
    return str(file)


@pytest.fixture(scope="module")
def session(ray_session: Session, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    with open_store(str(tmp_path_factory.mktemp("build") / "store")) as address:
        yield replace(ray_session, memory=address)


def settings(name: str, support: str | None, **sections: Any) -> config.Config:
    data: dict[str, Any] = {
        "memory": {"name": name, "uri": "unused", "support": support and {"uri": support}},
        "encoder": {"model": "precomputed"},
        "ranker": {"method": "none"},
    }
    for key, section in sections.items():
        data[key] = {**data.get(key, {}), **section}
    return config.validated(config.Config, data)


def run(given: config.Config, session: Session, path: Path, *, fresh: bool = False) -> tuple[RunFolder, dict[str, float]]:
    vocabulary = recognise.prepare(session, given)
    folder = RunFolder.open(path, "classify", given, fresh=fresh, name="test", group="classify")
    return folder, recognise.run(session, given, vocabulary, classify_work(given), folder)


@pytest.mark.parametrize("mode", ["fused", "knn", "centroid", "lda", "tip", "text"])
def test_every_mode_classifies_embeddings_of_ones_own(mode: str, session: Session, tmp_path: Path) -> None:
    support, queries = write(tmp_path / "support.npz", CLASSES, 4, 1), write(tmp_path / "queries.npz", CLASSES, 5, 2)
    centres, _ = around(CLASSES, 1, 3)
    np.save(tmp_path / "names.npy", centres)
    memory = {"classes": CLASSES, "class_embeddings": str(tmp_path / "names.npy")}
    given = settings("modes", support, memory=memory, corpus={"uri": queries}, retriever={"mode": mode, "top_k": 3})
    build.build_memory(session, given, fresh=False)
    folder, metrics = run(given, session, tmp_path / "run")
    assert metrics["top1"] > 0.8 and metrics["images"] == 30 and metrics["leaked"] == 0
    for row in folder.predictions().to_pylist():
        scores = [candidate["score"] for candidate in row["candidates"]]
        assert len(scores) == 3 and scores == sorted(scores, reverse=True) and np.exp(scores).sum() <= 1 + 1e-4
        assert row["uri"].startswith(queries + "#")


def test_a_memory_is_judged_by_its_own_images(session: Session, tmp_path: Path) -> None:
    given = settings("judged", write(tmp_path / "support.npz", CLASSES, 4, 1))
    built = build.build_memory(session, given, fresh=False)
    found = calibrate.judged(session, given, recognise.prepare(session, given))
    assert found == pytest.approx(built.metrics["held_out.fused.top1"], abs=0.1) and found > 0.8


def test_a_memory_grows_shrinks_and_keeps_its_ids(session: Session, tmp_path: Path) -> None:
    first = settings("grows", write(tmp_path / "a.npz", ["bee", "dog"], 3, 1))
    assert build.build_memory(session, first, fresh=False).metrics["embedded"] == 6
    ids = {name: number for number, name in enumerate(class_names(first, session.memory_address))}
    assert build.build_memory(session, first, fresh=False).metrics["embedded"] == 0
    more = settings("grows", write(tmp_path / "b.npz", ["ant", "bee"], 2, 2))
    built = build.build_memory(session, more, fresh=False)
    assert (built.metrics["embedded"], built.metrics["entries.images"], built.metrics["classes"]) == (4, 10, 3)
    assert class_names(more, session.memory_address) == ["bee", "dog", "ant"] and ids == {"bee": 0, "dog": 1}
    before = catalog.digest(session.memory_address, "grows")
    assert build.remove(more, session.memory_address, ["dog"])["removed.images"] == 3
    assert class_names(more, session.memory_address) == ["bee", "ant"]
    assert (
        catalog.find(session.memory_address, "grows").counts["images"] == 7
        and catalog.digest(session.memory_address, "grows") != before
    )
    with pytest.raises(UserError, match="no class 'dog'"):
        build.remove(more, session.memory_address, ["dog"])
    found = entries_of(collection(more, session.memory_address, "images"))
    assert found is not None and set(found.class_names) == {"bee", "ant"}


def test_a_snapshot_stays_as_it_was(session: Session, tmp_path: Path) -> None:
    live = settings(
        "frozen", write(tmp_path / "a.npz", ["bee", "dog"], 3, 1), corpus={"uri": write(tmp_path / "q.npz", ["dog"], 4, 9)}
    )
    build.build_memory(session, live, fresh=False)
    version = catalog.snapshot(session.memory_address, "frozen")
    build.remove(live, session.memory_address, ["dog"])
    frozen = live.model_copy(update={"memory": live.memory.model_copy(update={"version": version})})
    _, metrics = run(frozen, session, tmp_path / "old")
    assert metrics["top1"] == 1.0
    assert run(live, session, tmp_path / "new")[1]["top1"] == 0.0
    with pytest.raises(UserError, match="snapshot"):
        build.build_memory(session, frozen, fresh=False)
    with pytest.raises(UserError, match="no version 7"):
        open_memory(session, live.model_copy(update={"memory": live.memory.model_copy(update={"version": 7})}))


def test_pictures_that_the_memory_holds_are_counted(session: Session, tmp_path: Path) -> None:
    support = write(tmp_path / "a.npz", ["bee", "dog"], 3, 1)
    given = settings("leaks", support, corpus={"uri": support})
    build.build_memory(session, given, fresh=False)
    assert run(given, session, tmp_path / "run")[1]["leaked"] == 6
    few = settings("leaks", support, corpus={"uri": support, "limit": 4})  # fewer than there are entries
    assert run(few, session, tmp_path / "few")[1]["leaked"] == 4


def test_a_run_is_not_resumed_on_a_memory_that_changed(session: Session, tmp_path: Path) -> None:
    given = settings(
        "moved", write(tmp_path / "a.npz", ["bee", "dog"], 3, 1), corpus={"uri": write(tmp_path / "q.npz", ["dog"], 4, 9)}
    )
    build.build_memory(session, given, fresh=False)
    run(given, session, tmp_path / "run")
    build.build_memory(session, settings("moved", write(tmp_path / "b.npz", ["ant"], 3, 1)), fresh=False)
    with pytest.raises(UserError, match=r"the memory has changed .* use --fresh"):
        run(given, session, tmp_path / "run")
    run(given, session, tmp_path / "run", fresh=True)


def test_bad_vectors_are_rows_of_errors(session: Session, tmp_path: Path) -> None:
    found, labels = around(["bee", "dog"], 3, 1)
    found[1, 3], found[4] = np.nan, 0
    np.savez(tmp_path / "bad.npz", embeddings=found, labels=np.array(labels))
    built = build.build_memory(session, settings("bad", str(tmp_path / "bad.npz")), fresh=False)
    assert built.rows == 6 and built.metrics["entries.images"] == 4
    assert [row["uri"] for row in built.failed.to_pylist()] == [f"{tmp_path}/bad.npz#{row}" for row in (1, 4)]


def entries(given: config.Config, session: Session) -> Any:
    found = entries_of(collection(given, session.memory_address, "images"))
    assert found is not None
    return found


def test_writers_in_any_number_leave_the_same_memory(session: Session, tmp_path: Path) -> None:
    support, digests = write(tmp_path / "a.npz", CLASSES, 8, 1), []
    for size in (48, 5):  # one shard, and ten at once
        given = settings(f"by_{size}", support, run={"shard_size": size})
        assert build.build_memory(session, given, fresh=False).metrics["embedded"] == 48
        digests.append(catalog.digest(session.memory_address, f"by_{size}"))
    assert digests[0] == digests[1]


def test_a_build_that_died_is_not_seen_and_is_taken_up(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = settings("died", write(tmp_path / "a.npz", ["bee", "dog"], 3, 1))
    build.build_memory(session, first, fresh=False)
    before = catalog.digest(session.memory_address, "died")
    more = settings("died", write(tmp_path / "b.npz", ["ant", "bee"], 4, 2))
    with monkeypatch.context() as patch:
        patch.setattr(build, "_commit", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            build.build_memory(session, more, fresh=False)
    assert catalog.digest(session.memory_address, "died") == before
    assert class_names(more, session.memory_address) == ["bee", "dog"] and len(entries(more, session)) == 6
    built = build.build_memory(session, more, fresh=False)
    assert built.metrics["entries.images"] == 14 and class_names(more, session.memory_address) == ["bee", "dog", "ant"]
    assert built.metrics["embedded"] == 0 and built.stats["ask.rows"] == 8
    whole = settings("alive", write(tmp_path / "a.npz", ["bee", "dog"], 3, 1))
    build.build_memory(session, whole, fresh=False)
    build.build_memory(session, settings("alive", str(tmp_path / "b.npz")), fresh=False)
    assert catalog.digest(session.memory_address, "alive") == catalog.digest(session.memory_address, "died") != before
    assert len(catalog.generations(session.memory_address, "died")) == 2  # the live one and the one before


def test_one_picture_under_two_labels_is_settled_and_told(session: Session, tmp_path: Path) -> None:
    found, labels = around(["bee", "dog"], 3, 1)
    found, labels = np.concatenate([found, found[[0, 0, 4]]]), [*labels, "dog", "dog", "dog"]
    np.savez(tmp_path / "twice.npz", embeddings=found, labels=np.array(labels))
    given = settings("twice", str(tmp_path / "twice.npz"), run={"shard_size": 2})
    built = build.build_memory(session, given, fresh=False)
    assert (built.metrics["entries.images"], built.metrics["copies"], built.metrics["conflicts"]) == (6, 2, 1)
    assert built.metrics["embedded"] == 9
    assert "1 pictures stand under several labels" in " ".join(built.remarks)
    assert sorted(entries(given, session).class_names) == ["bee"] * 2 + ["dog"] * 4
    before = catalog.find(session.memory_address, "twice")
    assert build.build_memory(session, given, fresh=False).metrics["embedded"] == 0
    assert catalog.find(session.memory_address, "twice") == before  # not even another generation


@pytest.mark.parametrize("stale", [False, True])
def test_a_head_is_of_what_the_store_holds_whatever_was_kept(stale: bool, session: Session, tmp_path: Path) -> None:
    given = settings("kept", write(tmp_path / "a.npz", ["bee", "dog"], 3, 1))
    build.build_memory(session, given, fresh=True)
    images = collection(given, session.memory_address, "images")
    stored, kept = images.fetch(), Kept()
    kept.add(replace(stored, class_ids=stored.class_ids[::-1], class_names=stored.class_names[::-1]) if stale else stored)
    head = Collection(session.memory_address, "kept_again_head")
    build._finish(given, "fused", {"images": (images, 6)}, head, {"fingerprint": "f"}, kept)
    wanted = head_of(given, "fused", {"images": stored}).to_entries()
    found = head.fetch()
    head.drop()
    assert found.entry_ids == wanted.entry_ids
    np.testing.assert_allclose(found.vectors, wanted.vectors, atol=1e-6)
    other = head_of(given, "fused", {"images": replace(stored, class_ids=stored.class_ids[::-1])}).to_entries()
    assert np.abs(other.vectors - wanted.vectors).max() > 0.01  # the stale labels would show


def test_a_head_of_other_entries_is_refused(session: Session, tmp_path: Path) -> None:
    given = settings("stale", write(tmp_path / "a.npz", ["bee", "dog"], 3, 1))
    build.build_memory(session, given, fresh=False)
    images = collection(given, session.memory_address, "images")
    stored = images.fetch()
    images.seal(
        6 - images.remove([one for one, class_id in zip(stored.entry_ids, stored.class_ids, strict=True) if not class_id])
    )
    with pytest.raises(UserError, match=r"head fused was fitted on other entries .* mend it with `rar memory CONFIG`"):
        open_memory(session, given)
    with np.load(tmp_path / "a.npz") as whole:
        np.savez(tmp_path / "dogs.npz", embeddings=whole["embeddings"][3:], labels=whole["labels"][3:])
    mended = settings("stale", str(tmp_path / "dogs.npz"))
    assert build.build_memory(session, mended, fresh=False).metrics["embedded"] == 0
    assert list(open_memory(session, mended).names.values()) == ["dog"]


@pytest.mark.slow
def test_a_build_that_is_killed_three_times_leaves_the_same_memory(tmp_path: Path) -> None:
    """The command, killed with all that it started at random moments of its writing, and repeated until it is through."""
    support = write(tmp_path / "a.npz", CLASSES, 2000, 1)
    digests = []
    for name, kills in (("whole", 0), ("killed", 3)):
        data = {"memory": {"name": "m", "uri": str(tmp_path / name), "support": {"uri": support}}, "ranker": {"method": "none"}}
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**data, "encoder": {"model": "precomputed"}, "run": {"shard_size": 64}}))
        command = [sys.executable, "-m", "jobs.cli", "memory", str(file), "--out", str(tmp_path / f"{name}_run")]
        random = np.random.default_rng(kills)
        for _ in range(kills):
            process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(random.uniform(8, 25))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        subprocess.run(command, cwd=ROOT, check=True, timeout=300)
        with open_store(str(tmp_path / name)) as address:
            found = catalog.find(address, "m")
            assert found.counts["images"] == 12_000
            digests.append(found.digest)
    assert digests[0] == digests[1]


@pytest.mark.slow
@pytest.mark.parametrize("index", ["HNSW", "REDUCED"])
def test_any_index_finds_the_same_neighbors(index: str, session: Session, tmp_path: Path) -> None:
    support, queries = write(tmp_path / "s.npz", CLASSES, 9, 1), write(tmp_path / "q.npz", CLASSES, 5, 2)
    found = []
    for kind in ("FLAT", index):
        memory = {"index": {"kind": kind, "reduction": 2}}
        sections = {"memory": memory, "corpus": {"uri": queries}, "retriever": {"mode": "knn", "top_k": 3}}
        given = settings(f"by_{kind}", support, **sections)
        build.build_memory(session, given, fresh=False)
        found.append(run(given, session, tmp_path / kind)[0].predictions()["class_id"].to_pylist())
    assert found[0] == found[1] and len(found[0]) == 30


@pytest.mark.parametrize(
    ("sections", "wanted"),
    [
        ({"encoder": {"model": "miniature"}}, "encoder.model: precomputed"),
        ({"memory": {"class_embeddings": "x.npy"}}, "needs memory.classes"),
        ({"retriever": {"mode": "tip"}}, "which needs class names and support images"),
        ({"encoder": {"source": "another"}}, "made by another encoder"),
    ],
)
def test_mistakes_are_one_line(sections: dict[str, Any], wanted: str, session: Session, tmp_path: Path) -> None:
    support = write(tmp_path / "a.npz", ["bee", "dog"], 3, 1)
    build.build_memory(session, settings("plain", support), fresh=False)
    given = settings("plain" if "memory" not in sections else "other", support, corpus={"uri": support}, **sections)
    with pytest.raises(UserError, match=wanted) as caught:
        build.build_memory(session, given, fresh=False)
        open_memory(session, given)
    assert "\n" not in str(caught.value)
