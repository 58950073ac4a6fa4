"""Class names made comparable, and the places of a text that spell one.

A text is cut into words and numbers; every place where a name's words stand is one mention, the longest name winning at a
place. A name does not reach across a separator that it does not have itself ("a, b" never names the class "a b"), nor does it
end inside a written word (737-800 holds no 737). Case, accents, apostrophes and English plurals are looked through; numbers
must agree, as 737-300 is not a misspelt 737-200. The parts of a WordNet list ("drake, male duck") and what stands before
brackets ("ring_(jewelry)") are further spellings of their class, where no other class has that name.

Scripts without spaces between words (Chinese, Japanese, Thai, Korean with its endings) and symbols are found as they stand in
the text. What this costs: a short name is also found inside a longer word that is no class ("狗" in "热狗").
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import NamedTuple

from rapidfuzz import fuzz, process

MAX_NAME_TOKENS = 32  # of a name: bounds the work per place of the reply
MAX_JOINED = 5  # written words that may be one word of a name ("permanent crop" for PermanentCrop)
MAX_LOOSE_ITEMS = 64  # list items compared loosely
MAX_ITEM_CHARS = 200  # a longer stretch without a separator is prose
LOOSE_RATIO = 80.0  # rapidfuzz ratio of compact spellings from which two names are one
LOOSE_CHARS = 4  # shorter names are never matched loosely

APOSTROPHES = "'’‘`´ʼ"
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
MARKS = "\u0300-\u036f\u0483-\u0487\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u0900-\u0963\u0981-\u0dff\u200c\u200d"
LETTERS = rf"(?:(?![{UNSPACED}])[^\W\d_])(?:(?![{UNSPACED}])[^\W\d_]|[{MARKS}])*"
WORD = re.compile(rf"[{UNSPACED}]+|{LETTERS}(?:[{APOSTROPHES}]{LETTERS})*|\d+")
HAS_UNSPACED = re.compile(f"[{UNSPACED}]")
HANGUL = re.compile("[\uac00-\ud7af]")
KOREAN_ENDING = re.compile(  # a name of one syllable ends where one of these follows: "개입니다" is a dog, "개구리" a frog
    "(?:은|는|이|가|을|를|과|와|의|도|만|로|으로|라|이라|라고|이라고|다|이다|인|일|입니다|예요|에요|이에요|야|이야|고|이고|네요|처럼|보다)?"
    "(?![\uac00-\ud7af])|(?:입니|인|일|같|이|가)"
)
SOFT_GAP = re.compile(r"[ \t\u00a0]*|[-_.‐‑–—]")  # may stand for any gap inside a name
SPACES = re.compile(r"[\s_]+")
UNSEEN = dict.fromkeys((0xFE0F, 0x200B, 0x2060, 0xFEFF, 0xAD))  # marks that have no width and join nothing
ALIAS_BREAK = re.compile(r"\s*[,;]\s+|\s+/\s+|\s+\|\s+")
BRACKETS = re.compile(r"[\s_]*\(.*\)\s*$", re.DOTALL)
ITEM_BREAK = re.compile(r"[\n,;>|\[\]]+")
LEAD_IN = re.compile(r".*\b(?:a|an|the|is|are)\b\s*", re.IGNORECASE | re.DOTALL)
IRREGULAR = {
    **dict.fromkeys(("mice", "mouse"), "mouse"),
    **{"geese": "goose", "men": "man", "women": "woman", "children": "child", "people": "person", "teeth": "tooth"},
    **{"feet": "foot", "oxen": "ox", "lice": "louse", "leaves": "leaf", "wolves": "wolf", "knives": "knife"},
    **{"calves": "calf", "loaves": "loaf", "shelves": "shelf", "hooves": "hoof", "thieves": "thief", "scarves": "scarf"},
    **{"elves": "elf", "halves": "half", "wives": "wife", "cacti": "cactus", "fungi": "fungus", "octopi": "octopus"},
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NEGATION_REACH = 6  # words
NEGATORS = re.compile(
    "not|no|nor|neither|never|without|unlike|except|excluding|isnt|arent|wasnt|cannot|cant|doesnt|dont|didnt|"
    "rather than|instead of|other than|opposed to|ruled? out|different from|"
    "nicht|keine?|keine[nr]|niet|geen|pas|non|nao|inte|ikke|nie|nem|bukan|khong phai|не|לא|ليس|ليست"
)
FILLERS = re.compile(
    "an?|the|any|of|be|is|its?|really|likely|clearly|quite|exactly|actually|think|looks?|looking|like|appear|seem|to|another|just|"
    "show|contain|depict|have|see|visible|evidence|signs?|"
    "une?|una|el|la|les?|des?|est?|eine?|einen|der|die|das|uma?|e|o|en|ett?|een|con"
)
CARRIERS = frozenset(("or", "nor", "and"))  # "not a cat or a bird"
NEGATED_BEFORE = re.compile(
    "(?:不是|不像|并非|並非|而非|不属于|不屬於|没有|沒有|ไม่ใช่|ليس)[ ]?[一这那個个只隻头頭种種张張条條]{0,3}[ ]?[\"'“「]?$"
)
NEGATED_AFTER = re.compile(
    r"[\"'”」]?[ \t]*(?:では(?:なく|ない|あり)|じゃ(?:なく|ない)|でな[くい]|[이가은는]?\s*아(?:니|닙)|नहीं|değil|نیست|"
    r"\s(?:is|are|was|can be|should be)\s+"
    r"(?:not (?:it|the (?:answer|one|case)|correct|right|likely|possible|a match|present)|ruled out|incorrect|wrong|unlikely|"
    r"excluded|impossible|out)\b|[:=–—-]\s*(?:no|not|incorrect|wrong|false|unlikely|impossible)\b|:?[ \t]*[✗✘❌☒])",
    re.IGNORECASE,
)


class Token(NamedTuple):
    """A word or a number of a text: as compared (`word`), without a plural ending (`stem`), and where it stands."""

    word: str
    stem: str
    start: int
    end: int


class Name(NamedTuple):
    """One spelling of a class. gaps[i] is what stands between words i and i+1, without spaces; `wraps[i]`: with a line end."""

    raw: str
    lead: int
    words: tuple[str, ...]
    stems: tuple[str, ...]
    gaps: tuple[str, ...]
    wraps: tuple[bool, ...]
    compact: str
    numbers: tuple[str, ...]


class Spelling(NamedTuple):
    """A name and the position of the class that it spells. `alias`: only a part of what the class is called."""

    name: Name
    position: int
    alias: bool


class Mention(NamedTuple):
    """A place of the text that names a class. `candidates` share that spelling; `exact`: not loosely matched."""

    start: int
    end: int
    candidates: tuple[int, ...]
    exact: bool
    negated: bool = False


class Spellings:
    """Class names indexed by spelling; built once for a large list, per reply for a handful of candidates."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = [spelled(name) for name in names]
        spellings = [Spelling(name, position, False) for position, name in enumerate(self.names)]
        full = {name.compact for name in self.names}
        aliases = ((spelled(part), position) for position, name in enumerate(self.names) for part in _aliases(name.raw))
        spellings += [Spelling(name, position, True) for name, position in aliases if name.words and name.compact not in full]
        self.stems: dict[tuple[str, ...], list[Spelling]] = {}
        self.joined: dict[str, list[Spelling]] = {}
        self.compact: dict[str, list[Spelling]] = {}
        self.verbatim: list[Spelling] = []  # symbols, and scripts without spaces
        self.numbered: dict[tuple[str, ...], list[Spelling]] = {}  # those that may be matched loosely, by their numbers
        for one in spellings:
            name = one.name
            if not name.words or HAS_UNSPACED.search(name.raw):
                self.verbatim += [one] if name.raw else []
            if not name.words:
                continue
            self.stems.setdefault(name.stems, []).append(one)
            self.joined.setdefault(joined(name.words, name.stems), []).append(one)
            self.compact.setdefault(name.compact, []).append(one)
            if len(name.compact) >= LOOSE_CHARS:
                self.numbered.setdefault(name.numbers, []).append(one)
        self.starts = {one[:end] for one in self.joined for end in range(1, len(one) + 1)}  # of joined names
        self.verbatim.sort(key=lambda one: -len(one.name.raw))
        self.lengths: dict[str, list[int]] = {}  # first stem -> lengths of the names that begin with it, longest first
        for stems in self.stems:
            self.lengths.setdefault(stems[0], []).append(len(stems))
        for stem, lengths in self.lengths.items():
            self.lengths[stem] = sorted(set(lengths), reverse=True)
        longest = max((len(name) for name in self.compact), default=0)
        self.longest = longest * (200 / LOOSE_RATIO - 1)  # letters of an item from which no name is close
        self.loose = {numbers: [one.name.compact for one in group] for numbers, group in self.numbered.items()}

    def nearest(self, written: Name) -> Spelling | None:
        """The spelling whose compact form is closest to `written`'s, if close enough and with the same numbers."""
        choices = self.loose.get(written.numbers)
        if len(written.compact) < LOOSE_CHARS or not choices:
            return None
        found = process.extractOne(written.compact, choices, scorer=fuzz.ratio, score_cutoff=LOOSE_RATIO)
        return self.numbered[written.numbers][found[2]] if found else None


def match_name(written: str, names: Sequence[str] | Spellings) -> int | None:
    """The position of the name that `written` spells, or None. Pass a `Spellings` to look up many in a large one.

    Equal spelling (up to case, accents, punctuation, a plural) comes first, then the closest spelling above LOOSE_RATIO.
    """
    vocabulary = names if isinstance(names, Spellings) else Spellings(names)
    name = spelled(written)
    same = vocabulary.compact.get(name.compact) or vocabulary.stems.get(name.stems)
    if same and name.words:
        return min(same, key=lambda one: (one.alias, one.name.words != name.words, one.position)).position
    near = vocabulary.nearest(name)
    return near.position if near else None


def normal(text: str) -> str:
    """Composed, wide letters narrow (NFKC), quotes kept: the form in which names and replies are compared."""
    return unicodedata.normalize("NFKC", text.replace("´", "'")).translate(UNSEEN)


def spelled(raw: str) -> Name:
    """A class name, or one written item, made comparable."""
    text = normal(raw).strip()
    found = tokens(text)[:MAX_NAME_TOKENS]
    words = tuple(token.word for token in found)
    between = [text[a.end : b.start] for a, b in pairwise(found)]
    gaps, wraps = tuple(SPACES.sub("", gap) for gap in between), tuple("\n" in gap for gap in between)
    numbers = tuple(word for word in words if word.isdigit() and not is_year(word))
    lead = found[0].start if found else 0
    return Name(" ".join(text.split()), lead, words, tuple(token.stem for token in found), gaps, wraps, "".join(words), numbers)


def _aliases(raw: str) -> list[str]:
    if raw.isascii() and raw.isdigit() and len(raw) < 3 and int(raw) in (0, *range(2, 11)):
        return [DIGITS[int(raw)]]
    parts = ALIAS_BREAK.split(raw)
    parts = [part for part in parts if len(part) > 2 or HAS_UNSPACED.search(part)] if len(parts) > 1 else []
    base = BRACKETS.sub("", raw)
    return list(dict.fromkeys([*parts, base] if base and base != raw else parts))


def tokens(text: str) -> list[Token]:
    """Words and numbers in order: "Saab-340's" is "saab", "340", "s"."""
    folded = ((_folded(found.group()), found) for found in WORD.finditer(text))
    return [Token(word, _stem(word), *found.span()) for word, found in folded if word]


def _folded(word: str) -> str:
    """Case, accents and apostrophes away: "Colt’s" and "colts" are one. Vowel signs of Indian scripts stay."""
    if word.isascii():
        return "".join(filter(str.isalnum, word.casefold()))
    folded = unicodedata.normalize("NFKD", word.casefold())
    return "".join(letter for letter in folded if letter.isalnum() or "\u0900" <= letter <= "\u0eff")


def _stem(word: str) -> str:
    """Without an English plural ending or an Arabic article; only compared with other stems, so "gla" for "glass" is fine."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) > LOOSE_CHARS:
        if word.endswith("men"):
            return word[:-2] + "an"
        if word.endswith("ies"):
            return word[:-3] + "y"
        if word.endswith(("ches", "shes", "xes", "sses", "uses", "toes")):
            return word[:-2].rstrip("s")
        if word.startswith("ال"):
            return word[2:]
    return word.rstrip("s") if len(word) >= LOOSE_CHARS and word.endswith("s") else word


def joined(words: Sequence[str], stems: Sequence[str]) -> str:
    """All words in one, without a plural ending."""
    return "".join(words[:-1]) + stems[-1]


def is_year(word: str) -> bool:
    """Models guess a car's year, which no picture shows, so loose matching lets years differ."""
    return len(word) == 4 and word[:2] in ("19", "20")


def mentions(text: str, vocabulary: Spellings) -> list[Mention]:
    """All places that spell a class, left to right, the longest name first at each place."""
    found = []
    words = tokens(text)
    stems = tuple(token.stem for token in words)
    place = 0
    while place < len(words):
        mention, length = None, 1
        for length, spellings in _spellings_at(words, stems, place, vocabulary):
            if mention := _mention(text, words, place, length, spellings, vocabulary):
                break
        if mention:
            found.append(mention)
        place += length if mention else 1
    return _carried(text, _merged(text, found, vocabulary))


def _spellings_at(
    words: list[Token], stems: tuple[str, ...], place: int, vocabulary: Spellings
) -> Iterator[tuple[int, list[Spelling]]]:
    """(number of words, spellings that may stand there), the most words first."""
    lengths = vocabulary.lengths.get(stems[place], [])
    longest = MAX_JOINED if words[place].word in vocabulary.starts or stems[place] in vocabulary.starts else 0
    for length in sorted({*lengths, *range(1, longest + 1)}, reverse=True):
        inside = words[place : place + length]
        if len(inside) < length:
            continue
        if length in lengths and (found := vocabulary.stems.get(stems[place : place + length])):
            yield length, found
        if length <= longest and not any(a.word.isdigit() and b.word.isdigit() for a, b in pairwise(inside)):
            one = joined([token.word for token in inside], stems[place : place + length])
            if other := [spelling for spelling in vocabulary.joined.get(one, ()) if len(spelling.name.words) != length]:
                yield length, other


def _mention(
    text: str, words: list[Token], place: int, length: int, spellings: list[Spelling], vocabulary: Spellings
) -> Mention | None:
    """The best spelt of `spellings` at a place; None where the text's gaps forbid them all."""
    inside = words[place : place + length]
    start, end = inside[0].start, inside[-1].end
    if _glued(text, words, place - 1) or _glued(text, words, place + length - 1):
        return None
    if length == 1 and inside[0].word in ("a", "i") and english_word(text, start, end):
        return None
    gaps = [text[a.end : b.start] for a, b in pairwise(inside)]
    said = tuple(token.word for token in inside)
    parted = [  # two lines, two names
        "\n" in gap and joined(said[:number], [token.stem for token in inside[:number]]) in vocabulary.joined
        for number, gap in enumerate(gaps, 1)
    ]
    fits: dict[tuple[bool, bool, int, int], list[int]] = {}
    for name, position, alias in spellings:
        own = list(zip(name.gaps, name.wraps, strict=True)) if len(name.words) == length else [("", False)] * len(gaps)
        if all(_gap_fits(gap, *pair, two) for gap, pair, two in zip(gaps, own, parted, strict=True)):
            there = text[max(0, start - name.lead) :][: len(name.raw)]
            case = 2 if there == name.raw else 1 if there.casefold() == name.raw.casefold() else 0
            same = name.words == said or (len(name.words) != length and name.compact == "".join(said))
            fits.setdefault((same, not alias, len(name.raw) if case else 0, case), []).append(position)
    if not fits:
        return None
    best = max(fits)
    if best[2] == 0 and re.match(r"(?:\+\+|#)(?!\w)", text[end : end + 3]):  # C++ is no C
        return None
    candidates = tuple(dict.fromkeys(fits[best]))
    return Mention(start, end, candidates, best[0] and (best[1] or len(candidates) == 1), _negated(text, words, place, end))


def _gap_fits(gap: str, own: str, wraps: bool, parted: bool) -> bool:
    return not (parted and not wraps) and (bool(SOFT_GAP.fullmatch(gap)) or SPACES.sub("", gap) == own)


def english_word(text: str, start: int, end: int) -> bool:
    """Whether an "A" or "I" at a place is the word and not a label: a word follows."""
    follows = r"[ ][^\W\d_]" if text[start:end] == "a" else r"['’]?[ ]?[a-z]{2}|['’][a-z]"
    return text[start:end] in "aAI" and bool(re.match(follows, text[end : end + 4]))


def _glued(text: str, words: list[Token], left: int) -> bool:
    """Whether tokens left and left+1 are one written word ("A320" is "a" and "320"; 737-800 holds no 737)."""
    if not 0 <= left < len(words) - 1:
        return False
    before, after = words[left], words[left + 1]
    gap = text[before.end : after.start]
    if gap == "":
        return not (HAS_UNSPACED.match(before.word) or HAS_UNSPACED.match(after.word))
    return gap in "-‐‑–." and before.word.isdigit() and after.word.isdigit()


def _negated(text: str, words: list[Token], place: int, end: int) -> bool:
    """Whether "not", "neither" ... stands before the place with nothing but small words between, in the same clause."""
    start = words[place].start
    if NEGATED_AFTER.match(text[end : end + 40]) or NEGATED_BEFORE.search(text[max(0, start - 12) : start]):
        return True
    for before in range(place - 1, max(-1, place - 1 - NEGATION_REACH), -1):
        if not SOFT_GAP.fullmatch(text[words[before].end : words[before + 1].start]):
            return False
        pair = f"{words[max(0, before - 1)].word} {words[before].word}"
        if NEGATORS.fullmatch(words[before].word) or NEGATORS.fullmatch(pair):
            return True
        if not FILLERS.fullmatch(words[before].word):
            return False
    return False


def _merged(text: str, found: list[Mention], vocabulary: Spellings) -> list[Mention]:
    """With the names that stand verbatim; of two that overlap the longer one stays."""
    verbatim = list(_verbatim(text, vocabulary))
    if not verbatim:
        return found
    kept: list[Mention] = []
    taken = bytearray(len(text))
    for mention in sorted([*found, *verbatim], key=lambda one: (one.start - one.end, one.start)):
        if not any(taken[mention.start : mention.end]):
            taken[mention.start : mention.end] = b"\1" * (mention.end - mention.start)
            kept.append(mention)
    return sorted(kept)


def _verbatim(text: str, vocabulary: Spellings) -> Iterator[Mention]:
    for name, position, alias in vocabulary.verbatim:
        start = text.find(name.raw)
        while start >= 0:
            end = start + len(name.raw)
            if _stands_alone(text, start, end, name):
                negated = NEGATED_AFTER.match(text[end : end + 12]) or NEGATED_BEFORE.search(text[max(0, start - 12) : start])
                yield Mention(start, end, (position,), not alias, bool(negated))
            start = text.find(name.raw, end)


def _stands_alone(text: str, start: int, end: int, name: Name) -> bool:
    """Whether a verbatim find is the whole of what is written: "★" is not in "★★", nor "-" in "crack-free"."""
    before, after = text[start - 1 : start], text[end : end + 1]
    if not name.words:
        same_kind = {*name.raw, "\u200d"}
        inside = name.raw.isascii() and (before.isalnum() or after.isalnum())
        return not (before in same_kind or after in same_kind or inside)
    if HANGUL.match(name.raw):
        return not HANGUL.match(before) and (len(name.raw) > 1 or bool(KOREAN_ENDING.match(text[end : end + 8])))
    return True


def _carried(text: str, found: list[Mention]) -> list[Mention]:
    """With negations carried along: "not a cat or a bird" rules out both."""
    for place in range(1, len(found)):
        before, here = found[place - 1], found[place]
        if before.negated and not here.negated:
            between = text[before.end : here.start].split()
            if (
                between
                and between[0].strip(",").lower() in CARRIERS
                and all(FILLERS.fullmatch(word.lower()) for word in between[1:])
            ):
                found[place] = here._replace(negated=True)
    return found


def loose_mentions(text: str, found: list[Mention], vocabulary: Spellings) -> list[Mention]:
    """List items (or a whole short reply) that name nobody exactly, compared by closest spelling."""
    starts = [mention.start for mention in found]
    ends = [0, *(mention.end for mention in found)]
    unnamed = ((start, end) for start, end in _items(text) if ends[bisect_left(starts, end)] <= start)
    loose = []
    for start, end in islice(unnamed, MAX_LOOSE_ITEMS):
        for item in dict.fromkeys((text[start:end], LEAD_IN.sub("", text[start:end]))):
            if sum(map(str.isalnum, item)) > vocabulary.longest:
                continue
            written = spelled(item)
            if near := vocabulary.nearest(written):
                same = tuple(one.position for one in vocabulary.compact[near.name.compact])
                loose.append(Mention(start, end, same, near.name.compact == written.compact))
                break
    return loose


def _items(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of what stands between commas, line ends, brackets and the like; long stretches are prose and left out."""
    start = 0
    for found in ITEM_BREAK.finditer(text + "\n"):
        if 0 < found.start() - start <= MAX_ITEM_CHARS:
            yield start, found.start()
        start = found.end()


def partial_mentions(text: str, vocabulary: Spellings) -> list[Mention]:
    """For a text that names nobody in full ("a Bentley Continental"): names of which more than half stands in it, most first.

    Years may differ, other numbers may not; names that share the same words of the text keep their order.
    """
    said = {token.stem for token in tokens(text)}
    found = []
    for position, name in enumerate(vocabulary.names):
        words = {stem for stem in name.stems if not is_year(stem)}
        shared = sum(len(word) for word in words & said)
        spelt = any(not word.isdigit() for word in words & said) and said.issuperset(name.numbers)
        if spelt and shared > max(LOOSE_CHARS, sum(map(len, words))) / 2:
            found.append((-shared, position))
    return [Mention(place, place, (position,), False) for place, (_, position) in enumerate(sorted(found))]
