"""What a server offers, found out by asking: some accept a field and ignore it, and none says so.

The same small questions whatever the corpus, so that every worker finds the same. First a plain question, maybe without some
field (newer models of OpenAI's take no max_tokens); then, each on its own, the switch that turns thoughts off, the
log-probabilities of the labels' tokens by id, decisions, the log-probabilities of the likeliest tokens, and structured output.
Labels are on offer only where they hold some of the probability of the first token: a model that thinks first, switch or not,
is asked in words.

A server that decides is shown two pictures: one whose answers are the same has not looked at them, as some take pictures and
read the text alone. A server that refuses plain questions altogether may serve a reranker, and is asked for a reranking.

The labels' ids come from the server's own /tokenize, after the tail of a rendered prompt; where it has none, from the tokenizer
of `ranker.tokenizer` (or of a model that is a local folder).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from rar.config import Ranker
from rar.ranker.labels import LEAST_MASS, Read, label_forms, label_texts
from rar.ranker.prompt import generate_prompt
from rar.ranker.readings import label_read, label_scores, read_decision, read_relevance, sorted_labels
from rar.ranker.requests import DECISIONS, NO_THOUGHTS, QUESTION, SCORING, Offers, Requests
from rar.ranker.servers import Servers
from rar.ranker.wire import Fault, Refused, data_url, read_reply
from rar.schema import Unavailable, UserError, first_line

NAMES = ["grey square", "red circle"]
TOKENS = 16
NOISE = 1e-4  # by which the shares of a decision differ when nothing does
TAIL = 8  # tokens of a rendered prompt, after which labels are looked up
PLAIN_TAIL = "\n"  # where a server renders no prompts


class Probe:
    """Of one server or several equal ones. Raises what Servers.post raises, but for an offer that is only not there."""

    def __init__(self, settings: Ranker, servers: Servers, requests: Requests, session: aiohttp.ClientSession) -> None:
        self.settings, self.servers, self.requests, self.session = settings, servers, requests, session
        self.picture = data_url(np.full((224, 224, 3), 128, np.uint8))
        self.other = data_url(np.full((224, 224, 3), (0, 0, 255), np.uint8))

    async def offers(self) -> Offers:
        """Raises UserError (it takes no plain question) or Unavailable."""
        try:
            return await self._offers()
        except Fault as fault:
            tries = f"in {self.settings.attempts} attempts"
            raise Unavailable(f"the ranker's server {self.servers.name} gave no answer {tries}: {fault}") from None

    async def _offers(self) -> Offers:
        try:
            offers = await self._plain()
        except UserError:
            if route := await self._reranks():
                return Offers(logprobs=True, structured=False, reranks=route)
            raise
        switched = offers._replace(switch=True)
        if await self._offered(self._question(switched), read_reply):
            offers = switched
        forms = await self._forms(offers)
        if len(forms) >= len(NAMES) and await self._tells_labels(offers._replace(labels=forms)):
            offers = offers._replace(logprobs=True, labels=forms)
        elif route := await self._decides():
            offers = offers._replace(logprobs=True, decisions=route)
        else:
            offers = offers._replace(logprobs=await self._tells_labels(offers))
        listed = await self._offered(self.requests.sorting(self.picture, NAMES, offers), read_reply)
        return offers._replace(structured=listed is not None and len(sorted_labels(listed.text, len(NAMES))) == len(NAMES))

    def _question(self, offers: Offers) -> dict[str, Any]:
        return self.requests.plain(self.picture, generate_prompt(NAMES, self.requests.wording), TOKENS, offers)

    async def _plain(self) -> Offers:
        offers = Offers(False, False)
        while True:
            try:
                await self.servers.post(self.session, self._question(offers), read_reply)
                return offers
            except Refused as refusal:
                field = _named_field(str(refusal), offers)
                if field is None:
                    raise UserError(f"ranker: {self.servers.name} takes no plain question: {refusal}") from None
                offers = offers._replace(renounced=offers.renounced | {field})

    async def _tells_labels(self, offers: Offers) -> bool:
        """By id, all of those there are must be told, whatever limit there is on the likeliest ones."""
        body = self.requests.letters(self.picture, NAMES, offers)
        if offers.labels:
            body["logprob_token_ids"] = [token for ids in offers.labels for token in ids]
        reply = await self._offered(body, read_reply)
        if reply is None:
            return False
        told = label_scores(reply.top, offers.most_labels, offers.labels)
        if offers.labels and None in told:
            return False
        return label_read(reply.top, len(NAMES), offers.labels).mass >= LEAST_MASS

    async def _reranks(self) -> str:
        """Where a server that answers no questions scores names against a picture; maybe nowhere."""

        def scored(data: bytes) -> bool:
            with contextlib.suppress(Fault):
                return len(read_relevance(data, len(NAMES))[0]) == len(NAMES)
            return False

        for route in SCORING:
            if await self._offered(self.requests.reranking(route, self.picture, NAMES), scored, route):
                return route
        return ""

    async def _decides(self) -> str:
        """Where the server reads labelled options itself, and puts some of the first token's probability on them."""

        def read(data: bytes) -> Read | None:
            with contextlib.suppress(Fault):  # some answer 200 on any path
                return read_decision(data, QUESTION, NAMES)[0]
            return None

        async def decided(route: str, picture: str) -> Read | None:
            return await self._offered(self.requests.decision(route, picture, NAMES), read, route)

        for route in DECISIONS:
            one = await decided(route, self.picture)
            if one is None or one.mass < LEAST_MASS:
                continue
            other = await decided(route, self.other)
            if other is not None and np.abs(np.exp(one.logprobs) - np.exp(other.logprobs)).max() > NOISE:
                return route
        return ""

    async def _forms(self, offers: Offers) -> tuple[tuple[int, ...], ...]:
        """Token ids of the labels; maybe none."""
        asked = {"messages": [{"role": "user", "content": [{"type": "text", "text": "?"}]}], "add_generation_prompt": True}
        rendered = await self._look_up("/tokenize", "tokens", {**asked, **(NO_THOUGHTS if offers.switch else {})})
        tail: Any = PLAIN_TAIL
        if _are_ids(rendered):
            tail = await self._look_up("/detokenize", "prompt", {"tokens": rendered[-TAIL:]})
            tail = tail if isinstance(tail, str) else PLAIN_TAIL
        if not _are_ids(await self._look_up("/tokenize", "tokens", {"prompt": tail, "add_special_tokens": False})):
            return self._local_forms(offers)
        texts = label_texts(tail)
        asking = (self._look_up("/tokenize", "tokens", {"prompt": text, "add_special_tokens": False}) for text in texts)
        found = dict(zip(texts, await asyncio.gather(*asking), strict=True))
        return tuple(label_forms(found, tail)) if all(map(_are_ids, found.values())) else ()

    async def _look_up(self, path: str, key: str, body: dict[str, Any]) -> Any:
        """One value of a JSON answer; None for anything else."""

        def read(data: bytes) -> Any:
            try:
                answer = json.loads(data)
            except (ValueError, RecursionError):
                return None
            return answer.get(key) if isinstance(answer, dict) else None

        return await self._offered({"model": self.settings.model, **body}, read, path)

    async def _offered(self, body: dict[str, Any], read: Any, path: str | None = None) -> Any:
        try:
            return await self.servers.post(self.session, body, read, *([path] if path else []))
        except Refused:
            return None
        except Fault as fault:
            if fault.status != 500:
                raise
            return None  # how some servers meet a field that they do not know; they answered the plain question

    def _local_forms(self, offers: Offers) -> tuple[tuple[int, ...], ...]:
        name = self.settings.tokenizer or (self.settings.model if Path(self.settings.model).is_dir() else None)
        if name is None:
            return ()
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=Path(name).is_dir())
            tail = _rendered(tokenizer, offers)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"ranker.tokenizer {name!r} cannot be loaded: {first_line(error)}") from None
        texts = label_texts(tail)
        found = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return tuple(label_forms(dict(zip(texts, found, strict=True)), tail, unknown=tokenizer.unk_token_id))


def _rendered(tokenizer: Any, offers: Offers) -> str:
    """A prompt as the tokenizer's chat template has it; the plain tail without a template."""
    if not tokenizer.chat_template:
        return PLAIN_TAIL
    thoughts = NO_THOUGHTS["chat_template_kwargs"] if offers.switch else {}
    turn = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False, **thoughts)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int and one >= 0 for one in value)


def _named_field(refusal: str, offers: Offers) -> str | None:
    """The first field that the server complains of and that can be left out (max_tokens: renamed)."""
    fields = ("max_tokens", "temperature", "seed")
    return next((name for name in fields if name not in offers.renounced and re.search(rf"\b{name}\b", refusal)), None)
