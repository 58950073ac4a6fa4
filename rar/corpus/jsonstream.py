"""The lists of a JSON file, item by item: a file of gigabytes in the memory of a few of its items.

COCO files hold a few long lists (images, annotations) at their top, and LVIS' training file is 1.1 GB of text, which
`json.load` turns into several times as much. Items are decoded one at a time by Python's own decoder, so that numbers, escapes
and the `NaN` that people's files have mean what they mean there (ijson refuses NaN). Costs: an item that lies across two pieces
of the file is decoded twice; a string without an end is read to the end of the file before it is refused.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from rar import storage
from rar.schema import UserError

PIECE = 1 << 20  # bytes read at a time
SPACE = re.compile(r"[ \t\n\r]*")
LONGEST_WORD = 16  # what is cut short at the end of a piece (-Infinity, \uXXXX) is found wrong at most so far before it
scan = json.JSONDecoder().raw_decode


class Item(NamedTuple):
    """A value at the top of a file, or one of a list there."""

    key: str  # "" for a file that is itself a list
    number: int | None  # its place in the list; None: the value itself, which is [] for a list whose items follow
    value: Any


def items(source: Any, what: str) -> Iterator[Item]:
    """The items of a JSON file (a path on any file system), or of an object that was one: of an object or a list.

    what: whose file it is, for messages. Raises UserError where the file is missing, no JSON, neither object nor list, or has a
    key twice; Unavailable where its storage does not answer.
    """
    if not isinstance(source, str | Path):
        yield from _items_of(source, what)
        return
    with storage.explained(what, str(source)):
        try:
            with storage.open_file(str(source)) as stream:
                yield from _Source(stream).items()
        except FileNotFoundError:
            raise UserError(f"{what}: file not found: {source}") from None
        except RecursionError:
            raise UserError(f"{what}: {source} is nested too deeply for a COCO file") from None
        except ValueError as error:  # of JSON, of UTF-8, and of a number of thousands of digits
            raise UserError(f"{what}: {source} is not valid JSON: {' '.join(str(error).split())}") from None


def _items_of(data: Any, what: str) -> Iterator[Item]:
    if not isinstance(data, dict | list):
        raise UserError(f"{what}: a COCO file is an object or a list, not {data!r:.80}")
    for key, value in data.items() if isinstance(data, dict) else [("", data)]:
        yield Item(key, None, [] if isinstance(value, list) else value)
        if isinstance(value, list):
            yield from (Item(key, number, one) for number, one in enumerate(value))


class _Source:
    """The text of a file, decoded piece by piece; `at` is how far it is understood."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.text, self.at, self.ended = "", 0, False
        head = stream.read(max(PIECE, 4))  # what tells the encoding
        self.decoder = codecs.getincrementaldecoder(json.detect_encoding(head))()
        self.text = self.decoder.decode(head)

    def items(self) -> Iterator[Item]:
        if self.peek() == "[":
            yield Item("", None, [])
            yield from self.list_of("")
        elif self.peek() == "{":
            yield from self.object()
        else:
            raise ValueError("it is neither an object nor a list")
        if self.peek():
            raise ValueError(f"something follows its end: {self.text[self.at : self.at + 20]!r}")

    def object(self) -> Iterator[Item]:
        self.take("{")
        seen: set[str] = set()
        while self.peek() != "}":
            if seen:
                self.take(",")
            key = self.value() if self.peek() == '"' else self.fail("a name in quotes")
            if key in seen:
                raise ValueError(f"the key {key!r} stands twice")
            seen.add(key)
            self.take(":")
            if self.peek() == "[":
                yield Item(key, None, [])
                yield from self.list_of(key)
            else:
                yield Item(key, None, self.value())
        self.take("}")

    def list_of(self, key: str) -> Iterator[Item]:
        self.take("[")
        number = 0
        while self.peek() != "]":
            if number:
                self.take(",")
            yield Item(key, number, self.value())
            number += 1
        self.take("]")

    def take(self, mark: str) -> None:
        if self.peek() != mark:
            self.fail(repr(mark))
        self.at += 1

    def fail(self, wanted: str) -> Any:
        raise ValueError(f"{wanted} is missing before {self.text[self.at : self.at + 20]!r}")

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]  # it matches nothing, too
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = scan(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self.text) - LONGEST_WORD or error.msg.startswith("Unterminated string")
                if not cut or not self.more():
                    raise
                continue
            if end + 2 < len(self.text) or not self.more():  # 12 at the end, or 12e+, may go on in the next piece
                self.at = end
                return value

    def more(self) -> bool:
        """Read on; False at the end. Pieces grow with what is not understood yet, so that a long item is tried a few times."""
        if self.ended:
            return False
        data = self.stream.read(max(PIECE, len(self.text) - self.at))
        self.ended = not data
        self.text, self.at = self.text[self.at :] + self.decoder.decode(data, self.ended), 0
        return True
