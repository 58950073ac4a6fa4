"""What the MLLM is asked, and how its free text becomes a ranking. Parsing is pure and total: no state, nothing raised.

Replies are read by *mentions*, not by format: the text is cut into words and numbers, and every place where a candidate's
words stand is one mention, the longest name winning at a place. So a Python list, numbered lines, "A > B > C" and prose are
one case, and a broken quote or a missing bracket costs nothing. A name does not reach across a separator that it does not
have itself ("a, b" never names the candidate "a b"). List items without a mention are then compared loosely; numbers must
agree, as 737-300 is not a misspelt 737-200. What this costs: a candidate mentioned in passing counts as named, at that place.

The original code discards a reply for one unknown name and reads none with an apostrophe (paper 3.2; public code, parsing).
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import NamedTuple

from rar.ranker.wording import LABELS, Wording, built_in
from rar.schema import RankStatus

MAX_CHARS = 20_000  # of a reply: more is a model that repeats itself
MAX_NAME_TOKENS = 32  # of a name: bounds the work per place of the reply
MAX_LOOSE_ITEMS = 64  # list items compared loosely
MAX_ITEM_CHARS = 200  # a longer stretch without a separator is prose
LOOSE_RATIO = 0.8  # difflib ratio of compact spellings from which two names are one
LOOSE_CHARS = 4  # shorter names are never matched loosely

APOSTROPHES = "'’‘`´ʼ"
WORD = re.compile(rf"[^\W\d_]+(?:[{APOSTROPHES}][^\W\d_]+)*|\d+")
SOFT_GAP = re.compile(r"[ \t\u00a0]*|[-_.‐‑–—]")  # may stand for any gap inside a name
JSON_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")
LIST_MARK = re.compile(r"^[ \t]*(?:[-*+•–]|\(?\d{1,3}[.):])[ \t]+", re.MULTILINE)
SPACES = re.compile(r"[\s_]+")
LISTED = re.compile(r"\[[^\[\]]*\]")
ITEM_BREAK = re.compile(r"[\n,;>|\[\]]+")
LEAD_IN = re.compile(r".*\b(?:a|an|the|is|are)\b\s*", re.IGNORECASE | re.DOTALL)
CONCLUSION = re.compile(r"\b(?:answer|conclusion|species|ranking|result)\b(?: is| are)?\W{0,4}:", re.IGNORECASE)
LETTER = re.compile(r"[A-Za-z]")
FIRST_LABEL = re.compile(r"\W{0,4}([A-Z])[).:*]")
ONLY_LABELS = re.compile(
    r"\W*(?:(?:the )?(?:final |correct |best )?(?:answer|option|choice|letter)(?: is)?\W+)?([a-z](?:\W+[a-z])*)\W*",
    re.IGNORECASE,
)
NEGATION_REACH = 5  # words
NEGATORS = frozenset(
    ("not", "no", "nor", "neither", "never", "without", "unlike", "except", "isnt", "arent", "wasnt", "cannot")
)
FILLERS = frozenset(
    ("a", "an", "the", "any", "of", "be", "is", "it", "really", "likely", "clearly", "quite", "exactly", "actually")
)


def letters_prompt(names: Sequence[str], wording: Wording | None = None, exemplars: Sequence[int] = ()) -> str:
    """One line a candidate, labelled A, B, ...; the answer is one label. At most 26 names."""
    wording = wording or built_in()
    return wording.render(wording.letters, names, exemplars)


def generate_prompt(names: Sequence[str], wording: Wording | None = None, exemplars: Sequence[int] = ()) -> str:
    """The paper's request (3.2) in our words: sort the listed names from most to least like the picture."""
    wording = wording or built_in()
    return wording.render(wording.generate, names, exemplars)


def likelihood_prompt(names: Sequence[str], wording: Wording | None = None, exemplars: Sequence[int] = ()) -> str:
    """What each name is a reply to. The built-in one does not list the candidates."""
    wording = wording or built_in()
    return wording.render(wording.likelihood, names, exemplars)


def yes_no_prompt(name: str, wording: Wording | None = None, exemplars: int = 0) -> str:
    """Whether it is this one candidate."""
    wording = wording or built_in()
    return wording.render(wording.yes_no, [name], [exemplars])


def generate_answer(names: Sequence[str]) -> str:
    """The reply that `generate_prompt` asks for; the training target of the miniature MLLM."""
    return "[" + ", ".join(f"'{name}'" for name in names) + "]"


def parse(response: str, names: Sequence[str]) -> tuple[tuple[int, ...], RankStatus]:
    """Read a reply as an order of `names`, best first: always a permutation of `range(len(names))`, whatever the reply.

    RANKED: every name stands in the reply exactly once, up to case, accents, quotes and punctuation. REPAIRED: something was
    completed, de-duplicated or loosely matched; names that the reply lacks follow in the given (retrieval) order, names that it
    rules out ("not a ...") come last. FALLBACK: nothing recognised, the given order. Reads the first MAX_CHARS characters.
    """
    text = _plain(response)
    vocabulary = Vocabulary(names)
    mentions = _mentions(text, vocabulary)
    mentions += _loose_mentions(text, mentions, vocabulary)
    mentions = mentions or _labels(text, len(names)) or _partial_mentions(text, vocabulary)
    return _complete(_by_weight(text, mentions), len(names))


def match_name(written: str, names: Sequence[str] | Vocabulary) -> int | None:
    """The position of the name that `written` spells, or None. Pass a `Vocabulary` to look up many in a large one.

    Equal spelling (up to case, accents, punctuation) comes first, then the closest spelling above LOOSE_RATIO.
    """
    vocabulary = names if isinstance(names, Vocabulary) else Vocabulary(names)
    text = _plain(written)
    name = _name(text)
    same = vocabulary.exact.get(name.words) or vocabulary.compact.get(name.compact) or vocabulary.stems.get(name.stems)
    if same and name.words:
        return same[0]
    return vocabulary.nearest(name)


class Token(NamedTuple):
    """A word or a number of a text: as compared (`word`), without a plural ending (`stem`), and where it stands."""

    word: str
    stem: str
    start: int
    end: int


class Name(NamedTuple):
    """A class name made comparable. gaps[i] is what stands between words i and i+1, without spaces."""

    raw: str
    lead: int
    words: tuple[str, ...]
    stems: tuple[str, ...]
    gaps: tuple[str, ...]
    compact: str
    numbers: tuple[str, ...]


class Mention(NamedTuple):
    """A place of the reply that names a candidate. `candidates` share that spelling; `exact`: not loosely matched."""

    start: int
    end: int
    candidates: tuple[int, ...]
    exact: bool
    negated: bool = False


class Vocabulary:
    """Class names indexed by spelling; built once for a large list, per reply for a handful of candidates."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = [_name(name) for name in names]
        self.exact: dict[tuple[str, ...], list[int]] = {}
        self.stems: dict[tuple[str, ...], list[int]] = {}
        self.compact: dict[str, list[int]] = {}
        self.lengths: dict[str, list[int]] = {}  # first stem -> lengths of the names that begin with it, longest first
        self.grams: dict[str, list[int]] = {}
        for position, name in enumerate(self.names):
            if not name.words:
                continue
            self.exact.setdefault(name.words, []).append(position)
            self.stems.setdefault(name.stems, []).append(position)
            self.compact.setdefault(name.compact, []).append(position)
            for gram in _grams(name.compact):
                self.grams.setdefault(gram, []).append(position)
        for stems in self.stems:
            self.lengths.setdefault(stems[0], []).append(len(stems))
        for stem, lengths in self.lengths.items():
            self.lengths[stem] = sorted(set(lengths), reverse=True)

    def nearest(self, written: Name) -> int | None:
        """The name whose compact spelling is closest to `written`'s, if close enough and with the same numbers."""
        if len(written.compact) < LOOSE_CHARS:
            return None
        shared = Counter(position for gram in _grams(written.compact) for position in self.grams.get(gram, ()))
        matcher = difflib.SequenceMatcher(autojunk=False)
        matcher.set_seq2(written.compact)
        best, best_ratio = None, LOOSE_RATIO
        for position, _ in shared.most_common(32):
            name = self.names[position]
            if len(name.compact) < LOOSE_CHARS or name.numbers != written.numbers:
                continue
            matcher.set_seq1(name.compact)
            ratio = matcher.ratio() if matcher.quick_ratio() >= best_ratio else 0.0
            if ratio > best_ratio or (ratio == best_ratio and (best is None or position < best)):
                best, best_ratio = position, ratio
        return best


def _plain(text: str) -> str:
    """The part of a reply that answers: capped, composed (NFC), without reasoning, escaped quotes and list numbers.

    List numbers go so that "1. 3" names 3 and not 1; nothing else is moved by more than that.
    """
    text = JSON_ESCAPE.sub(lambda escape: chr(int(escape.group(1), 16)), text.rpartition("</think>")[2][:MAX_CHARS])
    text = unicodedata.normalize("NFC", text)
    return LIST_MARK.sub("", text.replace("\\n", "\n").replace("\\", ""))


def _tokens(text: str) -> list[Token]:
    """Words and numbers in order: "Saab-340's" is "saab", "340", "s"."""
    folded = ((_folded(found.group()), found) for found in WORD.finditer(text))
    return [Token(word, _stem(word), *found.span()) for word, found in folded if word]


def _folded(word: str) -> str:
    """Case, accents and apostrophes away: "Colt’s" and "colts" are one."""
    return "".join(letter for letter in unicodedata.normalize("NFKD", word).casefold() if letter.isalnum())


def _stem(word: str) -> str:
    """Without an English plural ending; only compared with other stems, so "gras" for "grass" is fine."""
    if len(word) > LOOSE_CHARS and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > LOOSE_CHARS and word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    return word[:-1] if len(word) >= LOOSE_CHARS and word.endswith("s") else word


def _name(raw: str) -> Name:
    text = " ".join(unicodedata.normalize("NFC", raw).split())
    tokens = _tokens(text)[:MAX_NAME_TOKENS]
    words = tuple(token.word for token in tokens)
    gaps = tuple(SPACES.sub("", text[a.end : b.start]) for a, b in pairwise(tokens))
    numbers = tuple(word for word in words if word.isdigit() and not _is_year(word))
    lead = tokens[0].start if tokens else 0
    return Name(text, lead, words, tuple(token.stem for token in tokens), gaps, "".join(words), numbers)


def _is_year(word: str) -> bool:
    """Models guess a car's year, which no picture shows, so loose matching lets years differ."""
    return len(word) == 4 and word[:2] in ("19", "20")


def _grams(compact: str) -> set[str]:
    return {compact[i : i + 3] for i in range(max(1, len(compact) - 2))}


def _mentions(text: str, vocabulary: Vocabulary) -> list[Mention]:
    """All places that spell a candidate, left to right, the longest name first at each place."""
    mentions = []
    tokens = _tokens(text)
    stems = tuple(token.stem for token in tokens)
    place = 0
    while place < len(tokens):
        mention, length = None, 1
        for length in vocabulary.lengths.get(stems[place], ()):
            candidates = vocabulary.stems.get(stems[place : place + length], [])
            if candidates and (mention := _mention(text, tokens, place, length, candidates, vocabulary)):
                break
        if mention:
            mentions.append(mention)
        place += length if mention else 1
    return sorted([*mentions, *_symbol_mentions(text, vocabulary)])


def _mention(
    text: str, tokens: list[Token], place: int, length: int, candidates: list[int], vocabulary: Vocabulary
) -> Mention | None:
    """The best spelt of `candidates`, which share their stems, at a place; None where the text's gaps forbid them all."""
    inside = tokens[place : place + length]
    if _glued(text, tokens, place - 1) or _glued(text, tokens, place + length - 1):
        return None
    gaps = [text[a.end : b.start] for a, b in pairwise(inside)]
    words = tuple(token.word for token in inside)
    fits: dict[tuple[bool, int], list[int]] = {}
    for candidate in candidates:
        name = vocabulary.names[candidate]
        if all(SOFT_GAP.fullmatch(gap) or SPACES.sub("", gap) == own for gap, own in zip(gaps, name.gaps, strict=True)):
            verbatim = inside[0].start >= name.lead and text.startswith(name.raw, inside[0].start - name.lead)
            fits.setdefault((name.words == words, len(name.raw) if verbatim else 0), []).append(candidate)
    if not fits:
        return None
    best = max(fits)
    return Mention(inside[0].start, inside[-1].end, tuple(fits[best]), best[0], _negated(text, tokens, place))


def _glued(text: str, tokens: list[Token], left: int) -> bool:
    """Whether tokens left and left+1 are one written word ("A320" is "a" and "320"; 737-800 holds no 737)."""
    if not 0 <= left < len(tokens) - 1:
        return False
    before, after = tokens[left], tokens[left + 1]
    gap = text[before.end : after.start]
    return gap == "" or (gap in "-‐‑–." and before.word.isdigit() and after.word.isdigit())


def _negated(text: str, tokens: list[Token], place: int) -> bool:
    """Whether "not", "neither" ... stands before the place with nothing but small words between, in the same clause."""
    for before in range(place - 1, max(-1, place - 1 - NEGATION_REACH), -1):
        if not SOFT_GAP.fullmatch(text[tokens[before].end : tokens[before + 1].start]):
            return False
        if tokens[before].word in NEGATORS:
            return True
        if tokens[before].word not in FILLERS:
            return False
    return False


def _symbol_mentions(text: str, vocabulary: Vocabulary) -> Iterator[Mention]:
    """Names without a letter or digit ("???", "♀") are found verbatim."""
    for position, name in enumerate(vocabulary.names):
        if not name.words and name.raw and (start := text.find(name.raw)) >= 0:
            yield Mention(start, start + len(name.raw), (position,), True)


def _loose_mentions(text: str, mentions: list[Mention], vocabulary: Vocabulary) -> list[Mention]:
    """List items (or a whole short reply) that name nobody exactly, compared by closest spelling."""
    starts = [mention.start for mention in mentions]
    ends = [0, *(mention.end for mention in mentions)]
    unnamed = ((start, end) for start, end in _items(text) if ends[bisect_left(starts, end)] <= start)
    loose = []
    for start, end in islice(unnamed, MAX_LOOSE_ITEMS):
        item = text[start:end]
        for written in (_name(item), _name(LEAD_IN.sub("", item))):
            position = vocabulary.nearest(written)
            if position is not None:
                compact = vocabulary.names[position].compact
                loose.append(Mention(start, end, tuple(vocabulary.compact[compact]), compact == written.compact))
                break
    return loose


def _items(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of what stands between commas, line ends, brackets and the like; long stretches are prose and left out."""
    start = 0
    for found in ITEM_BREAK.finditer(text + "\n"):
        if 0 < found.start() - start <= MAX_ITEM_CHARS:
            yield start, found.start()
        start = found.end()


def _labels(text: str, count: int) -> list[Mention]:
    """A reply of bare labels ("B", "(B)", "Answer: C, A, B") or one that starts with a label ("B. I think ...")."""
    found = ONLY_LABELS.fullmatch(text) if len(text) <= MAX_ITEM_CHARS else None
    found = found or FIRST_LABEL.match(text)
    if not found:
        return []
    labels = [(LABELS.index(letter.group().upper()), letter.start()) for letter in LETTER.finditer(text, *found.span(1))]
    if any(label >= count for label, _ in labels):
        return []
    return [Mention(start, start + 1, (label,), True) for label, start in labels]


def _partial_mentions(text: str, vocabulary: Vocabulary) -> list[Mention]:
    """For a reply that names nobody in full ("a Bentley Continental"): names of which more than half stands in it, most first.

    Years may differ, other numbers may not; names that share the same words of the reply keep their order.
    """
    said = {token.stem for token in _tokens(text)}
    found = []
    for position, name in enumerate(vocabulary.names):
        words = {stem for stem in name.stems if not _is_year(stem)}
        shared = sum(len(word) for word in words & said)
        spelt = any(not word.isdigit() for word in words & said) and said.issuperset(name.numbers)
        if spelt and shared > max(LOOSE_CHARS, sum(map(len, words))) / 2:
            found.append((-shared, position))
    return [Mention(place, place, (position,), False) for place, (_, position) in enumerate(sorted(found))]


def _by_weight(text: str, mentions: list[Mention]) -> list[Mention]:
    """In order of the text, but what follows "Answer:" or stands in a bracketed list comes before what stands around it."""
    mentions = sorted(mentions)
    areas = [(found.end(), len(text)) for found in CONCLUSION.finditer(text)][-1:]
    areas += [found.span() for found in LISTED.finditer(text)]
    for start, end in areas:
        inside = [mention for mention in mentions if start <= mention.start < end and not mention.negated]
        if inside:
            return inside + [mention for mention in mentions if mention not in inside]
    return mentions


def _complete(mentions: list[Mention], count: int) -> tuple[tuple[int, ...], RankStatus]:
    """A permutation of `range(count)` that begins with the mentions, and how it came about."""
    order: dict[int, None] = {}
    ruled_out: set[int] = set()
    clean = True
    for mention in mentions:
        free = next((candidate for candidate in mention.candidates if candidate not in order), None)
        if mention.negated:
            ruled_out.update(mention.candidates)
        elif free is not None:
            order[free] = None
        clean = clean and mention.exact and not mention.negated and free is not None
    unnamed = [position for position in range(count) if position not in order]
    completed = (*order, *sorted(unnamed, key=lambda position: position in ruled_out))
    if not order and len(ruled_out) in (0, count):
        return tuple(range(count)), RankStatus.FALLBACK
    return completed, RankStatus.RANKED if clean and not unnamed else RankStatus.REPAIRED
