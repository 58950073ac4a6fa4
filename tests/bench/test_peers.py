"""The bench of peers: its arithmetic, what all are given, what is said of one that cannot run, and (slow) its scripts and ours.

Not covered: clip-retrieval itself, which needs pip; its output is read here as it leaves it.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rar.bench import peers
from rar.hardware import multiplies
from rar.schema import Unavailable, UserError


def vectors(*rows: tuple[float, float]) -> peers.Vectors:
    return {f"{number}.jpg": np.array(row) for number, row in enumerate(rows)}


def test_likeness_is_the_least_cosine_and_who_finds_its_own() -> None:
    assert peers.likeness(vectors((1, 0), (0, 2)), vectors((3, 0), (0, 1))) == (1, 1)
    least, own = peers.likeness(vectors((1, 0), (0, 1)), vectors((1, 0), (0.8, 0.6)))
    assert least == pytest.approx(0.6) and own == 0.5
    with pytest.raises(Unavailable, match="1 vectors of 2 pictures"):
        peers.likeness(vectors((1, 0), (0, 1)), vectors((1, 0)))


def test_peers_are_compared_round_by_round_with_both_precisions() -> None:
    found = dict.fromkeys(("fp32", "bf16", "open_clip"), vectors((1, 0), (0, 1)))
    told = peers.told(found, {"fp32": [10.0, 5.0], "bf16": [5.0, 2.5], "open_clip": [20.0, 5.0]}, 100)
    row = told["open_clip"]
    assert row["fp32"]["ratio"] == 1.5 and row["bf16"]["ratio"] == 3 and row["bf16"]["ratio_high"] == 4
    assert row["cosine"] == row["cosine_bf16"] == row["own"] == 1
    assert told["commands"]["ours bf16"] == {"seconds": 3.75, "low": 2.5, "high": 5.0}
    alone = peers.told({name: found[name] for name in ("fp32", "open_clip")}, {"fp32": [10.0], "open_clip": [20.0]}, 100)
    assert alone["open_clip"].keys() == {"fp32", "cosine", "own"} and alone["commands"].keys() == {"ours fp32", "open_clip"}


def test_rounds_take_turns(tmp_path: Path) -> None:
    order: list[str] = []

    def noted(name: str, out: Path) -> None:
        order.append(name)

    commands = {name: partial(noted, name) for name in "abc"}
    assert {name: len(one) for name, one in peers.in_turns(commands, 2).items()} == {"a": 2, "b": 2, "c": 2}
    assert "".join(order) == "abccba"


def test_a_peer_that_fails_is_said_and_left_out_but_ours_may_not(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(out: Path) -> peers.Vectors:
        raise Unavailable("no\nnetwork")

    works: Any = lambda out: vectors((1, 0), (0, 1))  # noqa: E731
    found, failed = peers.first_round({"fp32": works, "bf16": works, "ray_data": fails, "open_clip": works})
    assert found.keys() == {"fp32", "bf16", "open_clip"} and failed == {"ray_data": "no network"}
    assert capsys.readouterr().err.count("ray_data is left out: no network\n") == 1
    with pytest.raises(Unavailable):
        peers.first_round({"fp32": fails})


def test_an_environment_is_made_once_and_again_for_other_pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[str]] = []

    def done(command: list[str], log: Path) -> None:
        made.append(command)
        (tmp_path / "env" / "bin").mkdir(parents=True, exist_ok=True)
        (tmp_path / "env" / "bin" / "python").touch()

    monkeypatch.setattr(peers, "_done", done)
    python = peers.environment(tmp_path / "env", ["one==1"])
    assert python == tmp_path / "env" / "bin" / "python" and len(made) == 2
    assert peers.environment(tmp_path / "env", ["one==1"]) == python and len(made) == 2
    assert "torch==" in (tmp_path / "env" / "requirements.txt").read_text()
    peers.environment(tmp_path / "env", ["one==2"])
    assert len(made) == 4
    assert peers.environment(tmp_path / "none", ()) == Path(sys.executable)


def test_what_cannot_be_installed_and_unknown_peers_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def done(command: list[str], log: Path) -> None:
        raise Unavailable("no package")

    monkeypatch.setattr(peers, "_done", done)
    assert peers.installed(tmp_path, ["clip-retrieval"]) == ({}, {"clip-retrieval": "no package"})
    with pytest.raises(UserError, match="--peer faiss: one of clip-retrieval"):
        peers.run(tmp_path, peers=["faiss"])


def test_pictures_are_of_one_size_drawn_or_cut_from_photos(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, size in enumerate(((640, 480), (300, 500))):
        Image.new("L", size, 40 * number).save(photos / f"{number}.jpg")
    peers.write_pictures(tmp_path / "cut", 5, photos)
    peers.write_pictures(tmp_path / "drawn", 2, None)
    for name, count in (("cut", 5), ("drawn", 2)):
        files = sorted((tmp_path / name).iterdir())
        assert len(files) == count and {Image.open(file).size for file in files} == {(500, 375)}


def test_clip_retrievals_files_are_read_by_name(tmp_path: Path) -> None:
    (tmp_path / "img_emb").mkdir()
    (tmp_path / "metadata").mkdir()
    np.save(tmp_path / "img_emb" / "img_emb_0.npy", np.eye(2, dtype=np.float16))
    pq.write_table(pa.table({"image_path": ["/far/b.jpg", "/far/a.jpg"]}), tmp_path / "metadata" / "metadata_0.parquet")
    found = peers.PEERS["clip-retrieval"].vectors(tmp_path)
    assert found["b.jpg"].tolist() == [1, 0] and found["a.jpg"].tolist() == [0, 1]


def test_a_command_that_fails_tells_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="ended with 3: away"):
        peers._done([sys.executable, "-c", "print('away'); raise SystemExit(3)"], tmp_path / "log")


@pytest.mark.slow
def test_scripts_and_ours_make_the_same_vectors(tmp_path: Path) -> None:
    found = peers.run(tmp_path, pictures=6, repeats=1, peers=["open_clip", "ray_data"])
    for name in ("open_clip", "ray_data"):
        assert found[name]["cosine"] > 0.999 and found[name]["fp32"]["ratio"] > 0
    assert "unavailable" not in found and found["commands"].keys() == {
        *{"ours fp32", "open_clip", "ray_data"},
        *({"ours bf16"} if multiplies("bf16") else ()),
    }
