"""The ranker behind an OpenAI-compatible server (vLLM, SGLang, Ray Serve LLM, `transformers serve`, hosted models).

Servers differ in what they offer, and some accept a field and ignore it, so the server is asked: `probe` sends the same small
questions whatever the corpus, so that every worker finds the same. Then each image is asked in the best way on offer:
`logprobs` (labelled candidates, one token, its label probabilities: a permutation and scores), structured output (a JSON list
of labels; labels, as a grammar of names would be compiled anew for every image), free text read by `prompt.parse`. More than
26 candidates have no labels and go by free text. A probe costs three short calls a worker, not counted in any Ranking.

A server that is away when it is first asked is Unavailable. Later on, an image whose request was refused, or failed `attempts`
times, is a FALLBACK with the reason in brackets as its response and calls = 0; a reply that nobody can read has calls = 1.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import aiohttp
import numpy as np

from rar.config import Ranker
from rar.ranker.answer import MAX_CHARS
from rar.ranker.completions import Fault, Refused, Reply, Server, data_url
from rar.ranker.debias import log_softmax
from rar.ranker.prompt import generate_prompt, letters_prompt
from rar.ranker.reply import parse
from rar.ranker.wording import LABELS, load_wording
from rar.schema import Ranking, RankStatus, Unavailable, UserError

TOP_LOGPROBS = 20  # the most that OpenAI's interface allows
PROBE_NAMES = ["grey square", "red circle"]
PROBE_TOKENS = 16
SORTING = 'Sort these from most to least like {picture}.\n{candidates}\nAnswer with all letters: {{"ranking": [letters]}}'

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
MARKUP = str.maketrans("<>[]", "‹›()")
QUOTED_LABEL = re.compile(r'"([A-Z])"')
AROUND_LABEL = " \t\n\"'(*▁Ġ"  # what tokenizers write before a label, and quotes


class Offers(NamedTuple):
    """What a server does beyond a plain question. renounced: fields of a plain question that it does not take."""

    logprobs: bool
    structured: bool
    renounced: frozenset[str] = frozenset()


class EndpointRanker:
    """Ranks candidates by a server. Raises UserError for settings that no endpoint can follow."""

    def __init__(self, settings: Ranker) -> None:
        for name, unset in (("adapter", None), ("quantization", "none"), ("exemplars", 0), ("debias", "none")):
            if getattr(settings, name) != unset:
                raise UserError(f"ranker.method 'endpoint' cannot follow ranker.{name}: leave it out, or use a local model")
        self.settings = settings
        self.wording = load_wording(settings.prompts)
        self.server = Server(settings)
        self.offers: Offers | None = None

    def rank(self, images: Sequence[np.ndarray], names: Sequence[Sequence[str]]) -> list[Ranking]:
        """Rank the candidates of each image, `in_flight` requests at a time.

        images: (H, W, 3) uint8 RGB, any sizes. names: the candidates' names of each image in retrieval order; rows may differ
        in number. Returns one Ranking a row. Where the server offers logprobs, scores has one log-probability a candidate
        among the candidates, averaged over `permutations`; a label outside the top 20 gets less than all inside, and its row
        is REPAIRED. Else the response is the server's text. Rows of one candidate are RANKED without a call.
        Raises UserError and, from the first call only, Unavailable.
        """
        asked = [row for row, listed in enumerate(names) if len(listed) > 1]
        shown = [[_harmless(name) for name in names[row]] for row in asked]
        answers = asyncio.run(self._rank([images[row] for row in asked], shown)) if asked else []
        rankings = dict(zip(asked, answers, strict=True))
        return [rankings.get(row) or self._trivial(len(listed)) for row, listed in enumerate(names)]

    def probe(self) -> Offers:
        """What the server offers, asked anew. Raises UserError (it takes no plain question) or Unavailable."""
        return asyncio.run(self._probed())

    def _trivial(self, count: int) -> Ranking:
        scores = (0.0,) * count if self.offers and self.offers.logprobs else ()  # the one candidate has probability 1
        return Ranking(tuple(range(count)), RankStatus.RANKED, scores)

    async def _rank(self, images: list[np.ndarray], names: list[list[str]]) -> list[Ranking]:
        self.offers = offers = self.offers or await self._probed()
        gate = asyncio.Semaphore(self.settings.in_flight)
        async with self.server.session() as session:

            async def one(image: np.ndarray, listed: list[str]) -> Ranking:
                async with gate:  # kept between tries, so that a busy server is asked less
                    return await self._ask(session, offers, data_url(image), listed)

            return await asyncio.gather(*(one(image, listed) for image, listed in zip(images, names, strict=True)))

    async def _probed(self) -> Offers:
        picture = data_url(np.full((224, 224, 3), 128, np.uint8))
        try:
            async with self.server.session() as session:
                offers = await self._plain_offers(session, picture)
                letters = await self._offered(session, self._letters_body(picture, PROBE_NAMES, offers))
                listed = await self._offered(session, self._sorting_body(picture, PROBE_NAMES, offers))
        except Fault as fault:
            tries = f"in {self.settings.attempts} attempts"
            raise Unavailable(f"the ranker's server {self.server.base_url} gave no answer {tries}: {fault}") from None
        labelled = letters is not None and any(score is not None for score in label_scores(letters.top, len(PROBE_NAMES)))
        structured = listed is not None and len(sorted_labels(listed.text, len(PROBE_NAMES))) == len(PROBE_NAMES)
        return offers._replace(logprobs=labelled, structured=structured)

    async def _plain_offers(self, session: aiohttp.ClientSession, picture: str) -> Offers:
        """A plain question must be answered, maybe without some field: newer models of OpenAI's take no max_tokens."""
        offers, text = Offers(False, False), generate_prompt(PROBE_NAMES, self.wording)
        while True:
            try:
                await self.server.send(session, self._body(picture, text, PROBE_TOKENS, offers))
                return offers
            except Refused as refusal:
                field = _named_field(str(refusal), offers)
                if field is None:
                    raise UserError(f"ranker: {self.server.base_url} takes no plain question: {refusal}") from None
                offers = offers._replace(renounced=offers.renounced | {field})

    async def _offered(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> Reply | None:
        try:
            return await self.server.send(session, body)
        except Refused:
            return None
        except Fault as fault:
            if fault.status != 500:
                raise
            return None  # how some servers meet a field that they do not know; they answered the plain question

    async def _ask(self, session: aiohttp.ClientSession, offers: Offers, picture: str, names: list[str]) -> Ranking:
        try:
            if offers.logprobs and len(names) + self.settings.none_of_these <= len(LABELS):
                return await self._letters(session, offers, picture, names)
            if offers.structured and len(names) <= len(LABELS):
                reply = await self.server.send(session, self._sorting_body(picture, names, offers))
                labels = sorted_labels(reply.text, len(names))
                return _ranking(*(_completed(labels, len(names)) if labels else parse(reply.text, names)), reply)
            body = self._body(picture, generate_prompt(names, self.wording), self.settings.max_new_tokens, offers)
            reply = await self.server.send(session, body)
            return _ranking(*parse(reply.text, names), reply)
        except (Fault, Refused) as reason:
            return Ranking(tuple(range(len(names))), RankStatus.FALLBACK, response=f"[{reason}]")

    async def _letters(self, session: aiohttp.ClientSession, offers: Offers, picture: str, names: list[str]) -> Ranking:
        count, extra = len(names), [self.wording.none_of_these] * self.settings.none_of_these
        turns = min(count, self.settings.permutations)
        total, none, found, replies = np.zeros(count), 0.0, [], []
        for shift in (turn * count // turns for turn in range(turns)):
            shown = [*names[shift:], *names[:shift], *extra]
            reply = await self.server.send(session, self._letters_body(picture, shown, offers))
            read = label_scores(reply.top, len(shown))
            logits = completed_scores(read, reply.top)
            total += np.roll(log_softmax(logits[:count]), shift)
            none += float(np.exp(log_softmax(logits)[count:]).sum()) / turns
            found += read
            replies.append(reply)
        usage = (turns, sum(reply.prompt_tokens for reply in replies), sum(reply.output_tokens for reply in replies))
        if not any(score is not None for score in found):
            return Ranking(tuple(range(count)), RankStatus.FALLBACK, (), replies[0].text[:MAX_CHARS], *usage)
        scores = log_softmax(total / turns)
        order = tuple(np.argsort(-scores, kind="stable").tolist())
        status = RankStatus.REPAIRED if None in found else RankStatus.RANKED
        response = f"{self.wording.none_of_these}: {none:.6f}" if extra else ""
        return Ranking(order, status, tuple(scores.tolist()), response, *usage)

    def _letters_body(self, picture: str, names: list[str], offers: Offers) -> dict[str, Any]:
        body = self._body(picture, letters_prompt(names, self.wording), 1, offers)
        return {**body, "logprobs": True, "top_logprobs": TOP_LOGPROBS}

    def _sorting_body(self, picture: str, names: list[str], offers: Offers) -> dict[str, Any]:
        body = self._body(picture, self._sorting_prompt(names), self.settings.max_new_tokens, offers)
        return {**body, "response_format": {"type": "json_schema", "json_schema": _sorting_schema(len(names))}}

    def _sorting_prompt(self, names: list[str]) -> str:
        """Candidates are listed as for `letters`; the answer is a JSON list of all labels."""
        return self.wording.render(self.wording.letters.model_copy(update={"ask": SORTING}), names)

    def _body(self, picture: str, text: str, max_tokens: int, offers: Offers) -> dict[str, Any]:
        parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": text}]
        tokens = "max_completion_tokens" if "max_tokens" in offers.renounced else "max_tokens"
        steady = {name: 0 for name in ("temperature", "seed") if name not in offers.renounced}
        return {"model": self.settings.model, "messages": [{"role": "user", "content": parts}], tokens: max_tokens, **steady}


def label_scores(top: Sequence[tuple[str, float]], count: int) -> list[float | None]:
    """Log-probability of each of the first `count` labels among the first token's alternatives; None where it is not there.

    "A" and " A" are two tokens of one label: their probabilities add up.
    """
    found: dict[str, float] = {}
    for token, score in top:
        label = token.strip(AROUND_LABEL)
        found[label] = float(np.logaddexp(found.get(label, -np.inf), score))
    return [found.get(label) for label in LABELS[:count]]


def completed_scores(found: Sequence[float | None], top: Sequence[tuple[str, float]]) -> np.ndarray:
    """(n,) logits of n labels. One outside the top is put at a nat below the least likely token inside."""
    floor = min((score for _, score in top), default=0.0) - 1
    return np.array([floor if score is None else score for score in found])


def sorted_labels(text: str, count: int) -> list[int]:
    """Positions of the quoted labels of a JSON reply, in order, each once; what was cut off is missing."""
    positions = (LABELS.index(label) for label in QUOTED_LABEL.findall(text))
    return list(dict.fromkeys(position for position in positions if position < count))


def _harmless(name: str) -> str:
    """A class name is data: one line, without what a server's tokenizer may read as <|special|> or [SPECIAL] tokens."""
    return " ".join(CONTROL.sub(" ", name).translate(MARKUP).split())


def _named_field(refusal: str, offers: Offers) -> str | None:
    """The first field that the server complains of and that can be left out (max_tokens: renamed)."""
    fields = ("max_tokens", "temperature", "seed")
    return next((name for name in fields if name not in offers.renounced and re.search(rf"\b{name}\b", refusal)), None)


def _sorting_schema(count: int) -> dict[str, Any]:
    listed = {"type": "array", "items": {"type": "string", "enum": list(LABELS[:count])}, "minItems": count, "maxItems": count}
    schema = {"type": "object", "properties": {"ranking": listed}, "required": ["ranking"], "additionalProperties": False}
    return {"name": "ranking", "strict": True, "schema": schema}


def _completed(order: list[int], count: int) -> tuple[tuple[int, ...], RankStatus]:
    rest = [position for position in range(count) if position not in order]
    return (*order, *rest), RankStatus.REPAIRED if rest else RankStatus.RANKED


def _ranking(order: tuple[int, ...], status: RankStatus, reply: Reply) -> Ranking:
    return Ranking(order, status, (), reply.text[:MAX_CHARS], 1, reply.prompt_tokens, reply.output_tokens)
