"""Scores of a reranker behind a server against the model's own way to ask, in transformers, with a tiny random Qwen3-VL.

The server here renders our template and reads "yes" against "no" as vLLM's pooling does; with -m server, vLLM itself.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image

from rar.config import Ranker
from rar.ranker.debias import log_softmax
from rar.ranker.endpoint import EndpointRanker
from rar.ranker.requests import RERANKING, SCORING
from tests.chat_server import Response, decoded, no_such_page, serving
from tests.ranker.test_vllm import Vllm
from tests.tiny_mllm import QWEN_TOKENS, id_of, save_qwen3, word_tokenizer

TEMPLATE = Path(__file__).parents[2] / "rar" / "ranker" / "qwen3_vl_reranker.jinja"
SHOWN = "<|vision_start|><|image_pad|><|vision_end|>"
TURNS = ("<|im_start|>", "<|im_end|>")
SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that the answer can "
    'only be "yes" or "no".'
)
NAMES = ["a red cat", "a big blue dog", "the green bird, small"]


def asked(name: str) -> str:
    """The chat of the model card's code: two system and user turns, the picture where the query stands."""
    user = f"<Instruct>: {RERANKING}<Query>:{SHOWN}\n<Document>:{name}"
    return f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


def rendered(name: str, **given: str) -> str:
    """By our template, as vLLM fills it."""
    said = [{"role": "query", "content": SHOWN}, {"role": "document", "content": name}]
    return jinja2.Environment().from_string(TEMPLATE.read_text()).render(messages=said, **given)


class Scorer:
    """A tiny Qwen3-VL. Its words are those of the prompt, so that no other wording has the same tokens."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(3)
        words = re.findall(r"\w+|[^\w\s]+", "".join(map(asked, NAMES)))
        self.folder = save_qwen3(folder, word_tokenizer(words, extra=(*QWEN_TOKENS, *TURNS)), head=32, window=1024)
        self.processor = tf.AutoProcessor.from_pretrained(folder)
        self.model = tf.Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def odds(self, text: str, picture: np.ndarray) -> float:
        """log p(yes) - log p(no) of the reply's first token."""
        inputs = self.processor(text=[text], images=[Image.fromarray(picture)], return_tensors="pt")
        logits = self.model(**inputs).logits[0, -1]
        yes, no = (id_of(self.processor.tokenizer, word) for word in ("yes", "no"))
        return float(logits[yes] - logits[no])

    def route(self, query: str, documents: str, told: Callable[[int, float], dict[str, Any]], listed: str) -> Any:
        """A scoring route of vLLM's shape."""

        def answer(body: dict[str, Any]) -> Response:
            picture = decoded(body[query]["content"][0]["image_url"]["url"])
            found = []
            for place, name in enumerate(body[documents]):
                odds = self.odds(rendered(name, instruction=body["instruction"]), picture)
                found.append(told(place, 1 / (1 + float(np.exp(-odds)))))
            usage = {"prompt_tokens": 9, "total_tokens": 9}
            return Response(json.dumps({listed: found, "usage": usage}).encode())

        return answer


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    return Scorer(tmp_path_factory.mktemp("reranker"))


def pictures() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (80, 64, 3), dtype=np.uint8) for _ in range(3)]


def agree(scorer: Scorer, asker: EndpointRanker) -> float:
    """The largest difference of a log-probability from the model's own."""
    found = asker.rank(pictures(), [NAMES] * 3)
    right = np.array([log_softmax(np.array([scorer.odds(asked(name), one) for name in NAMES])) for one in pictures()])
    assert np.ptp(right, axis=0).max() > 0.01 and np.ptp(right, axis=1).max() > 0.01  # picture and name both count
    assert [one.order[0] for one in found] == right.argmax(axis=1).tolist()
    return float(np.abs(np.array([one.scores for one in found]) - right).max())


def test_the_template_is_the_models_to_the_letter() -> None:
    assert [rendered(name, instruction=RERANKING) for name in NAMES] == [asked(name) for name in NAMES]
    assert "<Instruct>: Given a search query, retrieve relevant candidates that answer the query.<Query>:" in rendered("a")


@pytest.mark.parametrize("route", SCORING)
def test_scores_are_those_of_the_models_own_way_to_ask(scorer: Scorer, route: str) -> None:
    with serving() as server:
        server.answer = no_such_page
        reranked = ("query", "documents", lambda place, score: {"index": place, "relevance_score": score}, "results")
        scored = ("text_1", "text_2", lambda place, score: {"index": place, "score": score}, "data")
        setattr(server, route, scorer.route(*{"rerank": reranked, "score": scored}[route]))
        asker = EndpointRanker(Ranker(method="endpoint", model="reranker", base_url=server.url, attempts=1))
        asker.offers = asker.probe()
        assert asker.offers.reranks == route
        assert agree(scorer, asker) < 1e-4


@contextmanager
def vllm_reranker(scorer: Scorer, log: Path) -> Iterator[Vllm]:
    overrides = {"architectures": ["Qwen3VLForSequenceClassification"], "classifier_from_token": ["no", "yes"]}
    pooling = ["--runner", "pooling", "--chat-template", str(TEMPLATE)]
    pooling += ["--hf-overrides", json.dumps({**overrides, "is_original_qwen3_reranker": True})]
    engine = Vllm(log, scorer.folder, pooling)
    try:
        engine.start()
        yield engine
    finally:
        engine.stop()


@pytest.mark.server
@pytest.mark.skipif("RAR_VLLM" not in os.environ, reason="needs RAR_VLLM, a folder made by tests/vllm_cpu.sh")
def test_vllm_scores_as_the_model_is_meant_to(scorer: Scorer, tmp_path: Path) -> None:
    with vllm_reranker(scorer, tmp_path / "log.txt") as engine:
        asker = EndpointRanker(Ranker(method="endpoint", model=str(scorer.folder), base_url=engine.url, timeout_s=120))
        asker.offers = asker.probe()
        assert asker.offers.reranks == "rerank"
        worst = agree(scorer, asker)
        print(f"log-probabilities differ by at most {worst:.1e}")
        assert worst < 1e-3
