from __future__ import annotations

import io
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rar.config import Corpus
from rar.corpus.listing import format_of, list_images
from rar.corpus.vectors import class_embeddings, dim_of, fingerprint, read_vectors, vector_id
from rar.schema import INDEX, RowError, UserError
from tests.conftest import SHARED_DATA

needs_shared_data = pytest.mark.skipif(not SHARED_DATA.exists(), reason="needs ../shared/data")

VECTORS = np.array([[3.0, 4.0], [0.0, -2.0], [5.0, 12.0], [1.0, 0.0]], np.float32)
UNIT = np.array([[0.6, 0.8], [0.0, -1.0], [5 / 13, 12 / 13], [1.0, 0.0]], np.float32)
DIRECTIONLESS = "the vector is zero: it has no direction"
INCOMPLETE = "the vector is missing, or not of 2 finite numbers"


def write(root: str, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        fs, path = fsspec.core.url_to_fs(f"{root}/{name}")
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        fs.pipe(path, data)
    return root


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def npz(compressed: bool = False, **arrays: Any) -> bytes:
    stream = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(stream, **arrays)
    return stream.getvalue()


def parquet(row_group_size: int = 2, **columns: Any) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream, row_group_size=row_group_size)
    return stream.getvalue()


def corpus(uri: str, **settings: Any) -> Corpus:
    return Corpus.model_validate({"uri": uri, **settings})


def vectors_of(found: Corpus) -> np.ndarray:
    """Every vector of a corpus without faults, through its index as a pipeline would."""
    vectors, faults = read_vectors(found, list_images(found)["row"].to_pylist())
    assert faults == [None] * len(vectors)
    return vectors


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty folder, once on the disk (where .npy is memory-mapped) and once on a file system that only fsspec knows."""
    if request.param == "local":
        yield str(tmp_path)
        return
    folder = f"memory://{uuid.uuid4().hex}"
    yield folder
    fs, path = fsspec.core.url_to_fs(folder)
    if fs.exists(path):
        fs.rm(path, recursive=True)


# The three formats


@pytest.mark.parametrize("compressed", [False, True])
def test_an_npz_is_an_index_and_unit_vectors(root: str, compressed: bool) -> None:
    write(root, {"a.npz": npz(compressed, embeddings=VECTORS, class_id=np.array([7, 7, 0, 1], np.int16))})
    found = corpus(f"{root}/a.npz")
    table = list_images(found)
    assert table.schema == INDEX and format_of(found) == "embeddings" and dim_of(found) == 2
    assert table["row"].to_pylist() == [0, 1, 2, 3]
    assert [uri.rpartition("/")[2] for uri in table["uri"].to_pylist()] == [f"a.npz#{row}" for row in range(4)]
    assert table["label"].to_pylist() == ["7", "7", "0", "1"]
    assert table["offset"].null_count == table["size"].null_count == 4
    assert vectors_of(found).dtype == np.float32
    np.testing.assert_allclose(vectors_of(found), UNIT, atol=1e-7)


@pytest.mark.parametrize("ids", ["ids", "uri", "files"])
@pytest.mark.parametrize("labels", ["label", "labels", "class_name"])
def test_names_in_an_npz(tmp_path: Path, ids: str, labels: str) -> None:
    names: dict[str, Any] = {ids: np.array(["w", "x", "y", "ü"]), labels: np.array(["cat", "", "dog", "cat"])}
    write(str(tmp_path), {"a.npz": npz(embeddings=VECTORS, class_id=np.arange(4), **names)})
    table = list_images(corpus(f"{tmp_path}/a.npz"))
    assert table["uri"].to_pylist() == ["w", "x", "y", "ü"]
    assert table["label"].to_pylist() == ["cat", None, "dog", "cat"]  # names go before class_id


def test_arrays_of_other_names(tmp_path: Path) -> None:
    write(str(tmp_path), {"a.npz": npz(features=VECTORS, species=np.array([b"a", b"b", b"c", "ü".encode()]))})
    found = corpus(f"{tmp_path}/a.npz", vector_column="features", label_column="species")
    assert list_images(found)["label"].to_pylist() == ["a", "b", "c", "ü"]
    np.testing.assert_allclose(vectors_of(found), UNIT, atol=1e-7)


def test_an_npy_has_its_names_in_a_manifest(root: str) -> None:
    write(root, {"a.npy": npy(VECTORS), "names.csv": b"uri,label\nw,007\nx,\ny,dog\nz,cat\n"})
    found = corpus(f"{root}/a.npy", ids=f"{root}/names.csv")
    table = list_images(found)
    assert table["uri"].to_pylist() == ["w", "x", "y", "z"]
    assert table["label"].to_pylist() == ["007", None, "dog", "cat"]
    np.testing.assert_allclose(vectors_of(found), UNIT, atol=1e-7)


def test_an_npy_alone_and_with_labels_alone(root: str) -> None:
    write(root, {"a.npy": npy(VECTORS), "labels.parquet": parquet(kind=["a", "b", None, "d"])})
    bare = list_images(corpus(f"{root}/a.npy"))
    assert bare["label"].null_count == 4
    labelled = list_images(corpus(f"{root}/a.npy", ids=f"{root}/labels.parquet", label_column="kind"))
    assert labelled["label"].to_pylist() == ["a", "b", None, "d"]
    assert labelled["uri"] == bare["uri"]


ARROW_LISTS = [
    pa.list_(pa.float32(), 2),
    pa.list_(pa.float32()),
    pa.large_list(pa.float64()),
    pa.list_(pa.float16(), 2),
    pa.list_(pa.int32()),
]


@pytest.mark.parametrize("kind", ARROW_LISTS, ids=str)
def test_a_parquet_of_lists(root: str, kind: pa.DataType) -> None:
    rows = [[np.float16(x) if kind.value_type == pa.float16() else x for x in row.tolist()] for row in VECTORS]
    values = pa.array(rows, kind)
    write(root, {"a.parquet": parquet(3, uri=["w", "x", "y", "z"], vector=values, label=["a", "b", None, "d"])})
    found = corpus(f"{root}/a.parquet")
    assert format_of(found) == "embeddings" and dim_of(found) == 2
    table = list_images(found)
    assert table["uri"].to_pylist() == ["w", "x", "y", "z"] and table["label"].to_pylist() == ["a", "b", None, "d"]
    np.testing.assert_allclose(vectors_of(found), UNIT, atol=1e-7)


def test_which_parquet_is_what(tmp_path: Path) -> None:
    vector, uri = pa.array(VECTORS.tolist()), ["1", "2", "3", "4"]
    files = {
        "embeddings": parquet(uri=uri, vector=vector),
        "parquet": parquet(bytes=[b"1"] * 4, vector=vector),
        "manifest": parquet(uri=uri, vector=["no", "list", "of", "numbers"]),
    }
    write(str(tmp_path), {f"{name}.parquet": data for name, data in files.items()})
    for name in files:
        assert format_of(corpus(f"{tmp_path}/{name}.parquet")) == name
    assert format_of(corpus(f"{tmp_path}/embeddings.parquet", vector_column="other")) == "manifest"
    assert format_of(corpus(f"{tmp_path}/embeddings.parquet", format="manifest")) == "manifest"


def test_several_files_are_one_corpus(root: str) -> None:
    label = np.array(["cat", "dog"])
    write(root, {"p-1.npz": npz(embeddings=VECTORS[2:], labels=label), "p-0.npz": npz(embeddings=VECTORS[:2], labels=label)})
    for uri in (root, f"{root}/p-*.npz", f"{root}/p-{{0..1}}.npz"):
        found = corpus(uri)
        np.testing.assert_allclose(vectors_of(found), UNIT, atol=1e-7)
        assert list_images(found)["label"].to_pylist() == ["cat", "dog"] * 2
        vectors, _ = read_vectors(found, [3, 0, 3])
        np.testing.assert_allclose(vectors, UNIT[[3, 0, 3]], atol=1e-7)
    assert len(list_images(corpus(root, limit=3))) == 3


def test_a_folder_of_parquet_files(tmp_path: Path) -> None:
    parts = {f"p-{part}.parquet": parquet(vector=pa.array(VECTORS[2 * part :][:2].tolist())) for part in range(2)}
    np.testing.assert_allclose(vectors_of(corpus(write(str(tmp_path), parts))), UNIT, atol=1e-7)


# Values


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int8, np.dtype(">f4")])
def test_any_numbers_become_float32_of_unit_norm(tmp_path: Path, kind: Any) -> None:
    rng = np.random.default_rng(0)
    raw = (rng.normal(size=(50, 64)) * 20).astype(kind)
    write(str(tmp_path), {"a.npy": npy(np.asfortranarray(raw))})
    vectors = vectors_of(corpus(f"{tmp_path}/a.npy"))
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    wide = raw.astype(np.float64)
    np.testing.assert_allclose(vectors, wide / np.linalg.norm(wide, axis=1, keepdims=True), atol=1e-6)


def test_squares_neither_overflow_nor_vanish(tmp_path: Path) -> None:
    write(str(tmp_path), {"a.npy": npy(np.array([[3e200, 4e200], [3e-200, 4e-200]]))})
    np.testing.assert_allclose(vectors_of(corpus(f"{tmp_path}/a.npy")), [[0.6, 0.8]] * 2, atol=1e-7)


def test_a_bad_vector_is_a_bad_row(tmp_path: Path) -> None:
    raw = np.array([[3, 4], [0, 0], [np.nan, 1], [np.inf, 1], [-0.0, 0], [0, -2]], np.float16)
    lists = pa.array([[3.0, 4.0], [0.0, 0.0], None, [1.0, None], [1.0, 2.0, 3.0], [0.0, -2.0]])
    write(str(tmp_path), {"a.npz": npz(embeddings=raw), "b.parquet": parquet(4, vector=lists)})
    expected = {
        "a.npz": [None, DIRECTIONLESS, INCOMPLETE, INCOMPLETE, DIRECTIONLESS, None],
        "b.parquet": [None, DIRECTIONLESS, INCOMPLETE, INCOMPLETE, INCOMPLETE, None],
    }
    for name, reasons in expected.items():
        found = corpus(f"{tmp_path}/{name}")
        vectors, faults = read_vectors(found, list_images(found)["row"].to_pylist())
        assert [None if fault is None else str(fault) for fault in faults] == reasons
        assert all(fault is None or isinstance(fault, RowError) for fault in faults)
        np.testing.assert_allclose(vectors[[0, 5]], UNIT[:2], atol=1e-7)
        assert not vectors[1:5].any()


def test_a_file_that_goes_away_loses_only_its_rows(tmp_path: Path) -> None:
    write(str(tmp_path), {"a.npz": npz(embeddings=VECTORS[:2]), "b.npz": npz(embeddings=VECTORS[2:])})
    found = corpus(str(tmp_path))
    read_vectors(found, [0])
    os.remove(tmp_path / "b.npz")
    vectors, faults = read_vectors(found, [0, 3, 1, 2])
    assert [str(fault)[:12] for fault in faults] == ["None", "cannot read ", "None", "cannot read "]
    np.testing.assert_allclose(vectors[[0, 2]], UNIT[:2], atol=1e-7)
    assert read_vectors(found, [])[0].shape == (0, 2)


def test_image_ids_name_the_content() -> None:
    assert vector_id(UNIT[0]) == vector_id(UNIT[0].astype(np.float64)) == vector_id(UNIT[:, :][0])
    assert len({vector_id(vector) for vector in UNIT}) == 4 and len(vector_id(UNIT[0])) == 32


def test_the_fingerprint_is_of_source_and_dimension() -> None:
    assert fingerprint("clip", 512) == fingerprint("clip", 512)
    assert len({fingerprint("clip", 512), fingerprint("clip", 768), fingerprint("", 512)}) == 3


@given(raw=hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=st.floats(width=32)))
@settings(max_examples=100)
def test_every_row_has_unit_norm_or_a_reason(tmp_path_factory: pytest.TempPathFactory, raw: np.ndarray) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "a.npy").write_bytes(npy(raw))
    vectors, faults = read_vectors(corpus(f"{folder}/a.npy"), range(len(raw)))
    for row, vector, fault in zip(raw, vectors, faults, strict=True):
        sound = bool(np.isfinite(row).all() and row.any())
        assert (fault is None) == sound
        assert abs(np.linalg.norm(vector.astype(np.float64)) - sound) < 1e-6


@needs_shared_data
@pytest.mark.parametrize("name", ["clip_b16_memories/cub200", "grocery/mobilenet_v1_train"])
def test_real_embeddings(name: str) -> None:
    file = SHARED_DATA / f"{name}.npz"
    vectors = vectors_of(corpus(str(file)))
    with np.load(file) as arrays:
        raw, labels = arrays["embeddings"].astype(np.float32), arrays["class_id"]
    np.testing.assert_allclose(vectors, raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=1e-6)
    assert list_images(corpus(str(file)))["label"].to_pylist() == [str(label) for label in labels]


# Text vectors of the classes


def test_class_embeddings(root: str) -> None:
    write(root, {"c.npy": npy(VECTORS.astype(np.float16))})
    vectors = class_embeddings(f"{root}/c.npy", 4)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, UNIT, atol=1e-7)


@needs_shared_data
def test_real_class_embeddings() -> None:
    vectors = class_embeddings(str(SHARED_DATA / "lvis/clip_text_embeddings.npy"), 1203)
    assert vectors.shape == (1203, 512)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.npy", "nowhere.npy does not exist"),
        ("c.npz", "is not an .npy"),
        ("flat.npy", r"an array of shape \(4,\); embeddings are \(rows, dimensions\)"),
        ("text.npy", "holds <U1, not numbers"),
        ("short.npy", "has 3 rows for 4 classes"),
        ("zero.npy", "row 2: the vector is zero: it has no direction; 1 such rows in all"),
        ("broken.npy", "cannot read .*broken.npy"),
    ],
)
def test_class_embedding_mistakes(tmp_path: Path, name: str, message: str) -> None:
    files = {
        "c.npz": npz(embeddings=VECTORS),
        "flat.npy": npy(np.ones(4)),
        "text.npy": npy(np.full((4, 2), "x")),
        "short.npy": npy(VECTORS[:3]),
        "zero.npy": npy(VECTORS * np.array([[1], [1], [0], [1]])),
        "broken.npy": b"\x93NUMPY",
    }
    write(str(tmp_path), files)
    with pytest.raises(UserError, match=message) as caught:
        class_embeddings(f"{tmp_path}/{name}", 4)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("memory.class_embeddings: ")


# The user's mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"uri": "nowhere.npz"}, "nowhere.npz does not exist"),
        ({"uri": "broken.npz"}, "cannot read broken.npz: not an .npz"),
        ({"uri": "broken.npy"}, "cannot read broken.npy"),
        ({"uri": "pickled.npz"}, "holds object, not numbers"),
        ({"uri": "flat.npz"}, r"shape \(4,\); embeddings are \(rows, dimensions\)"),
        ({"uri": "empty.npz"}, "no embeddings in empty.npz"),
        ({"uri": "nulls.parquet"}, "no embeddings in nulls.parquet"),
        ({"uri": "unnamed.npz"}, r"no array 'embeddings'; set corpus.vector_column to one of \['x'\]"),
        ({"uri": "good.npz", "label_column": "species"}, r"no array 'species'; set corpus.label_column: \['embeddings'\]"),
        ({"uri": "labels.npz"}, r"array 'label' has shape \(3,\); one value a vector makes \(4,\)"),
        ({"uri": "objects.npz"}, "cannot read objects.npz"),
        ({"uri": "twice.npz"}, "'a' names two rows of twice.npz"),
        ({"uri": "good.npy", "ids": "nowhere.csv"}, "nowhere.csv does not exist"),
        ({"uri": "good.npy", "ids": "three.csv"}, "three.csv names 3 rows, good.npy has 4"),
        ({"uri": "good.npy", "ids": "other.csv"}, "no column 'uri'; set corpus.uri_column"),
        ({"uri": "good.npy", "ids": "gap.csv"}, "has rows without an id"),
        ({"uri": "[gw]*.npz"}, "good.npz has 2 dimensions, .*wide.npz has 3"),
        ({"uri": "good.csv", "format": "embeddings"}, "good.csv is no .npy, .npz or .parquet"),
        (
            {"uri": "images.parquet", "format": "embeddings"},
            r"no column 'vector'; set corpus.vector_column to one of \['uri'\]",
        ),
        ({"uri": "texts.parquet", "format": "embeddings"}, "holds string, not lists of numbers"),
    ],
)
def test_a_mistake_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], message: str
) -> None:
    files = {
        "broken.npz": b"PK not really",
        "broken.npy": b"\x93NUMPY",
        "pickled.npz": npz(embeddings=np.array([[None, {}]], object)),
        "flat.npz": npz(embeddings=np.ones(4)),
        "empty.npz": npz(embeddings=np.ones((0, 4))),
        "nulls.parquet": parquet(vector=pa.array([None, None], pa.list_(pa.float32()))),
        "unnamed.npz": npz(x=VECTORS),
        "good.npz": npz(embeddings=VECTORS),
        "wide.npz": npz(embeddings=np.ones((2, 3))),
        "labels.npz": npz(embeddings=VECTORS, label=np.arange(3)),
        "objects.npz": npz(embeddings=VECTORS, label=np.array(["a", None, 3, ()], object)),
        "twice.npz": npz(embeddings=VECTORS, ids=np.array(list("abca"))),
        "good.npy": npy(VECTORS),
        "three.csv": b"uri\na\nb\nc\n",
        "other.csv": b"name\na\nb\nc\nd\n",
        "gap.csv": b"uri,x\na,1\n,1\nc,1\nd,1\n",
        "good.csv": b"uri\na\n",
        "images.parquet": parquet(uri=["a"]),
        "texts.parquet": parquet(vector=["a"]),
    }
    write(str(tmp_path), files)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        list_images(corpus(**settings))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("corpus: ")


@pytest.mark.parametrize("uri", ["photos", "m.csv"])
def test_a_corpus_without_embeddings_has_no_dimension(tmp_path: Path, uri: str) -> None:
    write(str(tmp_path), {"photos/1.png": b"x", "m.csv": b"uri\n1.png\n"})
    with pytest.raises(UserError, match=r"no \.npy or|is no \.npy"):
        dim_of(corpus(f"{tmp_path}/{uri}"))
