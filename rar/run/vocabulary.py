"""A built memory as a run needs it: its parts by name, whose encoder made it, and what a retrieval mode looks up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter

from rar import config
from rar.config import Config
from rar.corpus import listing, vectors
from rar.engine import stages
from rar.engine.session import Session
from rar.memory import catalog
from rar.memory.collection import Collection, Entries
from rar.retriever import modes
from rar.schema import UserError

PARTS = ("images", "texts")


@dataclass(frozen=True)
class Vocabulary:
    """A built memory as the pipeline needs it. names: class id -> name. digest: the memory's state."""

    names: dict[int, str]
    facts: stages.EncoderFacts
    retrieve: stages.Retrieve
    digest: str


def open_memory(session: Session, settings: Config) -> Vocabulary:
    """What a retrieval mode searches. Raises UserError where the memory is missing, lacks it, or is of another encoder."""
    facts = facts_of(session, settings, settings.corpus)
    memory, mode = settings.memory, settings.retriever.mode
    address = session.memory_address
    digest = catalog.digest(address, memory.name, memory.version, memory.token)
    head, images = (collection(settings, address, kind) for kind in (f"head_{'fused' if mode == 'all' else mode}", "images"))
    if not head.exists():
        needs = {"text": "class names", "tip": "class names and support images"}.get(mode, "support images")
        raise UserError(f"memory {memory.name!r} has nothing for retriever.mode {mode}, which needs {needs}; see `rar memory`")
    check_maker(settings, head, facts)
    fitted = modes.Head.from_entries(head.fetch(), head.meta()["head"])
    names = dict(zip(fitted.class_ids.tolist(), fitted.class_names, strict=True))
    return Vocabulary(names, facts, stages.Retrieve(settings.retriever, fitted, head, images), digest)


def collection(settings: Config, address: str, kind: str) -> Collection:
    """A part of the memory: images, texts or head_MODE; of the snapshot that the config names, if it names one."""
    memory = settings.memory
    return Collection(address, catalog.collection_name(memory.name, kind, memory.version), memory.token)


def entries_of(one: Collection) -> Entries | None:
    """All entries of a part; None where it does not exist or is empty."""
    return one.fetch() if one.exists() and one.count() else None


def class_names(settings: Config, address: str) -> list[str]:
    """The classes of a memory, by id. Raises UserError where there is no such memory."""
    memory = settings.memory
    counts = catalog.find(address, memory.name, memory.version, memory.token).counts
    held = [collection(settings, address, kind).fetch() for kind in PARTS if kind in counts]
    return list(class_ids([], held))


def class_ids(names: Sequence[str], held: Iterable[Entries | None]) -> dict[str, int]:
    """class name -> id: those of the memory as they are, the others counted on from there."""
    pairs = (zip(one.class_names, one.class_ids.tolist(), strict=True) for one in held if one is not None)
    known = dict(sorted(chain.from_iterable(pairs), key=itemgetter(1)))
    free = max(known.values(), default=-1) + 1
    new = [name for name in names if name not in known]
    return known | {name: free + position for position, name in enumerate(new)}


def check_maker(settings: Config, one: Collection, facts: stages.EncoderFacts) -> None:
    """Raises UserError where a part of the memory holds the vectors of another encoder."""
    if not one.exists():
        return
    made_by = one.meta()["fingerprint"]
    if made_by != facts.fingerprint:
        raise UserError(
            f"memory {settings.memory.name!r} was made by another encoder, templates, descriptions, views or precision "
            f"({made_by}, not {facts.fingerprint}); rebuild it with `rar memory CONFIG --fresh`, or use what it was made with"
        )


def check_kind(settings: Config, images: config.Corpus | None) -> None:
    """Raises UserError for vectors where an encoder is to make them, and for pictures where none is."""
    if images is None:
        return
    brought = images.dataset is None and listing.format_of(images) == "embeddings"
    precomputed, where = settings.encoder.model == "precomputed", images.uri or images.dataset
    if brought and not precomputed:
        raise UserError(f"{where} holds embeddings, not pictures: set encoder.model: precomputed")
    if precomputed and not brought:
        raise UserError(f"encoder.model is precomputed, but {where} holds no embeddings; give an .npz, .npy or parquet of them")


def facts_of(session: Session, settings: Config, images: config.Corpus | None) -> stages.EncoderFacts:
    """What makes the vectors: the session's encoder, or, for vectors that the user brings, their name and dimension."""
    if settings.encoder.model != "precomputed":
        return session.encoder(settings.encoder).facts
    brought = images or settings.memory.support
    if brought is None:
        raise UserError("encoder.model precomputed needs memory.support: the embeddings to remember")
    dim = vectors.dim_of(brought)
    return stages.EncoderFacts(0, dim, vectors.fingerprint(settings.encoder.source, dim), "", "", embeds_texts=False)
