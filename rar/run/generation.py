"""The next generation of a memory, written beside the live one: begun or resumed, filled, and made the live one.

A build writes only what the live generation lacks, and takes the rest over once it is known that anything changes: a build that
changes nothing leaves nothing behind. What a killed build has written is taken up by the next one of the same plan (the same
files, labels and classes over the same live generation) and thrown away by any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rar.config import Config
from rar.engine.entering import HELD, RESUMED
from rar.memory import catalog
from rar.memory.catalog import Stored
from rar.memory.collection import Collection
from rar.run.fitting import index_of
from rar.run.vocabulary import PARTS, collection
from rar.schema import UserError


@dataclass(frozen=True)
class Draft:
    """A generation in the making. base: the live one that it extends; None where it starts from nothing.

    meta: what is kept with each of its collections: the encoder, its parts, the plan.
    """

    settings: Config
    address: str
    number: int
    base: Stored | None
    meta: Mapping[str, Any]

    def part(self, kind: str) -> Collection:
        return collection(self.settings, self.address, kind, self.number)

    def base_part(self, kind: str) -> Collection | None:
        if self.base is None or kind not in self.base.counts:
            return None
        return collection(self.settings, self.address, kind, self.base.generation)

    def places(self, kind: str) -> dict[str, Collection]:
        """Where entries may be already, as `entering.Lacking` asks."""
        base, own = self.base_part(kind), self.part(kind)
        found = {HELD: base, RESUMED: own if own.exists() else None}
        return {stage: one for stage, one in found.items() if one is not None and one.count()}  # loaded, before workers ask

    def create(self, kind: str, dim: int, size: int, sample: np.ndarray | None = None) -> Collection:
        """The collection of a part, of about `size` entries. sample: see Collection.create; by default some of the base's."""
        one, index, base = self.part(kind), index_of(self.settings, kind, size), self.base_part(kind)
        if sample is None and base is not None and index.kind == "REDUCED" and not one.exists():
            sample = next((vectors for _, vectors in base.pages_of_vectors()), None)
        one.create(dim, index, self.meta, size, sample)
        return one

    def take_over(self, kind: str, without: frozenset[int] = frozenset()) -> None:
        """Copy what the base holds of a part, but for the classes `without`."""
        base = self.base_part(kind)
        if base is not None:
            base.pour(self.create(kind, base.meta()["dim"], base.count()), without)

    def drop(self) -> None:
        catalog.drop_generation(self.address, self.settings.memory.name, self.number, self.settings.memory.token)


def begin(settings: Config, address: str, meta: Mapping[str, Any], plan: str, *, fresh: bool) -> Draft:
    """Take up the draft of an equal plan, or begin one. Generations before the live one and other drafts are thrown away."""
    memory = settings.memory
    found = catalog.generations(address, memory.name, memory.token)
    live = next((one for one in reversed(found) if one.digest), None)
    number = live.generation + 1 if live is not None else 0
    base = None if fresh else live
    mode = "fused" if settings.retriever.mode == "all" else settings.retriever.mode
    meta = {**meta, "parts": [f"head_{mode}"], "plan": f"{plan} over {base.digest if base else 'nothing'}"}
    draft = Draft(settings, address, number, base, meta)
    for one in found:
        if one is live:
            continue
        plans = {draft.part(kind).meta().get("plan") for kind in one.counts if kind in PARTS and one.generation == number}
        if plans != {meta["plan"]}:
            catalog.drop_generation(address, memory.name, one.generation, memory.token)
    if base is not None and base.fingerprint != meta["fingerprint"]:
        raise UserError(
            f"memory {memory.name!r} was made by another encoder, templates, descriptions, views or precision "
            f"({base.fingerprint}, not {meta['fingerprint']}); rebuild it with `rar memory CONFIG --fresh`, or use what it was "
            "made with"
        )
    images = draft.base_part("images")
    if images is not None and memory.support is None:
        return replace(draft, meta={**meta, "crop": images.meta().get("crop")})
    if images is not None and images.meta().get("crop") != meta["crop"]:
        held = "whole pictures" if images.meta().get("crop") is None else "boxes cut out by another detect.crop"
        raise UserError(
            f"memory {memory.name!r} holds {held}, which do not mix with what memory.support is now; rebuild it with "
            "`rar memory CONFIG --fresh`, or give it another memory.name"
        )
    return draft


def same_index(settings: Config, base: Stored | None) -> bool:
    """Whether the live images have the index that is configured now; `auto` is content with any."""
    kind = settings.memory.index.kind
    return base is None or "images" not in base.counts or kind in ("auto", base.index)
