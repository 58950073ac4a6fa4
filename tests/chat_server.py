"""An OpenAI-compatible server for tests: a real HTTP server that sees colours, offers what it is told to, and can misbehave."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from rar.ranker.wording import LABELS

COLOURS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220)}
NAMES = ["a blue cup", "a red cup", "a green cup"]
BEST = {"red": 1, "green": 2, "blue": 0}
EVERYTHING = {"logprobs", "response_format"}


def picture(colour: str, side: int = 24) -> np.ndarray:
    return np.full((side, side, 3), COLOURS[colour], np.uint8)


class Response(NamedTuple):
    """What the server does with a request. drip_s: seconds between single bytes of the body; drop: hang up without a word;
    reset_after: bytes of the body after which the connection is reset.
    """

    body: bytes
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    wait_s: float = 0.0
    drip_s: float = 0.0
    drop: bool = False
    reset_after: int | None = None


Answer = Callable[[dict[str, Any]], Response]


class Server(ThreadingHTTPServer):
    """Answers by `answer`, and keeps what it was sent: (time, headers, body)."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        super().__init__(address, Handler)
        self.answer: Answer = colour_model()
        self.tokenize: Answer = no_such_page
        self.decide: Answer = no_such_page
        self.decisions: Answer = no_such_page
        self.rerank: Answer = no_such_page
        self.score: Answer = no_such_page
        self.decided: list[dict[str, Any]] = []
        self.seen: list[tuple[float, dict[str, str], dict[str, Any]]] = []
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_: Any) -> None:
        """A client that hung up is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement of its head
    server: Server

    def do_GET(self) -> None:
        self.reply(Response(b"", 200 if self.path == "/health" else 404))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            if self.path == "/v1/chat/completions":
                self.server.seen.append((time.monotonic(), dict(self.headers), body))
            if self.path in ("/v1/systemone", "/v1/decisions"):
                self.server.decided.append(body)
            self.server.busy += 1
            self.server.most_busy = max(self.server.most_busy, self.server.busy)
        try:
            known = {
                "/v1/chat/completions": self.server.answer,
                "/v1/systemone": self.server.decide,
                "/v1/decisions": self.server.decisions,
                "/v1/rerank": self.server.rerank,
                "/v1/score": self.server.score,
                "/tokenize": self.server.tokenize,
                "/detokenize": self.server.tokenize,
            }
            self.reply(known.get(self.path, no_such_page)(body))
        finally:
            with self.server.lock:
                self.server.busy -= 1

    def reply(self, response: Response) -> None:
        time.sleep(response.wait_s)
        if response.drop:
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(response.status)
        for name, value in response.headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        if response.reset_after is not None:
            self.wfile.write(response.body[: response.reset_after])
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        for start in range(0, len(response.body), 1 if response.drip_s else 1 << 20):
            time.sleep(response.drip_s)
            self.wfile.write(response.body[start : start + (1 if response.drip_s else 1 << 20)])

    def log_message(self, *_: Any) -> None:
        pass


def no_such_page(body: dict[str, Any]) -> Response:
    return Response(b"no such page", 404)


def completion(text: Any, top: list[tuple[str, Any]] | None = None) -> Response:
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if top is not None:
        alternatives = [{"token": token, "logprob": score} for token, score in top]
        choice["logprobs"] = {"content": [{"token": "?", "logprob": 0, "top_logprobs": alternatives}]}
    usage = {"prompt_tokens": 40, "completion_tokens": 3, "total_tokens": 43}
    return Response(json.dumps({"choices": [choice], "usage": usage}).encode())


def refusal(reason: str, status: int = 400) -> Response:
    return Response(json.dumps({"error": {"message": reason}}).encode(), status)


def text_of(body: dict[str, Any]) -> str:
    return body["messages"][0]["content"][1]["text"]


def pixels_of(body: dict[str, Any]) -> np.ndarray:
    return decoded(body["messages"][0]["content"][0]["image_url"]["url"])


def decoded(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))


def colour_of(body: dict[str, Any]) -> str:
    return nearest_colour(pixels_of(body))


def nearest_colour(pixels: np.ndarray) -> str:
    mean = pixels.mean(axis=(0, 1))
    return min(COLOURS, key=lambda name: float(np.abs(mean - COLOURS[name]).sum()))


def listed(text: str) -> list[str]:
    return re.findall(r"^[A-Z]\. (.*)$", text, re.MULTILINE) or re.findall(r"'([^']*)'", text)


def colour_model(offers: set[str] = EVERYTHING, ignores: bool = False) -> Answer:
    """Puts the candidates that name the picture's colour first. ignores: accepts the fields that it does not know."""

    def answer(body: dict[str, Any]) -> Response:
        unknown = (body.keys() & EVERYTHING) - offers
        if unknown and not ignores:
            return refusal(f"unsupported: {sorted(unknown)}")
        names = listed(text_of(body))
        order = sorted(range(len(names)), key=lambda place: colour_of(body) not in names[place])
        if "logprobs" in body and "logprobs" in offers:
            assert (body["max_tokens"], body["top_logprobs"]) == (1, 20)
            return completion(LABELS[order[0]], [(LABELS[place], -0.1 - 2 * rank) for rank, place in enumerate(order)])
        if "response_format" in body and "response_format" in offers:
            shape = body["response_format"]["json_schema"]["schema"]["properties"]["ranking"]
            assert shape["items"]["enum"] == list(LABELS[: len(names)])
            return completion(json.dumps({"ranking": [LABELS[place] for place in order]}))
        return completion(str([names[place] for place in order]))

    return answer


LABEL_IDS = tuple((100 + place, 200 + place) for place in range(26))  # of "A" and " A"
WORDS = re.compile(r" [A-Z](?![a-z])|[\s\S]")


def tokenizer(body: dict[str, Any]) -> Response:
    """The routes /tokenize and /detokenize: one token a character, but " A" is one."""
    if "tokens" in body:
        return Response(json.dumps({"prompt": "".join(map(said_by, body["tokens"]))}).encode())
    text = body["prompt"] if "prompt" in body else f"<user>{body['messages'][0]['content'][0]['text']}\n<assistant>"
    places = [LABELS.find(word[-1]) for word in WORDS.findall(text)]
    words = zip(WORDS.findall(text), places, strict=True)
    ids = [LABEL_IDS[place][len(word) - 1] if place >= 0 else 1000 + ord(word) for word, place in words]
    return Response(json.dumps({"count": len(ids), "tokens": ids}).encode())


def said_by(token: int) -> str:
    return chr(token - 1000) if token >= 1000 else " " * (token >= 200) + LABELS[token % 100]


def token_model(mass: float = 0.95, first: str = "<think>", ignores: frozenset[str] = frozenset()) -> Answer:
    """Tells log-probabilities by token id, as vLLM does: labels hold `mass`, three quarters of it as " A", `first` the rest.

    ignores: fields that it accepts and does not know.
    """

    def answer(body: dict[str, Any]) -> Response:
        names = listed(text_of(body))
        order = sorted(range(len(names)), key=lambda place: colour_of(body) not in names[place])
        if "logprobs" not in body:
            return completion(str([names[place] for place in order]))
        shares = np.exp(-0.5 * np.argsort(order))
        chances = {
            LABEL_IDS[place][form]: mass * share / shares.sum() * (0.25, 0.75)[form]
            for place, share in enumerate(shares.tolist())
            for form in (0, 1)
        }
        if "logprob_token_ids" in body and "logprob_token_ids" not in ignores:
            told = {token: chances.get(token, 1e-9) for token in body["logprob_token_ids"]}
        else:
            told = dict(sorted(chances.items(), key=lambda pair: -pair[1])[: body.get("top_logprobs", 20) - 1])
        by_id = "return_tokens_as_token_ids" in body and "return_tokens_as_token_ids" not in ignores
        called = {token: f"token_id:{token}" if by_id else said_by(token) for token in told}
        top = [(called[token], float(np.log(chance))) for token, chance in told.items()]
        return completion("A", [("token_id:7" if by_id else first, float(np.log(max(1 - mass, 1e-12)))), *top])

    return answer


def colour_shares(url: str, names: list[str]) -> np.ndarray:
    """Probabilities of names: the picture's colour is likelier, and so are later names."""
    shares = np.array([3.0 if nearest_colour(decoded(url)) in name else 1.0 for name in names]) + np.arange(len(names)) / 10
    return shares / shares.sum()


def decision_model(mass: float = 0.9) -> Answer:
    """The route /v1/systemone as vLLM 0.32 has it: one question, its options in order."""

    def answer(body: dict[str, Any]) -> Response:
        ((asked, question),), (url,) = body["questions"].items(), body["images"]
        names = list(question["criteria"])
        assert question["type"] == "choice" and 1 < len(names) <= 26 and isinstance(body["state"], str)
        shares = colour_shares(url, names)
        best = names[int(shares.argmax())]
        answers = {
            asked: {
                "type": "choice",
                "choice": best,
                "probabilities": dict(zip(names, shares.tolist(), strict=True)),
                "confidence": float(shares.max()) * mass,
            }
        }
        found = {
            "id": "decision-1",
            "object": "structured_decision",
            "created": 1,
            "model": body["model"],
            "answers": answers,
            "usage": {"input_tokens": 30, "output_tokens": 1},
            "diagnostics": {asked: {"label_mass": mass, "argmax_is_label": mass > 0.5}},
        }
        return Response(json.dumps(found).encode())

    return answer


def listed_decisions(mass: float = 0.9, blind: bool = False) -> Answer:
    """The route /v1/decisions as SGLang 0.5.23 has it, strict about its fields. blind: it takes pictures and reads the text."""

    def answer(body: dict[str, Any]) -> Response:
        (question,), ((kind, url),) = body["questions"], body["images"][0].items()
        names = [option["name"] for option in question["options"]]
        assert set(body) == {"model", "input", "images", "questions"} and len(body["images"]) == 1 and kind == "url"
        assert set(question) == {"id", "type", "question", "options"} and question["type"] == "choice"
        if len({name.strip().casefold() for name in names}) < len(names) or not 1 < len(names) <= 26:
            return refusal("option names repeat", 422)
        shares = colour_shares(url, names) if not blind else np.full(len(names), 1 / len(names))
        told = {"type": "choice", "choice": names[int(shares.argmax())], "label_mass": mass}
        told["probabilities"] = dict(zip(names, shares.tolist(), strict=True))
        usage = {"prompt_tokens": 30, "completion_tokens": 0, "total_tokens": 30}
        found = {"object": "decisions", "model": body["model"], "prompt_format_version": 1, "usage": usage}
        return Response(json.dumps({**found, "answers": {question["id"]: told}}).encode())

    return answer


def relevances(query: dict[str, Any], names: list[str]) -> list[float]:
    colour = nearest_colour(decoded(query["content"][0]["image_url"]["url"]))
    return [0.9 - place / 100 if colour in name else 0.1 + place / 100 for place, name in enumerate(names)]


def scoring_model(body: dict[str, Any]) -> Response:
    """The route /v1/score as Ray Serve LLM 2.60 has it, with vLLM's types: a score a pair, in order."""
    data = [
        {"index": place, "object": "score", "score": score}
        for place, score in enumerate(relevances(body["text_1"], body["text_2"]))
    ]
    usage = {"prompt_tokens": 20 * len(data), "total_tokens": 20 * len(data), "completion_tokens": 0}
    return Response(
        json.dumps({"id": "score-1", "object": "list", "model": body["model"], "data": data, "usage": usage}).encode()
    )


def reranking_model(body: dict[str, Any]) -> Response:
    """The route /v1/rerank as vLLM 0.32 has it: best first."""
    names = body["documents"]
    listed = sorted(enumerate(relevances(body["query"], names)), key=lambda pair: -pair[1])
    results = [{"index": place, "document": {"text": names[place]}, "relevance_score": score} for place, score in listed]
    usage = {"prompt_tokens": 20 * len(names), "total_tokens": 20 * len(names)}
    return Response(json.dumps({"id": "score-1", "model": body["model"], "usage": usage, "results": results}).encode())


@contextmanager
def serving(address: Any = ("127.0.0.1", 0)) -> Iterator[Server]:
    server = Server(address)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
