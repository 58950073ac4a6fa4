"""What a store holds: collections grouped into memories, their snapshots, and the digest of a memory's state.

A memory NAME is several collections, NAME_images, NAME_texts and NAME_head_MODE; a snapshot N of it is the same collections as
NAME_vN_images and so on, copied. A copy costs its full size again, and in return a snapshot is a memory like any other: it is
searched by the same code, and nothing that happens to the live memory reaches it. The parts of a snapshot are listed in each of
them, so that one that was cut short is told from a whole one.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from rar.memory import layout
from rar.memory.collection import Collection
from rar.memory.store import REACH_SECONDS, connect, patiently
from rar.schema import UserError

PART = re.compile(r"(?P<memory>.+)_(?P<part>images|texts|head_[a-z]+)")
VERSION = re.compile(r"(?P<name>.+)_v(?P<version>[1-9][0-9]*)")


@dataclass(frozen=True)
class Stored:
    """A memory, live (version None) or a snapshot. counts: entries of each part. classes: of the largest part.

    digest: 16 hex digits of the state it was sealed in, over the entries of every part but not the numbers in them (ids are
    content hashes); "": it was changed since or is not whole, and should be built, or copied, again.
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


def collection_name(memory: str, part: str, version: int | None = None) -> str:
    """The collection of a part (images, texts, head_MODE). Raises UserError for a name that reads like a snapshot's."""
    if copied := VERSION.fullmatch(memory):
        raise UserError(f"memory.name {memory!r} reads like a snapshot's; use {copied['name']!r}, and memory.version")
    name = f"{memory}_{part}" if version is None else f"{memory}_v{version}_{part}"
    if not PART.fullmatch(name):
        raise ValueError(f"a memory has no part {part!r}")
    return name


def memories(address: str, token: str | None = None) -> list[Stored]:
    """Every memory at an address, sorted by name, the live one before its snapshots. Other collections are left out."""
    return [_describe(name, version, parts) for (name, version), parts in _grouped(address, token).items()]


def find(address: str, name: str, version: int | None = None, token: str | None = None) -> Stored:
    """One memory. Raises UserError that says what there is instead."""
    versions = {number: parts for (memory, number), parts in _grouped(address, token).items() if memory == name}
    if version in versions:
        return _describe(name, version, versions[version])
    if not versions:
        raise UserError(f"there is no memory {name!r} at this memory.uri; build it with `rar memory CONFIG`")
    there = ", ".join("the live one" if number is None else f"version {number}" for number in versions)
    raise UserError(f"memory {name!r} has no {'live one' if version is None else f'version {version}'}; there is {there}")


def digest(address: str, name: str, version: int | None = None, token: str | None = None) -> str:
    """The digest of a memory's state, from what `seal` kept: it costs a count of each part.

    Raises UserError where there is no such memory, or it was changed and not sealed.
    """
    if found := find(address, name, version, token).digest:
        return found
    again = "build it again with `rar memory CONFIG`" if version is None else "drop it and take another snapshot"
    raise UserError(f"memory {name!r} was left half written; {again}")


def snapshot(address: str, name: str, token: str | None = None) -> int:
    """Copy the live memory to the next version, and return its number. Copies that were cut short are thrown away first."""
    digest(address, name, None, token)
    parts = sorted(find(address, name, None, token).counts)
    taken = [0]
    for other in memories(address, token):
        if other.name == name and other.version is not None:
            taken.append(other.version)
            if not other.digest:
                drop_memory(address, name, taken.pop(), token)
    version = max(taken) + 1
    for part in parts:
        source = Collection(address, collection_name(name, part), token)
        source.copy(collection_name(name, part, version), {"parts": parts, "version": version})
    return version


def drop_memory(address: str, name: str, version: int | None = None, token: str | None = None) -> None:
    """Drop the live memory or one snapshot; the others stay. Raises UserError where there is no such memory."""
    for part in find(address, name, version, token).counts:
        Collection(address, collection_name(name, part, version), token).drop()


def _grouped(address: str, token: str | None) -> dict[tuple[str, int | None], dict[str, Collection]]:
    """(name, version) -> {part: its collection}."""
    client = patiently(lambda: connect(address, token), address, REACH_SECONDS)
    try:
        parts = [part for name in client.list_collections() if (part := PART.fullmatch(name)) and layout.is_ours(client, name)]
    finally:
        client.close()
    grouped: dict[tuple[str, int], dict[str, Collection]] = {}
    for part in parts:
        snapshot = VERSION.fullmatch(part["memory"])
        key = (snapshot["name"], int(snapshot["version"])) if snapshot else (part["memory"], 0)
        grouped.setdefault(key, {})[part["part"]] = Collection(address, part.string, token)
    return {(name, version or None): grouped[name, version] for name, version in sorted(grouped)}


def _describe(name: str, version: int | None, parts: dict[str, Collection]) -> Stored:
    metas: dict[str, dict[str, Any]] = {part: one.meta() for part, one in parts.items()}
    states = {part: one.state() for part, one in parts.items()}
    first = metas["images" if "images" in metas else "texts" if "texts" in metas else min(metas)]
    whole = all(states.values()) and set(first.get("parts", parts)) == set(parts)
    sums = "".join(f"{part} {state['digest']}\n" for part, state in sorted(states.items())) if whole else ""
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
        digest=hashlib.sha256(sums.encode()).hexdigest()[:16] if whole else "",
    )
