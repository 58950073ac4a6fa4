"""A built memory as a run needs it: its parts by name, whose encoder made it, and what a retrieval mode looks up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import itemgetter
from typing import Any

from rar import config
from rar.config import Config
from rar.corpus import listing, vectors
from rar.encoder.names import check_name
from rar.engine import choosing, models
from rar.engine.session import Session
from rar.memory import catalog
from rar.memory.collection import Collection
from rar.retriever import modes
from rar.retriever.exact import EXACT_CLASSES
from rar.run import fitting
from rar.schema import UserError

PARTS = ("images", "texts")


@dataclass(frozen=True)
class Vocabulary:
    """A built memory as the pipeline needs it. names: class id -> name. digest: the memory's state."""

    names: dict[int, str]
    facts: models.EncoderFacts
    retrieve: choosing.Retrieve
    digest: str


def open_memory(session: Session, settings: Config) -> Vocabulary:
    """What a retrieval mode searches. Raises UserError where the memory is missing, lacks it, or is of another encoder."""
    facts = facts_of(session, settings, settings.corpus)
    memory, address = settings.memory, session.memory_address
    mode: modes.Mode = "fused" if settings.retriever.mode == "all" else settings.retriever.mode
    catalog.digest(address, memory.name, memory.version, memory.token)  # raises
    found = catalog.find(address, memory.name, memory.version, memory.token)
    parts = {kind: collection(settings, address, kind, found.generation) for kind in PARTS if kind in found.counts}
    head = collection(settings, address, f"head_{mode}", found.generation)
    check_mode(settings, bool(found.counts.get("images")), bool(found.counts.get("texts")))
    check_maker(settings, next(iter(parts.values())), facts)
    if not head.exists() or not head.state():  # another mode than the one that the memory was built for
        meta = {key: next(iter(parts.values())).meta()[key] for key in ("fingerprint", "encoder", "dim")}
        fitting.fit(settings, mode, parts, head, {**meta, "entries": found.digest})
    elif head.meta().get("entries", found.digest) != found.digest:
        raise UserError(
            f"memory {memory.name!r}: head {mode} was fitted on other entries than there are; mend it with `rar memory CONFIG`"
        )
    digest, images = found.state, collection(settings, address, "images", found.generation)
    bare = modes.StoredHead(address, head.name, digest, weights=False, token=memory.token, patience_s=head.patience_s)
    names = dict(zip(bare().class_ids.tolist(), bare().class_names, strict=True))
    check_index(settings, len(names))
    held = replace(bare, weights=mode in ("knn", "tip") or len(names) <= EXACT_CLASSES)
    return Vocabulary(names, facts, choosing.Retrieve(settings.retriever, held, head, images), digest)


def check_mode(settings: Config, images: bool, texts: bool) -> None:
    """Raises UserError where a memory with or without image and text entries has not what the retrieval mode needs."""
    mode = settings.retriever.mode
    if not modes.allows("fused" if mode == "all" else mode, images, texts):
        needs = {"text": "class names", "tip": "class names and support images"}.get(mode, "support images")
        raise UserError(
            f"memory {settings.memory.name!r} has nothing for retriever.mode {mode}, which needs {needs}; see `rar memory`"
        )


def check_index(settings: Config, n_classes: int) -> None:
    """Raises UserError for an index that nothing would search."""
    kind, mode = settings.memory.index.kind, settings.retriever.mode
    if kind not in ("auto", "FLAT") and mode not in ("knn", "tip") and n_classes <= EXACT_CLASSES:
        raise UserError(
            f"memory.index.kind {kind} is of no use to retriever.mode {mode}, which scores all {n_classes:,} classes exactly "
            "and searches nothing; leave it out, or set retriever.mode to knn or tip"
        )


def collection(settings: Config, address: str, kind: str, generation: int | None = None) -> Collection:
    """A part of the memory: images, texts or head_MODE; of the snapshot that the config names, if it names one.

    generation: of the live memory; default: the current one.
    """
    memory = settings.memory
    if generation is None:
        found = [
            one for one in catalog.memories(address, memory.token) if (one.name, one.version) == (memory.name, memory.version)
        ]
        generation = found[0].generation if found else 0
    name = catalog.collection_name(memory.name, kind, memory.version, generation)
    return Collection(address, name, memory.token, settings.run.patience_s)


def class_names(settings: Config, address: str) -> list[str]:
    """The classes of a memory, by id. Raises UserError where there is no such memory."""
    memory = settings.memory
    found = catalog.find(address, memory.name, memory.version, memory.token)
    parts = [collection(settings, address, kind, found.generation) for kind in PARTS if kind in found.counts]
    return list(class_ids([], [part.classes() for part in parts]))


def class_ids(names: Sequence[str], held: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """class name -> id: those of the memory (`held`) as they are, the others counted on from there."""
    known = dict(sorted(chain.from_iterable(one.items() for one in held), key=itemgetter(1)))
    free = max(known.values(), default=-1) + 1
    new = [name for name in names if name not in known]
    return known | {name: free + position for position, name in enumerate(new)}


def check_maker(settings: Config, one: Collection, facts: models.EncoderFacts) -> None:
    """Raises UserError where a part of the memory holds the vectors of another encoder."""
    if not one.exists():
        return
    made_by = one.meta()["fingerprint"]
    if made_by != facts.fingerprint:
        raise UserError(
            f"memory {settings.memory.name!r} was made by another encoder, templates, descriptions, views or precision "
            f"({made_by}, not {facts.fingerprint}); rebuild it with `rar memory CONFIG --fresh`, or use what it was made with"
        )


def treatment(settings: Config, facts: models.EncoderFacts) -> dict[str, Any]:
    """How boxes are cut out for the encoder, as JSON: what a memory of boxes and its queries must have in common."""
    return settings.detect.crop.sized(facts.side).model_dump(mode="json")


def odd_treatment(settings: Config, vocabulary: Vocabulary) -> list[str]:
    """A line where boxes are cut out otherwise than the memory's; [] where they are not, or it has no images."""
    images = vocabulary.retrieve.images
    if not images.exists():
        return []
    held, own = images.meta().get("crop"), treatment(settings, vocabulary.facts)
    if held is None:  # whole pictures
        if own["outside"] in ("none", "grey"):
            return []
        return [
            f"the memory's pictures are whole, and boxes are shown with {own['outside']} around them, which cost real encoders "
            "accuracy; set detect.crop.outside: none or grey, or build the memory from boxes"
        ]
    differing = [f"{key} {held.get(key)} (here {own.get(key)})" for key in {**held, **own} if held.get(key) != own.get(key)]
    if not differing:
        return []
    return [f"the memory's boxes were cut out with detect.crop {', '.join(differing)}: accuracy suffers; use the same for both"]


def check_kind(settings: Config, images: config.Corpus | None) -> None:
    """Raises UserError for an encoder that cannot be, for vectors where it is to make them, and for pictures without one."""
    check_name(settings.encoder.model)
    if images is None:
        return
    brought = images.dataset is None and listing.format_of(images) == "embeddings"
    precomputed, where = settings.encoder.model == "precomputed", images.uri or images.dataset
    if brought and not precomputed:
        raise UserError(f"{where} holds embeddings, not pictures: set encoder.model: precomputed")
    if precomputed and not brought:
        raise UserError(f"encoder.model is precomputed, but {where} holds no embeddings; give an .npz, .npy or parquet of them")


def facts_of(session: Session, settings: Config, images: config.Corpus | None) -> models.EncoderFacts:
    """What makes the vectors: the session's encoder, or, for vectors that the user brings, their name and dimension."""
    if settings.encoder.model != "precomputed":
        return session.encoder(settings.encoder).facts
    brought = images or settings.memory.support
    if brought is None:
        raise UserError("encoder.model precomputed needs memory.support: the embeddings to remember")
    dim = vectors.dim_of(brought)
    return models.EncoderFacts(0, dim, vectors.fingerprint(settings.encoder.source, dim), "", "", embeds_texts=False)
