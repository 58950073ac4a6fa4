"""Embeddings for other people's programs: a corpus as parquet of id, uri, label and vector, shard by shard, on any file system.

`encoder.model: precomputed` reads the folder back, so that building and classifying need no second pass over the pictures.
A shard is one file, written whole; a shard whose file is there is not embedded again, so a run that was killed goes on. What
the files are of (the encoder, the shards, the index) is noted in embed.json, and another corpus or encoder is refused. Vectors
are float16: cosines change in the fourth digit, and half the bytes are left. Rows that cannot be read or decoded are lines of
errors/part-N.jsonl, each with its reason.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rar import storage
from rar.columns import digest
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
    note = {
        "encoder": settings.encoder.model,
        "fingerprint": facts.fingerprint,
        "dim": facts.dim,
        "index": digest(index, "uri", "label"),
    }
    folder = storage.place(out)
    _claim(folder, note | {"shard_size": settings.run.shard_size}, fresh)
    pending = [number for number in range(len(bounds) - 1) if not (folder / embedding_file(number)).exists()]
    if pending:
        settings = settings.model_copy(update={"retriever": Retriever()})  # whatever is looked up later
        rows = steps.vectors(session, settings, work, facts, pending)
        rows.write_datasink(EmbeddingSink(str(folder)))
    failed = sum(len(file.read_bytes().splitlines()) for file in (folder / "errors").glob("part-*.jsonl"))
    return {"input": index.num_rows, "ok": index.num_rows - failed, "failed": failed}


def _claim(folder: Path, note: dict[str, Any], fresh: bool) -> None:
    """Note what the folder is of. Raises UserError where it holds something else."""
    known = folder / NOTE
    if fresh and known.exists():
        storage.remove(folder)
    if known.exists():
        if json.loads(known.read_text()) != note:
            raise UserError(
                f"{folder} holds embeddings of another corpus, encoder or shard size; use --fresh, or another --out"
            )
        return
    if folder.exists() and any(entry.name != storage.DRIVER for entry in folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no {NOTE}; choose another --out")
    (folder / "errors").mkdir(parents=True, exist_ok=True)
    storage.write(known, json.dumps(note, indent=1).encode())
