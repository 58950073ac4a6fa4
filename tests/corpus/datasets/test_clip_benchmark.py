"""Folders in clip_benchmark's layout, written by the `webdataset` package, come back whole, in the shards' order."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from rar.config import Corpus, Encoder
from rar.corpus.datasets import named
from rar.corpus.datasets.known import Listed
from rar.corpus.decode import decode
from rar.corpus.listing import read_many
from rar.encoder.templates import templates_of
from rar.schema import UserError

NAMES = ["tench", "great white shark", "cock", "7", "tench"]
CLASSES = [*NAMES[:4], "tench (2)"]  # as ImageNet has a name twice there


def webp(shade: int) -> bytes:
    """Lossless, as clip_benchmark's builder writes it."""
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (shade, 20, 200)).save(buffer, format="webp", lossless=True)
    return buffer.getvalue()


def write(root: Path, rows: list[tuple[int, int]], each: int = 100, split: str = "test") -> Path:
    folder = root / "wds_vtab-made"
    (folder / split).mkdir(parents=True, exist_ok=True)
    (folder / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na drawing of the {c}.\n")
    sink = webdataset.ShardWriter(str(folder / split / "%d.tar"), maxcount=each, verbose=0)
    for number, (shade, label) in enumerate(rows):
        sink.write({"__key__": f"s{number:07d}", "webp": webp(shade), "cls": label})
    (folder / split / "nshards.txt").write_text(f"{sink.shard}\n")
    sink.close()
    return folder


def read(root: Path, name: str = "wds_vtab/made") -> Listed:
    return named.read(Corpus(dataset=name, root=str(root), split="test"))


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(st.integers(0, 255), st.integers(0, len(NAMES) - 1)), min_size=1, max_size=24),
    each=st.integers(1, 3),
)
def test_a_round_trip(rows: list[tuple[int, int]], each: int, tmp_path: Path) -> None:
    """Also of more than ten shards, whose names do not sort as their numbers do."""
    shutil.rmtree(tmp_path / "wds_vtab-made", ignore_errors=True)
    write(tmp_path, rows, each)
    found = read(tmp_path)
    assert found.classes == CLASSES and found.templates == ["a photo of a {}.", "a drawing of the {}."]
    assert found.index["label"].to_pylist() == [CLASSES[label] for _, label in rows]
    blobs = read_many(*(found.index[column].to_pylist() for column in ("uri", "offset", "size")))
    assert blobs == [webp(shade) for shade, _ in rows]
    assert isinstance(blobs[0], bytes) and decode(blobs[0])[0, 0].tolist() == [rows[0][0], 20, 200]


def test_its_templates_are_an_encoders(tmp_path: Path) -> None:
    folder = write(tmp_path, [(1, 1)])
    given = Encoder(templates=str(folder / "zeroshot_classification_templates.txt"))
    assert templates_of(given.templates) == ["a photo of a {}.", "a drawing of the {}."] == read(tmp_path).templates
    (folder / "zeroshot_classification_templates.txt").unlink()
    assert read(tmp_path).templates == []


SPOILS: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / "classnames.txt").unlink(), r"classnames.txt is missing; get it from https://huggingface"),
    (lambda folder: (folder / "test/nshards.txt").unlink(), r"test/nshards.txt is missing; get it from https://huggingface"),
    (lambda folder: (folder / "test/1.tar").unlink(), r"test/1.tar is missing; get it from https://huggingface"),
    (lambda folder: (folder / "test/nshards.txt").write_text("many"), r"nshards.txt must hold one number of shards"),
    (lambda folder: (folder / "classnames.txt").write_text("tench\n"), r"the label '3' of .* is no number below 1 of a class"),
    (shutil.rmtree, r"wds_vtab-made/classnames.txt is missing"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILS)
def test_what_is_missing_is_named_in_one_line(spoil: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    spoil(write(tmp_path, [(1, 3), (2, 2)], 1))
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("wds_vtab-made: ")


def test_check_counts_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, [(1, 3), (2, 2)], split="train")
    write(tmp_path, [(1, 3)])
    found = named.check("wds_vtab-made", str(tmp_path))
    assert [(one.split, one.pictures, one.classes, one.fault) for one in found] == [("train", 2, 5, None), ("test", 1, 5, None)]
