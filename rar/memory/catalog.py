"""What a store holds: collections grouped into memories, their snapshots, and the digest of a memory's state.

A memory NAME is several collections, NAME_images, NAME_texts and NAME_head_MODE. A build that changes anything writes them anew
as the next generation, NAME_gN_images and so on, and seals the head last, whose name is noted in the others. The live memory is
the highest generation whose entries and head are all sealed, so it changes in the one write that seals that head, and a build
that is cut short changes nothing: its generation is passed over until a build completes it or throws it away. This works on
Milvus Lite and on servers alike, where an alias names one collection and a memory is several. It costs the room of a second
copy, as the generation before the live one is kept for the runs that read it, until the next build.

A snapshot N is the same collections as NAME_vN_images and so on, copied. A copy costs its full size again, and in return a
snapshot is a memory like any other: it is searched by the same code, and nothing that happens to the live memory reaches it.

The digest is of the entries, images and texts. Heads follow from them: they note the digest of the entries they were fitted on.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from rar.memory import layout
from rar.memory.collection import Collection
from rar.memory.store import PATIENCE_S, connect, patiently
from rar.schema import UserError

PART = re.compile(r"(?P<memory>.+)_(?P<part>images|texts|head_[a-z]+)")
VERSION = re.compile(r"(?P<name>.+)_v(?P<version>[1-9][0-9]*)")
GENERATION = re.compile(r"(?P<name>.+)_g(?P<generation>[1-9][0-9]*)")
ENTRIES = ("images", "texts")


@dataclass(frozen=True)
class Stored:
    """A memory, live (version None) or a snapshot. counts: entries of each part. classes: of the largest part.

    digest: 16 hex digits of the state it was sealed in, over its image and text entries but not the numbers in them (ids are
    content hashes); "": it was changed since or is not whole, and should be built, or copied, again. generation: of the live
    memory, see the module. ef: of the images, where it was tuned.
    """

    name: str
    version: int | None
    counts: dict[str, int]
    classes: int
    dim: int
    index: str
    encoder: str
    fingerprint: str
    created: str
    digest: str
    generation: int = 0
    ef: int | None = None

    @property
    def state(self) -> str:
        """What a run notes of the memory that it reads: the digest and, where `rar memory --tune-index` chose one, the ef."""
        return self.digest if self.ef is None else f"{self.digest} ef {self.ef}"


def collection_name(memory: str, part: str, version: int | None = None, generation: int = 0) -> str:
    """The collection of a part (images, texts, head_MODE). Raises UserError for a name that reads like a snapshot's."""
    if copied := VERSION.fullmatch(memory):
        raise UserError(f"memory.name {memory!r} reads like a snapshot's; use {copied['name']!r}, and memory.version")
    if built := GENERATION.fullmatch(memory):
        raise UserError(f"memory.name {memory!r} reads like a generation's; use {built['name']!r}")
    number = f"_v{version}" if version is not None else f"_g{generation}" if generation else ""
    name = f"{memory}{number}_{part}"
    if not PART.fullmatch(name):
        raise ValueError(f"a memory has no part {part!r}")
    return name


def memories(address: str, token: str | None = None) -> list[Stored]:
    """Every memory at an address, sorted by name, the live one before its snapshots. Other collections are left out."""
    grouped = _grouped(address, token)
    found = []
    for name, version in sorted({(name, version or 0) for name, version, _ in grouped}):
        found.append(_chosen(grouped, name, version or None))
    return found


def find(address: str, name: str, version: int | None = None, token: str | None = None) -> Stored:
    """One memory. Raises UserError that says what there is instead."""
    grouped = _grouped(address, token)
    versions = sorted({number or 0 for memory, number, _ in grouped if memory == name})
    if (version or 0) in versions:
        return _chosen(grouped, name, version)
    if not versions:
        raise UserError(f"there is no memory {name!r} at this memory.uri; build it with `rar memory CONFIG`")
    there = ", ".join(f"version {number}" if number else "the live one" for number in versions)
    raise UserError(f"memory {name!r} has no {'live one' if version is None else f'version {version}'}; there is {there}")


def generations(address: str, name: str, token: str | None = None) -> list[Stored]:
    """Every generation of the live memory, whole or not, the oldest first."""
    grouped = _grouped(address, token)
    numbers = sorted(generation for memory, version, generation in grouped if memory == name and version is None)
    return [_describe(name, None, number, grouped[name, None, number]) for number in numbers]


def _chosen(grouped: Grouped, name: str, version: int | None) -> Stored:
    """The snapshot, or of the live memory the highest whole generation; where none is whole, the highest."""
    numbers = sorted((key[2] for key in grouped if key[:2] == (name, version)), reverse=True)
    found = [_describe(name, version, number, grouped[name, version, number]) for number in numbers]
    return next((one for one in found if one.digest), found[0])


def digest(address: str, name: str, version: int | None = None, token: str | None = None) -> str:
    """`Stored.state` of a memory, from what `seal` kept: it costs a count of each part.

    Raises UserError where there is no such memory, or it was changed and not sealed.
    """
    if (found := find(address, name, version, token)).digest:
        return found.state
    again = "build it again with `rar memory CONFIG`" if version is None else "drop it and take another snapshot"
    raise UserError(f"memory {name!r} was left half written; {again}")


def snapshot(address: str, name: str, token: str | None = None) -> int:
    """Copy the live memory to the next version, and return its number. Copies that were cut short are thrown away first."""
    digest(address, name, None, token)
    live = find(address, name, None, token)
    parts = sorted(live.counts)
    taken = [0]
    for other in memories(address, token):
        if other.name == name and other.version is not None:
            taken.append(other.version)
            if not other.digest:
                drop_memory(address, name, taken.pop(), token)
    version = max(taken) + 1
    for part in parts:
        source = Collection(address, collection_name(name, part, None, live.generation), token)
        source.copy(collection_name(name, part, version), {"parts": parts, "version": version})
    return version


def drop_memory(address: str, name: str, version: int | None = None, token: str | None = None) -> None:
    """Drop the live memory or one snapshot; the others stay. Raises UserError where there is no such memory."""
    find(address, name, version, token)
    for (memory, number, _), parts in _grouped(address, token).items():
        if (memory, number) == (name, version):
            for one in parts.values():
                one.drop()


def drop_generation(address: str, name: str, generation: int, token: str | None = None) -> None:
    for one in _grouped(address, token).get((name, None, generation), {}).values():
        one.drop()


Grouped = dict[tuple[str, int | None, int], dict[str, Collection]]  # (name, version, generation) -> {part: its collection}


def _grouped(address: str, token: str | None) -> Grouped:
    client = patiently(lambda: connect(address, token), address, PATIENCE_S)
    try:
        parts = [part for name in client.list_collections() if (part := PART.fullmatch(name)) and layout.is_ours(client, name)]
    finally:
        client.close()
    grouped: Grouped = {}
    for part in parts:
        snapshot, built = VERSION.fullmatch(part["memory"]), GENERATION.fullmatch(part["memory"])
        name = (snapshot or built or {"name": part["memory"]})["name"]
        key = (name, int(snapshot["version"]) if snapshot else None, int(built["generation"]) if built else 0)
        grouped.setdefault(key, {})[part["part"]] = Collection(address, part.string, token)
    return grouped


def _describe(name: str, version: int | None, generation: int, parts: dict[str, Collection]) -> Stored:
    metas: dict[str, dict[str, Any]] = {part: one.meta() for part, one in parts.items()}
    states = {part: one.state() for part, one in parts.items()}
    first = metas["images" if "images" in metas else "texts" if "texts" in metas else min(metas)]
    needed = set(first.get("parts", parts)) | (set(ENTRIES) & set(parts))
    whole = all(states.get(part) for part in needed)
    return Stored(
        name=name,
        version=version,
        counts={part: state["count"] if state else parts[part].count() for part, state in sorted(states.items())},
        classes=max(state.get("classes", 0) for state in states.values()),
        dim=first["dim"],
        index=first["index"],
        encoder=str(first.get("encoder", "")),
        fingerprint=str(first.get("fingerprint", "")),
        created=first["created"],
        digest=_digest(states) if whole else "",
        generation=generation,
        ef=first["ef"] if first.get("ef_tuned") else None,
    )


def entries_digest(parts: dict[str, Collection]) -> str:
    """The digest of sealed image and text entries, whether or not their heads are there."""
    return _digest({part: one.state() for part, one in parts.items()})


def _digest(states: dict[str, dict[str, Any]]) -> str:
    sums = "".join(f"{part} {states[part]['digest']}\n" for part in ENTRIES if part in states)
    return hashlib.sha256(sums.encode()).hexdigest()[:16]
