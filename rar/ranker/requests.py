"""What a server is sent: the ranking questions as bodies of chat completions, in the fields that it takes."""

from __future__ import annotations

from typing import Any, NamedTuple

from rar.config import Ranker
from rar.ranker.prompt import letters_prompt
from rar.ranker.wording import LABELS, Wording

TOP_LOGPROBS = 20  # the most that OpenAI's interface allows
SORTING = 'Sort these from most to least like {picture}.\n{candidates}\nAnswer with all letters: {{"ranking": [letters]}}'
DECIDING = "Which of these is in {picture}?"
STATE = "Look at {picture}."
RERANKING = "Find the name of what the picture shows."
DECISIONS = ("systemone", "decisions")  # of vLLM; of SGLang and those that follow it
SCORING = ("rerank", "score")  # Ray Serve LLM has no other than the second
QUESTION = "class"  # the id of a decision's one question
NO_THOUGHTS = {"chat_template_kwargs": {"enable_thinking": False}}


class Offers(NamedTuple):
    """What a server does beyond a plain question. renounced: fields of a plain question that it does not take.

    labels: the token ids of A, B, ... where it tells the log-probabilities of tokens by id. switch: it takes NO_THOUGHTS.
    decisions: the route where it labels options, asks and reads by itself. reranks: that where it answers no question, but
    scores each candidate against the picture. With either, logprobs is true as well.
    """

    logprobs: bool
    structured: bool
    renounced: frozenset[str] = frozenset()
    labels: tuple[tuple[int, ...], ...] = ()
    switch: bool = False
    decisions: str = ""
    reranks: str = ""

    @property
    def most_labels(self) -> int:
        return len(self.labels) or len(LABELS)


class Requests:
    """Bodies for one model and wording. A picture is a data: URL."""

    def __init__(self, settings: Ranker, wording: Wording) -> None:
        self.settings, self.wording = settings, wording

    def plain(self, picture: str, text: str, max_tokens: int, offers: Offers) -> dict[str, Any]:
        parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": text}]
        tokens = "max_completion_tokens" if "max_tokens" in offers.renounced else "max_tokens"
        steady = {name: 0 for name in ("temperature", "seed") if name not in offers.renounced}
        body = {"model": self.settings.model, "messages": [{"role": "user", "content": parts}], tokens: max_tokens, **steady}
        return body | (NO_THOUGHTS if offers.switch else {})

    def letters(self, picture: str, names: list[str], offers: Offers) -> dict[str, Any]:
        """One token, with the log-probabilities of the labels shown, or of the likeliest tokens."""
        body = self.plain(picture, letters_prompt(names, self.wording), 1, offers) | {"logprobs": True}
        if not offers.labels:
            return body | {"top_logprobs": TOP_LOGPROBS}
        ids = [token for forms in offers.labels[: len(names)] for token in forms]
        return body | {"logprob_token_ids": ids, "return_tokens_as_token_ids": True}

    def decision(self, route: str, picture: str, names: list[str]) -> dict[str, Any]:
        """For a route of DECISIONS. The options must differ; the server words their list and turns thoughts off."""
        asked = DECIDING.format(picture=self.wording.picture)
        if route == "systemone":
            question: Any = {QUESTION: {"type": "choice", "criteria": dict.fromkeys(names)}}
            return {"model": self.settings.model, "state": asked, "images": [picture], "questions": question}
        question = [{"id": QUESTION, "type": "choice", "question": asked, "options": [{"name": name} for name in names]}]
        state = STATE.format(picture=self.wording.picture)
        return {"model": self.settings.model, "input": state, "images": [{"url": picture}], "questions": question}

    def reranking(self, route: str, picture: str, names: list[str]) -> dict[str, Any]:
        """For a route of SCORING. How a pair is put to the model is the template's that the server was started with."""
        query, documents = {"rerank": ("query", "documents"), "score": ("text_1", "text_2")}[route]
        shown = {"content": [{"type": "image_url", "image_url": {"url": picture}}]}
        return {"model": self.settings.model, query: shown, documents: names, "instruction": RERANKING}

    def sorting(self, picture: str, names: list[str], offers: Offers) -> dict[str, Any]:
        """Candidates are listed as for `letters`; the answer is a JSON list of all labels."""
        text = self.wording.render(self.wording.letters.model_copy(update={"ask": SORTING}), names)
        body = self.plain(picture, text, self.settings.max_new_tokens, offers)
        return body | {"response_format": {"type": "json_schema", "json_schema": _sorting_schema(len(names))}}


def _sorting_schema(count: int) -> dict[str, Any]:
    listed = {"type": "array", "items": {"type": "string", "enum": list(LABELS[:count])}, "minItems": count, "maxItems": count}
    schema = {"type": "object", "properties": {"ranking": listed}, "required": ["ranking"], "additionalProperties": False}
    return {"name": "ranking", "strict": True, "schema": schema}
