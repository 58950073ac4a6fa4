"""The ranker behind OpenAI-compatible servers (vLLM, SGLang, Ray Serve LLM, `transformers serve`, hosted models).

Servers differ in what they offer, so they are asked first (see probe). Then each image is asked in the best way on offer:
labelled candidates whose token ids' log-probabilities are told, up to 26 of them in one prefill; a decision (/v1/systemone of
vLLM, /v1/decisions of SGLang: the server labels the candidates and reads its model itself); labels by the likeliest 20 tokens;
structured output (a JSON list of labels; labels, as a grammar of names would be compiled anew for every image); free text read
by `prompt.parse`. More candidates than labels go by free text. A server of a reranker (/v1/rerank, or /v1/score alone), which
answers no question, scores each candidate. A probe costs some nine calls and, where the server tokenizes, some fifty look-ups;
it is not counted in any Ranking.

A server that is away when it is first asked is Unavailable, and so are servers of which none listens any more after `attempts`
tries: what was ranked is kept, and a resumed run goes on. An image that cannot be sent, or whose request was refused or failed
as often otherwise, is a FALLBACK with the reason in brackets as its response and calls = 0; a reply that nobody can read has
calls = 1.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import aiohttp
import numpy as np

from rar.config import Ranker
from rar.ranker.answer import MAX_CHARS
from rar.ranker.debias import log_softmax
from rar.ranker.labels import Read, judged
from rar.ranker.probe import Probe
from rar.ranker.prompt import generate_prompt
from rar.ranker.readings import label_read, label_scores, read_decision, read_relevance, sorted_labels
from rar.ranker.reply import parse
from rar.ranker.requests import QUESTION, Offers, Requests
from rar.ranker.servers import Servers
from rar.ranker.wire import Away, Fault, Refused, Reply, data_url, read_reply
from rar.ranker.wording import LABELS, load_wording
from rar.schema import Ranking, RankStatus, Unavailable, UserError, first_line

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
MARKUP = str.maketrans("<>[]", "‹›()")


class EndpointRanker:
    """Ranks candidates by servers. Raises UserError for settings that no endpoint can follow."""

    def __init__(self, settings: Ranker, offers: Offers | None = None) -> None:
        """offers: of `probe`, where somebody has probed; else the first call does."""
        for name, unset in (("adapter", None), ("quantization", "none"), ("exemplars", 0), ("debias", "none")):
            if getattr(settings, name) != unset:
                raise UserError(f"ranker.method 'endpoint' cannot follow ranker.{name}: leave it out, or use a local model")
        self.settings = settings
        self.wording = load_wording(settings.prompts)
        self.requests = Requests(settings, self.wording)
        self.servers = Servers(settings)
        self.offers = offers

    def rank(self, images: Sequence[np.ndarray], names: Sequence[Sequence[str]]) -> list[Ranking]:
        """Rank the candidates of each image, with as many requests in flight as the servers keep up with.

        images: (H, W, 3) uint8 RGB, any sizes. names: the candidates' names of each image in retrieval order; rows may differ
        in number. Returns one Ranking a row. Where the servers offer logprobs, scores has one log-probability a candidate
        among the candidates, averaged over `permutations`, and the labels' mass decides the status (`labels.judged`); a label
        outside the top 20 gets less than all inside, and its row is REPAIRED. Else the response is the server's text. Rows of
        one candidate are RANKED without a call. Raises UserError and Unavailable.
        """

        async def run() -> list[Ranking]:
            async with self.servers.session() as session:
                return await self.ranked(session, images, names)

        return asyncio.run(run())

    async def ranked(
        self, session: aiohttp.ClientSession, images: Sequence[np.ndarray], names: Sequence[Sequence[str]]
    ) -> list[Ranking]:
        """`rank` in a session that is kept."""
        asked = [row for row, listed in enumerate(names) if len(listed) > 1]
        if asked:
            self.offers = self.offers or await Probe(self.settings, self.servers, self.requests, session).offers()
        gate = asyncio.Semaphore(2 * self.settings.concurrency * len(self.servers.each))  # of encoded pictures in memory

        async def one(row: int) -> Ranking:
            async with gate:
                return await self._ask(session, images[row], [_harmless(name) for name in names[row]])

        asking = [asyncio.create_task(one(row)) for row in asked]
        try:
            rankings = dict(zip(asked, await asyncio.gather(*asking), strict=True))
        finally:
            for task in asking:  # one that raised ends the others, which the session outlives
                task.cancel()
        return [rankings.get(row) or self._trivial(len(listed)) for row, listed in enumerate(names)]

    def probe(self) -> Offers:
        """What the server offers, asked anew. Raises UserError (it takes no plain question) or Unavailable."""

        async def run() -> Offers:
            async with self.servers.session() as session:
                return await Probe(self.settings, self.servers, self.requests, session).offers()

        return asyncio.run(run())

    def _trivial(self, count: int) -> Ranking:
        scores = (0.0,) * count if self.offers and self.offers.logprobs else ()  # the one candidate has probability 1
        return Ranking(tuple(range(count)), RankStatus.RANKED, scores)

    async def _ask(self, session: aiohttp.ClientSession, image: np.ndarray, names: list[str]) -> Ranking:
        assert self.offers is not None
        offers, requests = self.offers, self.requests
        try:
            picture = await asyncio.to_thread(data_url, image)  # once, for all rotations; encoders let other threads run
            if offers.reranks:
                return await self._reranked(session, offers.reranks, picture, names)
            shown = [*names, *[self.wording.none_of_these] * self.settings.none_of_these]
            differ = len({name.casefold() for name in shown}) == len(shown) or not offers.decisions
            if offers.logprobs and differ and len(shown) <= offers.most_labels:
                return await self._letters(session, offers, picture, names)
            if offers.structured and len(names) <= len(LABELS):
                reply = await self._reply(session, requests.sorting(picture, names, offers))
                labels = sorted_labels(reply.text, len(names))
                return _ranking(*(_completed(labels, len(names)) if labels else parse(reply.text, names)), reply)
            text = generate_prompt(names, self.wording)
            reply = await self._reply(session, requests.plain(picture, text, self.settings.max_new_tokens, offers))
            return _ranking(*parse(reply.text, names), reply)
        except Away as away:
            if self.servers.away:
                raise Unavailable(f"nobody listens at the ranker's server {self.servers.name} any more: {away}") from None
            return _unasked(len(names), away)
        except (Fault, Refused) as reason:
            return _unasked(len(names), reason)
        except (UserError, Unavailable):
            raise
        except Exception as error:  # a picture that cannot be encoded costs its own row; the others' calls are paid for
            return _unasked(len(names), f"{type(error).__name__}: {first_line(error)}")

    async def _letters(self, session: aiohttp.ClientSession, offers: Offers, picture: str, names: list[str]) -> Ranking:
        """All rotations; the first alone, so that the others find the picture, which all prompts begin with, in its cache."""
        count, extra = len(names), [self.wording.none_of_these] * self.settings.none_of_these
        turns = min(count, self.settings.permutations)
        shifts = [turn * count // turns for turn in range(turns)]
        lists = [[*names[shift:], *names[:shift], *extra] for shift in shifts]
        answers = [await self._labels(session, offers, picture, lists[0])]
        answers += await asyncio.gather(*(self._labels(session, offers, picture, listed) for listed in lists[1:]))
        reads, replies = zip(*answers, strict=True)
        total = sum(np.roll(log_softmax(read.logprobs[:count]), shift) for read, shift in zip(reads, shifts, strict=True))
        none = float(np.mean([np.exp(log_softmax(read.logprobs)[count:]).sum() for read in reads]))
        scores = log_softmax(np.asarray(total) / turns)
        told = [label_scores(reply.top, count + len(extra), offers.labels) for reply in replies]
        missing = not offers.decisions and any(None in scores for scores in told)
        usage = (turns, sum(reply.prompt_tokens for reply in replies), sum(reply.output_tokens for reply in replies))
        ranking = judged(
            Ranking(
                tuple(np.argsort(-scores, kind="stable").tolist()),
                RankStatus.REPAIRED if missing else RankStatus.RANKED,
                tuple(scores.tolist()),
                f"{self.wording.none_of_these}: {none:.6f}" if extra else "",
                *usage,
            ),
            reads,
        )
        silent = ranking.status == RankStatus.FALLBACK
        return replace(ranking, response=replies[0].text[:MAX_CHARS]) if silent else ranking

    async def _reranked(self, session: aiohttp.ClientSession, route: str, picture: str, names: list[str]) -> Ranking:
        """Relevances as logits of a softmax over the candidates, as `yes_no` has them; the server prefills each pair."""
        read = partial(read_relevance, places=len(names))
        odds, tokens = await self.servers.post(session, self.requests.reranking(route, picture, names), read, route)
        order, scores = np.argsort(-odds, kind="stable"), log_softmax(odds)
        return Ranking(tuple(order.tolist()), RankStatus.RANKED, tuple(scores.tolist()), "", len(names), tokens, 0)

    async def _labels(
        self, session: aiohttp.ClientSession, offers: Offers, picture: str, names: list[str]
    ) -> tuple[Read, Reply]:
        if offers.decisions:
            read = partial(read_decision, question=QUESTION, names=names)
            body = self.requests.decision(offers.decisions, picture, names)
            return await self.servers.post(session, body, read, offers.decisions)
        reply = await self._reply(session, self.requests.letters(picture, names, offers))
        return label_read(reply.top, len(names), offers.labels), reply

    async def _reply(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> Reply:
        return await self.servers.post(session, body, read_reply)


def _harmless(name: str) -> str:
    """A class name is data: one line, without what a server's tokenizer may read as <|special|> or [SPECIAL] tokens."""
    return " ".join(CONTROL.sub(" ", name).translate(MARKUP).split())


def _completed(order: list[int], count: int) -> tuple[tuple[int, ...], RankStatus]:
    rest = [position for position in range(count) if position not in order]
    return (*order, *rest), RankStatus.REPAIRED if rest else RankStatus.RANKED


def _ranking(order: tuple[int, ...], status: RankStatus, reply: Reply) -> Ranking:
    return Ranking(order, status, (), reply.text[:MAX_CHARS], 1, reply.prompt_tokens, reply.output_tokens)


def _unasked(count: int, reason: Exception | str) -> Ranking:
    return Ranking(tuple(range(count)), RankStatus.FALLBACK, response=f"[{reason}]")
