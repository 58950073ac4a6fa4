"""The words of the system as types: records, Arrow schemas, statuses, exit codes and the two errors a user can meet.

Everything else passes these around; nothing here imports anything heavier than pyarrow. Rows travel through the pipeline as
`pyarrow.Table`s: INDEX columns come in, each stage adds columns, and the writer splits the result into PREDICTIONS and ERRORS.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

import pyarrow as pa

SCHEMA_VERSION = 2  # 1: predictions without row and place


class Exit(IntEnum):
    """Exit codes of every command (design 4.1)."""

    DONE = 0
    CRASH = 1
    USER_ERROR = 2
    TOO_MANY_FAILED = 3


class UserError(Exception):
    """A mistake only the user can mend. The message is one line that says what to do. Exit code 2."""


class Unavailable(Exception):
    """A dependency (Milvus, an endpoint) that stayed away after patient retries. Names its address. Exit code 1."""


class RowError(Exception):
    """A fault of one row. It becomes a row of `errors/` with this text as its reason; the run goes on."""


class RankStatus(StrEnum):
    """How a row's ranking came about."""

    RANKED = "ranked"  # the ranker ordered every candidate
    REPAIRED = "repaired"  # the ranker's answer was incomplete or inexact and was completed in retrieval order
    FALLBACK = "fallback"  # the ranker gave nothing usable; retrieval order kept
    SKIPPED = "skipped"  # the ranker was not asked (routed past, or no ranker configured)


@dataclass(frozen=True)
class Candidate:
    """A class proposed to the ranker. `score` is the retriever's: higher is better, comparable within one row."""

    class_id: int
    class_name: str
    score: float


@dataclass(frozen=True)
class Ranking:
    """The ranker's answer for one image.

    order: permutation of the candidates' positions, best first. scores: one log-probability a candidate position
    (empty where the method has none). response: the raw text of the model, or "" where it wrote none. label_mass: how much of
    the whole vocabulary's probability the candidates' labels hold; label_first: whether the likeliest token is one of them;
    averaged, and all, over rotations; None where no labels are read. seconds: of who ranks, a share of its batch's; what it
    took decides nothing, and is not compared.
    """

    order: tuple[int, ...]
    status: RankStatus
    scores: tuple[float, ...] = ()
    response: str = ""
    calls: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    label_mass: float | None = None
    label_first: bool | None = None
    seconds: float = field(default=0.0, compare=False)

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(len(self.order))):
            raise ValueError(f"not a permutation: {self.order}")


CANDIDATES = pa.list_(pa.struct([("class_id", pa.int64()), ("class_name", pa.string()), ("score", pa.float32())]))

# One row per image. `offset`/`size` are set for a member of a tar file (bytes range of `uri`'s file), else null.
# `boxes_xyxy` is set by detection only: pixels, float, one list of 4 per box; `box_scores` one proposal score per box.
INDEX = pa.schema(
    [
        ("row", pa.int64()),
        ("uri", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("label", pa.string()),
    ]
)

# `row` is the place in the index, `place` that of a box in its picture (null for a whole image): what labels join by.
PREDICTIONS = pa.schema(
    [
        ("row", pa.int64()),
        ("place", pa.int32()),
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("box_xyxy", pa.list_(pa.float32())),
        ("candidates", CANDIDATES),
        ("ranking", pa.list_(pa.int64())),
        ("rank_status", pa.string()),
        ("response", pa.string()),
        ("scores", pa.list_(pa.float32())),
        ("routed", pa.bool_()),
        ("class_id", pa.int64()),
        ("class_name", pa.string()),
        ("score", pa.float32()),
        ("label_mass", pa.float32()),
        ("label_first", pa.bool_()),
    ]
)

# `row` is null for what failed before there was an index.
ERRORS = pa.schema(
    [
        ("row", pa.int64()),
        ("place", pa.int32()),
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("stage", pa.string()),
        ("error", pa.string()),
    ]
)


def entry_id(image_id: str, fingerprint: str) -> str:
    """Names an entry of a memory by what it shows and by the encoder that saw it."""
    return f"{image_id}-{fingerprint}"


def content_id(data: bytes, box_xyxy: Sequence[float] | None = None) -> str:
    """32 hex digits naming an image by its content (and by its box for a crop): equal bytes, equal id, wherever they lie."""
    digest = hashlib.blake2b(data, digest_size=16)
    if box_xyxy is not None:
        digest.update(",".join(f"{value:.2f}" for value in box_xyxy).encode())
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
