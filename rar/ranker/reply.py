"""How an MLLM's free text becomes a ranking. Parsing is pure and total: no state, nothing raised, always a permutation.

A reply is read from what it states to what it merely says: a box, an answer tag, "Answer: ...", then the whole (`answer`).
Each part is tried as JSON, as names with numbers (scores or ranks), as a list or prose of names, as labels, as positions.

RANKED is kept for what leaves no choice: one list, table or chain of all names, each once. Prose is never RANKED, in
whatever order it names the candidates; a reader cannot tell "cat, bird - no, dog" from a ranking. What this costs: an honest
ranking told in sentences counts as repaired.

The original code discards a reply for one unknown name and reads none with an apostrophe (paper 3.2; public code, parsing).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import Any, NamedTuple

from rar.ranker.answer import ANY_TAG, answering, stated
from rar.ranker.spelling import (
    MAX_ITEM_CHARS,
    Mention,
    Spellings,
    english_word,
    loose_mentions,
    mentions,
    partial_mentions,
)
from rar.ranker.wording import LABELS
from rar.schema import RankStatus

MAX_STRANGE = 1  # words beside a name in a list ("Boeing 737-200")
MAX_DEPTH = 20  # of JSON
MAX_LITERALS = 200  # in one reply
MAX_LITERAL_CHARS = 4000  # of one that is no JSON
MAX_PARTS = 12  # of a reply that may state the answer

LIST_MARK = re.compile(r"^[ \t]*(?:[-*+•–](?=[ \t]+\S)|#?[(\[]?(\d{1,3})[.):\]]+(?=[ \t]+\S))", re.MULTILINE)
ORDINALS = {
    word: place for place, words in enumerate(("first 一", "second 二", "third 三", "fourth 四"), 1) for word in words.split()
}
NUMBER = (
    r"(?:(?P<number>(?:-?\d+(?:[.,]\d+)?|(?<!\d)\.\d+)(?:e-?\d+)?)(?:\s*/\s*\d+)?(?P<unit>\s*%|st\b|nd\b|rd\b|th\b)?"
    rf"|(?P<ordinal>{'|'.join(ORDINALS)}))"
)
VERDICTS = {
    **dict.fromkeys(("yes", "true", "✓", "✔", "✅", "☑", "[x]", "high", "likely"), 3.0),
    **dict.fromkeys(("medium", "moderate", "maybe", "possible"), 2.0),
    **dict.fromkeys(("low", "unlikely"), 1.0),
    **dict.fromkeys(("no", "false", "✗", "✘", "❌", "☐", "☒", "[ ]", "none"), 0.0),
}
VERDICT = rf"(?P<verdict>{'|'.join(map(re.escape, VERDICTS))})(?![^\W_])|(?P<stars>[★⭐]+)"
WORDS_OF_VALUE = (
    "rank|ranked|ranking|position|place|number|no|score|confidence|probability|prob|likelihood|similarity|match|with|at|a|of|"
    "is|the|very|name|label|class|category|percent|第|名|位|概率|置信度"
)
AFTER = re.compile(rf"[^\w\n%-]*?(?:(?:{WORDS_OF_VALUE})\b[^\w\n-]*?)*(?:-\s+)?(?:{NUMBER}|{VERDICT})", re.IGNORECASE)
BEFORE = re.compile(rf"(?:{NUMBER}|{VERDICT})[^\w\n]*(?:(?:{WORDS_OF_VALUE})[^\w\n]*)*\Z", re.IGNORECASE)
RANK_KEY = re.compile(r"rank|position|place|order", re.IGNORECASE)
SCORE_KEY = re.compile(r"score|conf|prob|likel|simil|percent|weight|match|value", re.IGNORECASE)
THOUGHT_KEY = re.compile(
    r"think|thought|reason|explan|analy|rationale|descri|observ|comment|note|evidence|wrong|exclud|reject|\bnot\b", re.I
)
ANSWER_KEY = re.compile(r"answer|final|rank|best|top|result|predict|output|chosen|selected|order|sorted", re.I)
NAME_KEY = re.compile(r"label|class|categor|name|species|choice|option|candidate", re.I)  # of the answer, or of what was asked
OPENING = re.compile(r"[{\[]")
FENCE = re.compile(r"```\w*")
GLUE = re.compile(
    r"(?:\b(?:a|an|the|and|then|finally|lastly|followed|by|next|first|second|third|is|rank)\b|和|然后|と|\d|[\W_])*", re.I
)
BREAK = re.compile(r"[\n,;>|/\]\[→⇒≻≫、，；]|\band\b|\bthen\b|\bfollowed by\b", re.IGNORECASE)
DOUBT = re.compile(
    r"\b(?:or|vs|maybe|perhaps|possibly|likely|could|might|but|not|no|then again)\b|\?|或|または|또는|หรือ", re.IGNORECASE
)
RISING = re.compile(r"\bleast\b.{0,40}\bto\b.{0,20}\bmost\b|\bascending\b", re.IGNORECASE)
ORDERING = re.compile(r"\b(?:rank\w*|order\w*|list|sorted|answer|result)\b|[:：]\s*\W*\Z|\n\W*\Z", re.IGNORECASE)
STRONG = re.compile(
    r"(?:\b(?:it|this|that|which|image|picture|photo|bird|animal)(?:'s| is| are| shows?| depicts?)"
    r"(?: (?:clearly|definitely|most likely|indeed|actually))?|\bidentif\w+ (?:\w+ ){0,4}as|\bmust be|\btherefore|\bthus|"
    r"\bclearly|\bdefinitely|\bmost likely|\bbest match\w*|\bi (?:choose|pick)|最像的?是|应该是|所以是|而是)"
    r"\W{0,3}(?:an?|the)?\W{0,4}\Z",
    re.IGNORECASE,
)
HEDGE = re.compile(
    r"(?:\blooks? (?:a bit )?like|\bresembl\w+|\bsimilar to|\b(?:could|may|might) be|\bpossibly|\bperhaps|\bat first|"
    r"\b(?:confused|mistaken) (?:with|for)|\bcompar\w+ (?:to|with)|\bthan|\balthough|\bthough|\bdespite|\bwhile|\bsuch as|\bor|"
    r"看起来像|看似|像|比起)\W{0,3}(?:an?|the)?\W{0,4}\Z",
    re.IGNORECASE,
)
CONTRAST = re.compile(
    r"\b(?:but|however|actually|instead|in fact|sondern|mais|sino|pero|но|а)\b|但|而是|しかし|むしろ|แต่|بل|لكن", re.I
)
LETTER = re.compile(r"(?<![Nn]ot )(?<![A-Za-z0-9])[A-Za-z](?![A-Za-z0-9])")
LEADING_LABEL = re.compile(r"\W{0,4}([A-Z])[).:*](?=\W|$)")
ONLY_LABELS = re.compile(
    r"\W*(?:(?:the )?(?:final |correct |best )?(?:answer|option|choice|letter)(?: is)?\W+)?([a-z](?:\W+[a-z])*)\W*",
    re.IGNORECASE,
)
POSITIONS = re.compile(r"\W*(?:(?:option|number|candidate|no)\W{1,3}|第)?(\d{1,3})(?:\W+\d{1,3})*\W*[个個]?\W*", re.IGNORECASE)


class Reading(NamedTuple):
    """What a part of a reply names, best first. clean: its form leaves no doubt that this is a ranking."""

    mentions: list[Mention]
    clean: bool


def parse(response: str, names: Sequence[str]) -> tuple[tuple[int, ...], RankStatus]:
    """Read a reply as an order of `names`, best first: always a permutation of `range(len(names))`, whatever the reply.

    RANKED: one list, table or chain names every candidate exactly once, up to case, accents, quotes and punctuation. REPAIRED:
    something was completed, de-duplicated, loosely matched or read out of prose; names that the reply lacks follow in the given
    (retrieval) order, names that it rules out ("not a ...") come last. FALLBACK: nothing recognised, the given order.
    """
    vocabulary = Spellings(names)
    said, thought = answering(response)
    whole = _plain(said, vocabulary)
    for part, as_json in islice(stated(said), MAX_PARTS):
        reading = _structured(part, vocabulary) or (None if as_json else _plain(part, vocabulary))
        if reading and any(not mention.negated for mention in reading.mentions):
            if whole and whole.clean and whole.mentions[0].candidates == reading.mentions[0].candidates:
                break  # the whole is a list that begins with what is stated
            named = {candidate for mention in reading.mentions for candidate in mention.candidates}
            mentions = [*reading.mentions, *(whole.mentions if whole else [])]
            return _complete(mentions, len(names), reading.clean and len(named) == len(names))
    if whole:
        return _complete(whole.mentions, len(names), whole.clean)
    if not any(map(str.isalnum, said)):
        for part, as_json in islice(stated(thought), MAX_PARTS):
            if not as_json and (reading := _plain(part, vocabulary)):
                return _complete(reading.mentions, len(names), False)
    return tuple(range(len(names))), RankStatus.FALLBACK


def _complete(found: list[Mention], count: int, clean: bool) -> tuple[tuple[int, ...], RankStatus]:
    """A permutation of `range(count)` that begins with the mentions, and how it came about."""
    order: dict[int, None] = {}
    ruled_out: set[int] = set()
    for mention in found:
        free = next((candidate for candidate in mention.candidates if candidate not in order), None)
        if mention.negated:
            ruled_out.update(mention.candidates)
        elif free is not None:
            order[free] = None
    unnamed = [position for position in range(count) if position not in order]
    completed = (*order, *sorted(unnamed, key=lambda position: position in ruled_out))
    if not order and len(ruled_out) in (0, count):
        return tuple(range(count)), RankStatus.FALLBACK
    return completed, RankStatus.RANKED if clean and not unnamed and not ruled_out else RankStatus.REPAIRED


def _plain(text: str, vocabulary: Spellings) -> Reading | None:
    """What words say, the first way that finds something: names with numbers, in order, labels, parts of names, positions."""
    marks = {found.end(): int(found.group(1)) for found in LIST_MARK.finditer(text) if found.group(1)}
    plain = LIST_MARK.sub(lambda mark: " " * len(mark.group()), text)
    plain = ANY_TAG.sub(lambda tag: "\n" + " " * (len(tag.group()) - 1), plain) if "<" in plain else plain
    found = mentions(plain, vocabulary)
    found = sorted(found + loose_mentions(plain, found, vocabulary))
    if not found and plain != text:  # the names may be what looks like a list's mark: "-", "3."
        found = mentions(text, vocabulary)
    found = [_but_without(plain, mention, vocabulary) if mention.negated else mention for mention in found]
    if label := _leading_label(plain, found, vocabulary):
        return Reading([label, *found], False)
    if found:
        return _valued(plain, found, marks) or _in_order(plain, found)
    labels = _labels(plain, len(vocabulary.names))
    if labels:
        return Reading(labels, True)
    found = partial_mentions(plain, vocabulary) or _positions(text, vocabulary)
    return Reading(found, False) if found else None


def _but_without(text: str, mention: Mention, vocabulary: Spellings) -> Mention:
    """Where a class says the negation itself ("no helmet", for "there is no visible helmet"), the mention is of that class."""
    own = vocabulary.names[mention.candidates[0]].stems
    for negator in ("no", "not", "without", "non"):
        for spelling in vocabulary.stems.get((negator, *own), ()):
            return mention._replace(candidates=(spelling.position,), exact=False, negated=False)
    return mention


# JSON and Python literals


def _structured(text: str, vocabulary: Spellings) -> Reading | None:
    """The order that JSON (or a Python literal) in a text gives; None where it holds none that can be read."""
    if "{" not in text and "[" not in text:
        return None
    values = list(_literals(FENCE.sub("", text)))
    if any(isinstance(value, dict) for value in values):  # "[1]" beside it is a reference
        values = [value for value in values if isinstance(value, dict) or not _numbers(value)]
    elif values and _numbers(values[0]) and re.search(r"[^\W\d]", text):
        return None
    return _of_value(values[0] if len(values) == 1 else values, "", vocabulary, 0) if values else None


def _numbers(value: Any) -> bool:
    return all(type(item) in (int, float) for item in value)


def _literals(text: str) -> Iterator[Any]:
    """JSON values and Python literals of a text, dictionaries and lists alone; what cannot be read is passed over."""
    decoder, at = json.JSONDecoder(), 0
    for tries in range(MAX_LITERALS):
        found = OPENING.search(text, at)
        if not found:
            return
        try:
            value, at = decoder.raw_decode(text, found.start())
        except (ValueError, RecursionError):
            value, end = _literal(text, found.start()) if not tries else (None, 0)
            at = end or found.start() + 1
        if value:
            yield value


def _literal(text: str, start: int) -> tuple[Any, int]:
    """A Python literal from `start` to the last bracket of its kind, and where it ends; (None, 0) where there is none."""
    end = text.rfind("}" if text[start] == "{" else "]") + 1
    if not 0 < end - start <= MAX_LITERAL_CHARS:
        return None, 0
    try:
        value = ast.literal_eval(text[start:end])
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None, 0
    return (value, end) if isinstance(value, dict | list) else (None, 0)


def _of_value(value: Any, key: str, vocabulary: Spellings, depth: int) -> Reading | None:
    """A string inside JSON is read like a reply of its own, but never as JSON again."""
    if depth > MAX_DEPTH or value is None or isinstance(value, bool | int | float):
        return _plain(str(value), vocabulary) if depth and type(value) in (int, float) else None
    if isinstance(value, str):
        return _plain(value, vocabulary)
    if isinstance(value, dict):
        return _of_dict(value, key, vocabulary, depth)
    return _of_list(list(value), vocabulary, depth) if isinstance(value, list | tuple) else None


def _of_dict(value: dict[Any, Any], key: str, vocabulary: Spellings, depth: int) -> Reading | None:
    keys = [_one(str(name), vocabulary) for name in value]
    if (all(keys) and len(keys) > 1) or (keys and keys[0] and _value(next(iter(value.values()))) is not None):
        pairs = [(one, _value(other)) for one, other in zip(keys, value.values(), strict=True) if one]
        return _by_value(pairs, key)
    lists = [one for one in value.values() if isinstance(one, list) and one]
    if len(lists) == 2 and len(lists[0]) == len(lists[1]):  # {"labels": [...], "scores": [...]}
        named = [[_one(str(item), vocabulary) for item in one] for one in lists]
        valued = [[_value(item) for item in one] for one in lists]
        for one, two, title in ((0, 1, list(value)[1]), (1, 0, next(iter(value)))):
            if all(named[one]) and all(number is not None for number in valued[two]):
                return _by_value([(m, n) for m, n in zip(named[one], valued[two], strict=True) if m], str(title))
    if all(str(name).isdigit() for name in value):  # {"1": "dog", "2": "cat"}
        ordered = [value[name] for name in sorted(value, key=lambda name: int(name))]
        return _of_list(ordered, vocabulary, depth)
    useful = [name for name in value if not THOUGHT_KEY.search(str(name))]
    readings = []
    for name in sorted(useful, key=_key_place):
        if reading := _of_value(value[name], str(name), vocabulary, depth + 1):
            readings.append(reading)
    if not readings:
        return None
    found = [mention for reading in readings for mention in reading.mentions]
    return Reading(found, (all(reading.clean for reading in readings) and len(readings) == 1) or _each_once(found))


def _key_place(key: Any) -> tuple[int, float]:
    """What is the answer by its key comes first, then what it may be; of several, the one called first or 1."""
    kind = 0 if ANSWER_KEY.search(str(key)) else 1 if NAME_KEY.search(str(key)) else 2
    found = re.search(NUMBER, str(key).replace("_", " "), re.IGNORECASE)
    return kind, _number(found)[0] if found else 0


def _of_list(items: list[Any], vocabulary: Spellings, depth: int) -> Reading | None:
    """A list of names, of (name, number) pairs, or of records with a name and perhaps a number."""
    if items and _numbers(items):
        return _plain(", ".join(map(str, items)), vocabulary) or _by_scores(items, vocabulary)
    if all(isinstance(item, dict) and len(item) == 1 for item in items):  # [{"cat": 0.1}, {"dog": 0.9}]
        merged = {name: value for item in items for name, value in item.items()}
        if len(merged) == len(items) > 1:
            return _of_dict(merged, "", vocabulary, depth)
    pairs: list[tuple[Mention, Any]] = []
    title = ""
    for item in items[:2000]:
        number = None
        if isinstance(item, dict):
            ranks = [name for name in item if RANK_KEY.search(str(name)) and _value(item[name]) is not None]
            scores = [name for name in item if SCORE_KEY.search(str(name)) and _value(item[name]) is not None]
            title = (ranks or scores or [title])[0]
            number = _value(item[title]) if title in item else None
            item = {name: other for name, other in item.items() if name not in (*ranks, *scores)}
        elif isinstance(item, list | tuple) and len(item) == 2:
            numbers = [_value(one) for one in item]
            number = next((one for one in reversed(numbers) if one is not None), None)
            item = next((one for one in item if isinstance(one, str) and _value(one) is None), item[0])
        elif isinstance(item, int | float):
            item = str(item)
        reading = _of_value(item, title, vocabulary, depth + 1)
        if reading and reading.mentions:
            pairs.append((reading.mentions[0], number))
    if not pairs:
        return None
    return (
        _by_value(pairs, title) if all(number is not None for _, number in pairs) else Reading([one for one, _ in pairs], True)
    )


def _one(text: str, vocabulary: Spellings) -> Mention | None:
    """The one class (or label) that a short text names as a whole."""
    found = mentions(text, vocabulary) or loose_mentions(text, [], vocabulary) or _labels(text, len(vocabulary.names))
    return found[0] if len(found) == 1 and len(text) <= MAX_ITEM_CHARS else None


def _by_scores(items: list[Any], vocabulary: Spellings) -> Reading | None:
    """[0.05, 0.9, 0.05]: one number a candidate, in the given order."""
    if len(items) != len(vocabulary.names):
        return None
    order = sorted(range(len(items)), key=lambda place: -items[place])
    return Reading([Mention(place, place, (place,), False) for place in order], False)


# Numbers beside names


def _value(value: Any) -> tuple[float, bool] | None:
    """(number, whether it may be a rank) of a JSON value or a short text; None where it is neither a number nor a verdict."""
    if isinstance(value, bool):
        return float(value), False
    if isinstance(value, int | float):
        return (float(value), float(value).is_integer()) if abs(value) < 1e12 else None
    if isinstance(value, dict):
        inner = [(str(name), _value(one)) for name, one in value.items() if not isinstance(one, dict)]
        return next((one for name, one in inner if one and (RANK_KEY.search(name) or SCORE_KEY.search(name))), None)
    if isinstance(value, str) and len(value) <= 30:
        found = AFTER.fullmatch(value.strip())
        return _number(found) if found else None
    return None


def _number(found: re.Match[str]) -> tuple[float, bool]:
    said = found.groupdict()
    if said.get("verdict"):
        return VERDICTS[said["verdict"].lower()], False
    if said.get("stars"):
        return float(len(said["stars"])), False
    if said["ordinal"]:
        return float(ORDINALS[said["ordinal"].lower()]), True
    text = said["number"].replace(",", ".")
    return float(text), text.lstrip("-").isdigit() and "%" not in (said["unit"] or "")


def _by_value(pairs: Sequence[tuple[Mention, tuple[float, bool] | None]], key: str) -> Reading:
    """By rank where the numbers are 1, 2, 3 ... in some order, else by score, highest first; not clean where unsure which."""
    known = [(mention, number) for mention, number in pairs if number is not None]
    values = [number[0] for _, number in known]
    counting = len(known) > 1 and sorted(values) == list(range(1, len(values) + 1)) and all(number[1] for _, number in known)
    ranks = (counting or bool(RANK_KEY.search(key))) and not SCORE_KEY.search(key)
    ordered = sorted(known, key=lambda pair: pair[1][0] if ranks else -pair[1][0])
    told = bool(RANK_KEY.search(key) or SCORE_KEY.search(key)) or not counting
    clean = told and len(set(values)) == len(values) and len(known) == len(pairs)
    return Reading([mention for mention, _ in ordered], clean and all(mention.exact for mention, _ in ordered))


def _valued(text: str, found: list[Mention], marks: dict[int, int]) -> Reading | None:
    """Names each with a number before or after it on its line ("dog: 90%", "cat - 2", "| 1 | dog |"), two at least."""
    found = [mention for mention in found if not mention.negated]
    if len(found) < 2 or not _each_once(found):
        return None
    ends = [0, *(mention.end for mention in found)]
    starts = [*(mention.start for mention in found), len(text)]
    gaps = [text[end:start] for end, start in zip(ends, starts, strict=True)]
    after = [AFTER.match(gap) for gap in gaps[1:]]
    before = [BEFORE.search(gap[-60:]) for gap in gaps[:-1]]
    lines = [text.rfind("\n", 0, mention.start) + 1 for mention in found]
    numbered = [
        next((number for end, number in marks.items() if line <= end <= one.start), 0)
        for one, line in zip(found, lines, strict=True)
    ]
    shuffled = sorted(numbered) == list(range(1, len(found) + 1)) and len(set(lines)) == len(found)
    rank, score = RANK_KEY.search(gaps[0]), SCORE_KEY.search(gaps[0])
    if all(before) and all(after) and rank and score:  # a table with both: one stands before the name
        after, score = (before, None) if rank.start() < score.start() else (after, None)
    if all(after):
        key = "rank" if rank else "score" if score else ""
        return _by_value(list(zip(found, [_number(one) for one in after if one], strict=True)), key)
    if shuffled and numbered != sorted(numbered):
        return _by_value([(one, (float(number), True)) for one, number in zip(found, numbered, strict=True)], "rank")
    if all(before):
        return _by_value(list(zip(found, [_number(one) for one in before if one], strict=True)), "")
    return None


# Names in order


def _each_once(found: list[Mention]) -> bool:
    named = [mention.candidates for mention in found]
    return len(set(named)) == len(named)


def _in_order(text: str, found: list[Mention]) -> Reading:
    """As a list, where it has the form of one; else as prose, what is asserted before what is merely compared."""
    found = [
        one
        for place, one in enumerate(found)
        if not place or one.candidates != found[place - 1].candidates or len(one.candidates) > 1
    ]
    gaps = [text[one.end : other.start] for one, other in pairwise(found)]
    rising = gaps and all(re.fullmatch(r"[^\w<≺≪←]*(?:<+-?|≺|≪|←)[^\w<≺≪←]*", gap) for gap in gaps)
    if rising or (len(found) > 1 and RISING.search(text)):
        return Reading(found[::-1], bool(rising) and "-" not in gaps[0] and "←" not in gaps[0] and _exact(found))
    lead = text[: found[0].start]
    listed = all(_separates(gap) for gap in gaps) and (bool(GLUE.fullmatch(lead)) or bool(ORDERING.search(lead)))
    tail = text[found[-1].end :].split("\n")[0]
    listed = listed and not re.match(r"[ ]+[^\W\d_]", tail) and not DOUBT.search(tail)
    if listed:
        return Reading(found, _exact(found) and not any(one.negated for one in found))
    ordered = sorted(found, key=lambda one: (_weakness(text, one), one.start))
    return Reading(ordered, False)


def _exact(found: list[Mention]) -> bool:
    return all(mention.exact for mention in found) and all(
        a.candidates != b.candidates or len(a.candidates) > 1
        for a, b in pairwise(sorted(found, key=lambda one: one.candidates))
    )


def _separates(gap: str) -> bool:
    """Whether what stands between two names parts two items of a list: a break, and only small words around it."""
    line = gap.rfind("\n")
    if line >= 0:  # an item may be described before its line ends
        return bool(GLUE.fullmatch(gap[line:]))
    words = [word for word in re.findall(r"[^\W\d_]+", re.sub(r"\([^()]*\)", "", gap)) if not GLUE.fullmatch(word)]
    return len(words) <= MAX_STRANGE and bool(BREAK.search(gap)) and not DOUBT.search(gap)


def _weakness(text: str, mention: Mention) -> float:
    """0 asserted, 1 said, 2 compared with or supposed."""
    before = re.split(r"[.!?。！？\n]", text[max(0, mention.start - 120) : mention.start])[-1]
    if HEDGE.search(before):
        return 2
    if STRONG.search(before):
        return 0
    return 0.5 if CONTRAST.search(before) else 1


# Labels and positions


def _leading_label(text: str, found: list[Mention], vocabulary: Spellings) -> Mention | None:
    """The label of "B. Unlike the cat ...": a reply that begins with a label which no name follows at once."""
    label = LEADING_LABEL.match(text)
    if not label or not found or any(len(name.compact) == 1 for name in vocabulary.names):
        return None
    position = LABELS.index(label.group(1))
    if position >= len(vocabulary.names) or GLUE.fullmatch(text[label.end() : found[0].start]) or found[0].start < label.end():
        return None
    return Mention(0, 0, (position,), True)


def _labels(text: str, count: int) -> list[Mention]:
    """Labels of a reply that names nobody: bare ("B", "(B)", "C > A > B"), at its begin ("B. I think"), or one in its words."""
    only = ONLY_LABELS.fullmatch(text) if len(text) <= MAX_ITEM_CHARS else None
    span = only.span(1) if only else (found.span(1) if (found := LEADING_LABEL.match(text)) else None)
    if span:
        places = list(LETTER.finditer(text, *span))
    else:
        sentence = text[:MAX_ITEM_CHARS].replace("N/A", "   ")
        places = [one for one in LETTER.finditer(sentence) if one.group().isupper() and not english_word(sentence, *one.span())]
    labels = [(LABELS.index(one.group().upper()), one.start()) for one in places]
    if any(label >= count for label, _ in labels) or len({label for label, _ in labels}) < len(labels):
        return []
    return [Mention(start, start + 1, (label,), True) for label, start in labels]


def _positions(text: str, vocabulary: Spellings) -> list[Mention]:
    """A reply of bare numbers ("[2] > [1] > [3]", "2"): places in the given order, from 1 (from 0 where there is a 0)."""
    if len(text) > MAX_ITEM_CHARS or not POSITIONS.fullmatch(text) or any(name.numbers for name in vocabulary.names):
        return []
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    places = [number if 0 in numbers and len(numbers) > 1 else number - 1 for number in numbers]
    if any(not 0 <= place < len(vocabulary.names) for place in places):
        return []
    return [Mention(at, at, (place,), False) for at, place in enumerate(places)]
