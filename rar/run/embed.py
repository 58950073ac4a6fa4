"""Embeddings for other people's programs: a corpus as parquet of id, uri, label and vector, shard by shard, on any file system.

`encoder.model: precomputed` reads the folder back, so that building and classifying need no second pass over the pictures.
A shard is one file, written whole; a shard whose file is there is not embedded again, so a run that was killed goes on. What
the files are of (the encoder, the shards, the index) is noted in embed.json, and another corpus or encoder is refused. Vectors
are float16: cosines change in the fourth digit, and half the bytes are left. Rows that cannot be read or decoded are lines of
errors/part-N.jsonl, each with its reason.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pyarrow as pa

from rar import storage
from rar.config import Config, Retriever
from rar.corpus import listing
from rar.engine.session import Session
from rar.engine.sinks import EmbeddingSink, embedding_file
from rar.run import steps
from rar.run.vocabulary import facts_of
from rar.run.work import Work
from rar.schema import ERRORS, UserError

NOTE = "embed.json"


def embed(session: Session, settings: Config, out: str, *, fresh: bool) -> dict[str, int]:
    """Write what the folder lacks; returns counts {input, ok, failed}. Raises UserError for a folder of something else."""
    if settings.corpus is None:
        raise UserError("config: `corpus.uri` is missing; name the images to embed")
    if settings.encoder.model == "precomputed":
        raise UserError("encoder.model precomputed has nothing to embed; name an encoder")
    index = listing.list_images(settings.corpus)
    work, facts = Work(index, False, ERRORS.empty_table()), facts_of(session, settings, None)
    bounds = work.bounds(settings.run.shard_size)
    note = {"encoder": settings.encoder.model, "fingerprint": facts.fingerprint, "dim": facts.dim, "index": _digest(index)}
    fs, path = storage.locate(out)
    _claim(fs, path, out, note | {"shard_size": settings.run.shard_size}, fresh)
    pending = [number for number in range(len(bounds) - 1) if not fs.exists(embedding_file(path, number))]
    if pending:
        settings = settings.model_copy(update={"retriever": Retriever()})  # whatever is looked up later
        rows = steps.embedded(session, settings, work, facts, pending)
        rows.write_datasink(EmbeddingSink(storage.full_name(fs, path)))
    failed = sum(len(fs.cat_file(file).splitlines()) for file in fs.glob(f"{path}/errors/part-*.jsonl"))
    return {"input": index.num_rows, "ok": index.num_rows - failed, "failed": failed}


def _digest(index: pa.Table) -> str:
    digest = hashlib.sha256()
    for name in ("uri", "label"):
        digest.update("\n".join(map(str, index[name].to_pylist())).encode())
    return digest.hexdigest()[:16]


def _claim(fs: Any, path: str, out: str, note: dict[str, Any], fresh: bool) -> None:
    """Note what the folder is of. Raises UserError where it holds something else."""
    if fresh and fs.exists(f"{path}/{NOTE}"):
        fs.rm(path, recursive=True)
    if fs.exists(f"{path}/{NOTE}"):
        if json.loads(fs.cat_file(f"{path}/{NOTE}")) != note:
            raise UserError(f"{out} holds embeddings of another corpus, encoder or shard size; use --fresh, or another --out")
        return
    if fs.exists(path) and fs.ls(path):
        raise UserError(f"{out} is not empty and holds no {NOTE}; choose another --out")
    fs.makedirs(f"{path}/errors", exist_ok=True)
    fs.pipe_file(f"{path}/{NOTE}", json.dumps(note, indent=1).encode())
