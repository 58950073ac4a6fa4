"""`rar embed`'s folder: written shard by shard, taken up, refused, and read back as `encoder.model: precomputed`.

With real Ray and the miniature encoder. Not covered: object stores, which fsspec stands for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rar import config
from rar.corpus import listing, vectors
from rar.engine.session import Session
from rar.run.embed import embed
from rar.schema import UserError


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for number, label in enumerate(["ant", "ant", "bee", "bee", "bee"]):
        (root / label).mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / label / f"{number}.png")
    (root / "bee" / "broken.png").write_bytes(b"no picture")
    return root


def settings(pictures: Path, **more: Any) -> config.Config:
    return config.validated(config.Config, {"corpus": {"uri": str(pictures)}, "run": {"shard_size": 2}, **more})


def test_a_corpus_becomes_parquet_and_comes_back_as_vectors(ray_session: Session, pictures: Path, tmp_path: Path) -> None:
    given, out = settings(pictures), tmp_path / "out"
    assert embed(ray_session, given, str(out), fresh=False) == {"input": 6, "ok": 5, "failed": 1}
    (line,) = "".join(file.read_text() for file in out.glob("errors/*.jsonl")).splitlines()
    assert json.loads(line)["uri"].endswith("broken.png") and json.loads(line)["stage"] == "decode"
    files = sorted(out.glob("part-*.parquet"))
    assert len(files) == 3 and pq.read_schema(files[0]).names == ["id", "uri", "label", "vector"]
    brought = config.Corpus(uri=str(out))
    index = listing.list_images(brought)
    found, faults = vectors.read_vectors(brought, index["row"].to_pylist())
    assert index["label"].to_pylist() == ["ant", "ant", "bee", "bee", "bee"] and not any(faults)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    from rar.corpus.decode import decode, fit_square
    from rar.encoder.towers import ClipEncoder

    encoder = ClipEncoder(config.Encoder())
    image = decode(Path(index["uri"][3].as_py()).read_bytes())
    square = fit_square(image, encoder.side, encoder.resize_mode, encoder.interpolation)
    np.testing.assert_allclose(found[3], encoder.embed_images(square[None])[0], atol=2e-3)


@pytest.mark.long
def test_a_folder_is_taken_up_and_no_other_is(ray_session: Session, pictures: Path, tmp_path: Path) -> None:
    given, out = settings(pictures), tmp_path / "out"
    embed(ray_session, given, str(out), fresh=False)
    gone, kept = out / "part-000001.parquet", out / "part-000000.parquet"
    gone.unlink()
    before = kept.stat().st_mtime_ns
    assert embed(ray_session, given, str(out), fresh=False)["ok"] == 5
    assert gone.exists() and kept.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="another corpus, encoder or shard size; use --fresh"):
        embed(ray_session, settings(pictures, encoder={"precision": "bf16"}), str(out), fresh=False)
    with pytest.raises(UserError, match=r"not empty and holds no embed\.json"):
        embed(ray_session, given, str(pictures), fresh=False)
