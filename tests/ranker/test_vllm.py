"""Ranking by vLLM; `tests/vllm_cpu.sh FOLDER` makes its place; RAR_VLLM=FOLDER pytest -m server tests/ranker/test_vllm.py.

Not covered: GPUs, other engines, models of any use.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rar import miniature
from rar.config import Ranker
from rar.ranker.endpoint import EndpointRanker
from rar.ranker.rank import MllmRanker
from rar.ranker.readings import read_decision, read_relevance
from rar.ranker.requests import QUESTION

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif("RAR_VLLM" not in os.environ, reason="needs RAR_VLLM, a folder made by tests/vllm_cpu.sh"),
]
PATIENCE_S = 1200  # a start loads torch in three processes


class Vllm:
    """A model in a vLLM process, in float32 as the local ranker has it."""

    def __init__(self, log: Path, model: Path = miniature.MLLM, options: Sequence[str] = ()) -> None:
        self.log, self.model, self.options = log, model, options
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        program = Path(os.environ["RAR_VLLM"]) / "bin" / "vllm"
        options = ["--port", str(self.port), "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "1024"]
        options += ["--enforce-eager"]  # compiling takes longer than all questions here
        memory = ["--gpu-memory-utilization", "0.15"]  # of the machine's, on a CPU
        with self.log.open("w") as output:
            command = [str(program), "serve", str(self.model), *options, *self.options, *memory]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except OSError:
                time.sleep(1)
        pytest.fail(f"vLLM did not start:\n{self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    engine = Vllm(tmp_path_factory.mktemp("vllm") / "log.txt")
    try:
        engine.start()
        yield engine
    finally:
        engine.stop()


def endpoint(engine: Vllm, **settings: object) -> EndpointRanker:
    given = {"method": "endpoint", "model": str(miniature.MLLM), "base_url": engine.url, "timeout_s": 120, **settings}
    return EndpointRanker(Ranker.model_validate(given))


def photos(world: Path, count: int, candidates: int) -> tuple[list[np.ndarray], list[list[str]]]:
    """Photos of the drawn world, each with names of as many classes, its own among them."""
    files = sorted((world / "seen" / "test").rglob("*.png"))
    labels = [file.parent.name for file in files]
    random = np.random.default_rng(0)
    images, names = [], []
    for row in random.permutation(len(files))[:count]:
        others = [labels[other] for other in random.permutation(len(files)) if labels[other] != labels[row]]
        listed = [labels[row], *dict.fromkeys(others)][:candidates]
        images.append(np.array(Image.open(files[row]).convert("RGB")))
        names.append([listed[place] for place in random.permutation(len(listed))])
    return images, names


def test_label_tokens_rank_as_local_letters_do(vllm: Vllm, world: Path) -> None:
    """Five candidates by two rotations, and 26 in one prefill, which the likeliest 20 tokens could not tell. 64 in flight."""
    for count, candidates, permutations in ((100, 5, 2), (12, 26, 1)):
        images, names = photos(world, count, candidates)
        asker = endpoint(vllm, permutations=permutations)
        theirs = asker.rank(images, names)
        local = MllmRanker(Ranker(method="letters", device="cpu", permutations=permutations), str(miniature.MLLM))
        ours = local.rank(images, names)
        assert asker.offers is not None and len(asker.offers.labels) == 26
        worst = max(float(np.abs(np.subtract(a.scores, b.scores)).max()) for a, b in zip(theirs, ours, strict=True))
        print(f"{count} x {candidates}: log-probabilities differ by at most {worst:.1e}")
        assert worst < 1e-3
        assert [one.order[0] for one in theirs] == [one.order[0] for one in ours]
        assert [one.status for one in theirs] == [one.status for one in ours]
        masses = zip(theirs, ours, strict=True)
        assert max(abs((one.label_mass or 0) - (other.label_mass or 0)) for one, other in masses) < 1e-3
        assert all(one.label_first == other.label_first for one, other in zip(theirs, ours, strict=True))


def test_thirty_candidates_go_by_free_text(vllm: Vllm, world: Path) -> None:
    images, names = photos(world, 4, 30)
    rankings = endpoint(vllm).rank(images, names)
    assert all(sorted(one.order) == list(range(30)) and one.calls == 1 and not one.scores for one in rankings)


DECISION_MODELS = """
import json, sys
from vllm.entrypoints.pooling.scoring.protocol import RerankRequest, RerankResponse, RerankResult, RerankUsage
from vllm.entrypoints.generate.structured_decisions.protocol import StructuredDecisionRequest
from vllm.entrypoints.generate.structured_decisions.question_types import build_question
decision, reranking = json.loads(sys.stdin.read())
request = StructuredDecisionRequest.model_validate(decision)
((qid, asked),) = request.questions.items()
question = build_question(qid, asked.type, asked.instructions, asked.criteria, 26)
said = question.type.answer(question, [0.5, 0.3, 0.2], 0.8)
pairs = RerankRequest.model_validate(reranking)
documents = [{"text": name} for name in pairs.documents]
results = [RerankResult(index=place, document=documents[place], relevance_score=0.9 - place / 10) for place in (0, 2, 1)]
ranked = RerankResponse(id="1", model="m", usage=RerankUsage(prompt_tokens=7, total_tokens=7), results=results).model_dump()
told = [request.state, question.type.prompt(question), qid, said, len(request.images), asked.model_extra or {}]
print(json.dumps([*told, ranked, pairs.chat_template_kwargs, pairs.model_extra or {}]))
"""


def test_decisions_and_rerankings_are_asked_and_read_as_vllm_means_them() -> None:
    """By vLLM's own types in its environment: no model that it decides with is small enough to be served here."""
    asker = endpoint(Vllm(Path()))
    names = ["a red ring", "a blue star: odd", 'a "green" cross']
    picture = "data:image/png;base64,AA=="
    body = json.dumps(
        [asker.requests.decision("systemone", picture, names), asker.requests.reranking("rerank", picture, names)]
    )
    program = [str(Path(os.environ["RAR_VLLM"]) / "bin" / "python"), "-c", DECISION_MODELS]
    told = subprocess.run(program, input=body, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    state, prompt, qid, answer, images, unknown, reranked, kwargs, more = json.loads(told)
    assert (state, images, unknown) == ("Which of these is in the picture?", 1, {})
    assert prompt.splitlines()[:3] == [f"{label}: {name}" for label, name in zip("ABC", names, strict=True)]
    reply = {"answers": {qid: answer}, "diagnostics": {qid: {"label_mass": 0.8, "argmax_is_label": True}}, "usage": {}}
    read, _ = read_decision(json.dumps(reply).encode(), QUESTION, names)
    assert np.exp(read.logprobs) == pytest.approx([0.4, 0.24, 0.16]) and read.mass == 0.8 and read.first
    odds, tokens = read_relevance(json.dumps(reranked).encode(), len(names))
    assert 1 / (1 + np.exp(-odds)) == pytest.approx([0.9, 0.8, 0.7]) and tokens == 7
    assert list(kwargs) == ["instruction"] and not more


def test_an_engine_that_is_killed_and_started_again_is_found(vllm: Vllm, world: Path) -> None:
    asker = endpoint(vllm, attempts=30)
    images, names = photos(world, 4, 5)
    before = asker.rank(images, names)
    vllm.process.kill()
    vllm.process.wait()
    vllm.start()
    after = asker.rank(images, names)
    assert [one.order for one in after] == [one.order for one in before]
