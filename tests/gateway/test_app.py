"""The ranker replica in process, and the whole service on a real Ray over real HTTP. The API's own rules are in test_api.

Not covered: GPUs, several nodes and gateways. Load and killed replicas are test_load's.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from ray import serve

from rar import config, miniature
from rar.bench import load
from rar.boxes import xywh_to_xyxy
from rar.columns import with_candidates
from rar.corpus.decode import decode
from rar.crops import windows
from rar.engine import choosing, client, reading, stages
from rar.engine.replica import SICK, Fits, One, RankerReplica
from rar.engine.session import Session
from rar.fusion import Calibration
from rar.gateway import app
from rar.gateway.client import Client
from rar.ranker.rank import MllmRanker
from rar.ranker.wire import data_url
from rar.runfolder import RunFolder
from rar.schema import Candidate, Ranking, RankStatus, RowError, UserError
from tests.conftest import ROOT
from tests.run.lab import Lab

TOKEN = "not a secret"


@dataclass
class Fussy:
    """A ranker that cannot stand lists of four, and breaks on lists of five; remembers its batches."""

    batches: list[int]

    def rank(self, images: Sequence[np.ndarray], names: Sequence[Sequence[str]]) -> list[Ranking]:
        self.batches.append(len(names))
        if any(len(listed) == 4 for listed in names):
            raise UserError("four is too many")
        if any(len(listed) == 5 for listed in names):
            raise RuntimeError("out of memory")
        return [Ranking(tuple(range(len(listed))), RankStatus.RANKED, (), "", 1, 100 + len(listed), 1) for listed in names]


@pytest.fixture(scope="module")
def replica() -> RankerReplica:
    return RankerReplica({"batch_size": 8})


@pytest.fixture
def fussy(replica: RankerReplica, monkeypatch: pytest.MonkeyPatch) -> Fussy:
    ranker = Fussy([])
    monkeypatch.setattr(replica, "base", replica._batcher(ranker))
    monkeypatch.setattr(replica, "failures", 0)
    return ranker


def png(colour: str = "red") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(data, "PNG")
    return data.getvalue()


def together(replica: RankerReplica, requests: list[tuple[bytes, list[str]]]) -> list[Any]:
    async def run() -> list[Any]:
        return await asyncio.gather(*(replica.rank_one(*request) for request in requests))

    return asyncio.run(run())


def test_a_batch_keeps_its_order_and_says_what_it_could_not_decode(replica: RankerReplica) -> None:
    found = asyncio.run(replica.rank([png(), b"no picture", png("blue")], [["a", "b"], ["a", "b"], ["a", "b", "c"]]))
    assert [ranking.status for ranking in found] == [RankStatus.RANKED, RankStatus.FALLBACK, RankStatus.RANKED]
    assert "not a readable" in found[1].response and len(found[2].order) == 3


@pytest.mark.usefixtures("three_threads")
def test_batches_of_jobs_are_ranked_at_once_and_as_they_are_alone(
    replica: RankerReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [([png(colour), png("white")], [["a", "b", "c"], ["b", "c"]]) for colour in ("red", "green", "blue", "grey")]
    alone = [asyncio.run(replica.rank(*batch)) for batch in asked]
    own = RankerReplica({"batch_size": 8})
    forward, passes, met = own.ranker.mllm.model.forward, itertools.count(), threading.Barrier(2)

    def watched(*arguments: Any, **named: Any) -> Any:
        if next(passes) < 2:
            met.wait(60)  # breaks where one batch waits for the other
        return forward(*arguments, **named)

    monkeypatch.setattr(own.ranker.mllm.model, "forward", watched)

    async def together() -> list[list[Ranking]]:
        return await asyncio.gather(*(own.rank(*batch) for batch in asked))

    for found, expected in zip(asyncio.run(together()), alone, strict=True):
        assert [one.order for one in found] == [one.order for one in expected]
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)


def test_a_picture_goes_through_ten_frames_to_the_rankers_forward_pass(
    replica: RankerReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage in the worker's thread, the replica's coroutines, the model's thread; before the stage come classify.run and
    recognise.run, and between the two processes client.Ask."""
    frames, model, house = set[str](), replica.ranker.mllm.model, os.path.dirname(config.__file__)
    forward = model.forward

    def ask(images: list[bytes], names: list[list[str]]) -> list[Ranking]:
        answering = replica.rank(images, names)

        def watched(*arguments: Any, **named: Any) -> Any:
            worker = sys._current_frames()[threading.main_thread().ident or 0]
            ours = [*traceback.extract_stack(worker), *traceback.extract_stack()]
            frames.update(f"{one.filename}:{one.name}" for one in ours if one.filename.startswith(house))
            awaited: Any = answering
            while inspect.iscoroutine(awaited):
                frames.add(awaited.__qualname__)
                awaited = awaited.cr_await
            return forward(*arguments, **named)

        monkeypatch.setattr(model, "forward", watched)
        return asyncio.run(answering)

    table = pa.table({"bytes": pa.array([png()], pa.large_binary()), "error": pa.array([None], pa.string())})
    table = with_candidates(table, [[Candidate(0, "a", 0.1), Candidate(1, "b", 0.0)]])
    assert stages.timed("rank", choosing.Rank(ask, Calibration(), 8))(table)["mllm_calls"].to_pylist() == [1]
    assert len(frames) + len(["classify.run", "recognise.run", "Ask.__call__"]) <= 10, frames


def test_single_requests_share_batches_and_a_faulty_one_spoils_no_other(replica: RankerReplica, fussy: Fussy) -> None:
    requests = [(png(), ["a", "b"])] * 3 + [(png(), list("abcd")), (b"no picture", ["a"]), (png(), ["a", "b", "c"])]
    found = together(replica, requests)
    assert [type(answer) for answer in found] == [Ranking, Ranking, Ranking, UserError, RowError, Ranking]
    assert fussy.batches == [5, 3, 2, 1, 1]
    assert replica.failures == 0, "a user's mistake is no illness"


def test_requests_of_one_message_have_faults_of_their_own(replica: RankerReplica, fussy: Fussy) -> None:
    requests: list[One] = [(png(), ["a", "b"]), (png(), list("abcd")), (b"no picture", ["a"]), (png(), list("abcde"))]
    found = asyncio.run(replica.rank_several(requests))
    assert [type(answer) for answer in found] == [Ranking, UserError, RowError, RuntimeError]
    assert str(found[3]) == "RuntimeError: out of memory"


def test_a_picture_that_the_model_fails_on_is_left_out_of_the_label_prior(
    replica: RankerReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed, estimate = [list("abc")] * 3, replica.ranker.estimate_prior
    without = asyncio.run(replica.prior([png("red"), png("blue")], listed[:2], [2, 3]))

    def fussy(images: Sequence[np.ndarray], names: Sequence[Sequence[str]], counts: Sequence[int]) -> dict[str, list[float]]:
        if any(image[0, 0].tolist() == [0, 128, 0] for image in images):
            raise RuntimeError("out of memory")
        return estimate(images, names, counts)

    monkeypatch.setattr(replica.ranker, "estimate_prior", fussy)
    assert asyncio.run(replica.prior([png("red"), png("green"), png("blue")], listed, [2, 3])) == without
    monkeypatch.setattr(replica.ranker, "estimate_prior", lambda *_: 1 / 0 if len(_[0]) > 1 else {})
    with pytest.raises(ZeroDivisionError):
        asyncio.run(replica.prior([png("red"), png("blue")], listed[:2], [2, 3]))


def test_a_gateway_refuses_what_it_has_no_room_for() -> None:
    ask = client.AskOne("no such application", config.Ranker(batch_size=3, max_replicas=2), config.Serve(max_queued=5))
    ask.waiting = 4 * 3 + 5
    with pytest.raises(client.Full):
        asyncio.run(ask(png(), ["a", "b"]))


def test_no_batch_is_larger_than_batch_size(replica: RankerReplica, fussy: Fussy) -> None:
    assert len(together(replica, [(png(), ["a", "b"])] * 20)) == 20
    assert fussy.batches == [8, 8, 4]


def test_a_model_that_keeps_failing_makes_the_replica_ask_for_its_end(replica: RankerReplica, fussy: Fussy) -> None:
    replica.check_health()
    for _ in range(SICK):
        with pytest.raises(RuntimeError, match="out of memory"):
            together(replica, [(png(), list("abcde"))])
    with pytest.raises(RuntimeError, match="in a row"):
        replica.check_health()
    together(replica, [(png(), ["a", "b"])])
    replica.check_health()


def test_a_batch_is_limited_by_padded_tokens_which_are_learned() -> None:
    fits = Fits(images=100, tokens=2000)
    short: One = (b"", ["abc"])  # 1 token
    long: One = (b"", ["abc" * 488])
    assert fits([short] * 3) and not fits([short] * 4)  # 512 guessed for the picture
    assert fits([long, short]) and not fits([long, short, short])  # all padded to the longest: 1000
    for _ in range(100):
        fits.learn([["abc"]], [Ranking((0,), RankStatus.RANKED, (), "", 1, 100, 1)])
    assert fits([short] * 19) and not fits([short] * 21)


def test_a_model_that_cannot_be_loaded_is_told_and_not_tried_again() -> None:
    broken = RankerReplica({"model": "/nowhere"})
    assert "/nowhere" in str(asyncio.run(broken.fault()))


# what is refused before anything starts


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"serve": {"host": "0.0.0.0"}}, "RAR_API_TOKEN"),
        ({"serve": {"host": "203.0.113.9"}}, "RAR_API_TOKEN"),
        ({"serve": {"adapters": {"birds": "/nowhere"}}}, "serve.adapters.birds"),
        ({"ranker": {"debias": "prior"}}, "debias"),
        ({"encoder": {"model": "precomputed"}, "ranker": {"method": "none"}}, "precomputed"),
    ],
)
def test_what_cannot_be_served_is_refused(sections: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(app.TOKEN, raising=False)
    with pytest.raises(UserError, match=told):
        app.check(config.validated(config.Config, sections))


def test_a_taken_port_is_told() -> None:
    with load.socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="choose others"):
        app.check(config.validated(config.Config, {"serve": {"port": taken.getsockname()[1]}}))


# the whole service


@dataclass
class Service:
    url: str
    world: Path
    settings: config.Config

    def post(self, path: str, query: dict[str, Any], token: str = TOKEN) -> tuple[int, Any]:
        body = json.dumps(query).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, body, headers), timeout=60) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as refusal:
            return refusal.code, json.load(refusal)


def encoded(image: bytes) -> str:
    return base64.b64encode(image).decode()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the miniature MLLM with random weights: its scores differ from the model's."""
    import peft
    import torch
    from transformers import AutoModelForImageTextToText

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(AutoModelForImageTextToText.from_pretrained(miniature.MLLM), settings).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def service(lab: Lab, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Memory, encoder, retriever, ranker, gateway and proxy, as `rar serve` starts them."""
    folder = tmp_path_factory.mktemp("service")
    settings = lab.settings(
        ranker={"batch_size": config.Ranker().batch_size},
        route={"mode": "always"},
        serve={"port": load.free_port(), "max_body_bytes": 100_000, "adapters": {"odd": str(adapter)}},
        detect={"crop": {"size": 96}, "shown": {"size": 96, "outside": "grey"}},  # one view for both
    )
    serve.shutdown()  # another module's has no HTTP proxy
    os.environ[app.TOKEN] = TOKEN
    opened = RunFolder.open(folder / "run", "serve", settings, fresh=False, name="test", group="serve")
    with app.serving(lab.session, settings, opened) as url:
        yield Service(url, lab.world, settings)
    del os.environ[app.TOKEN]
    serve.shutdown()


def test_ranking_over_http_is_the_bare_rankers(service: Service) -> None:
    questions = load.draw()[:24]
    truth, _ = load.bare_ranker(service.settings.ranker, questions)
    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(lambda one: service.post("/rank", json.loads(one.body)), questions))
    assert [status for status, _ in found] == [200] * 24
    assert all(load.agrees(answer, right) for (_, answer), right in zip(found, truth, strict=True))
    assert found[0][1]["usage"] == {"calls": 1, "prompt_tokens": truth[0].prompt_tokens, "output_tokens": 1}
    masses = [(answer["label_mass"], right.label_mass) for (_, answer), right in zip(found, truth, strict=True)]
    assert all(mass == pytest.approx(right, abs=load.NEAR) for mass, right in masses)
    assert [answer["label_first"] for _, answer in found] == [right.label_first for right in truth]


def test_photos_of_the_world_are_recognized(service: Service) -> None:
    photos = sorted((service.world / "novel" / "test").glob("*/*.png"))[::5]
    right = 0
    for photo in photos:
        status, found = service.post("/recognize", {"image": encoded(photo.read_bytes())})
        assert status == 200, found
        assert sorted(found["ranking"]) == list(range(5)) and found["status"] in ("ranked", "skipped"), found
        assert found["class_name"] == found["candidates"][found["ranking"][0]]["class_name"]
        assert abs(sum(candidate["probability"] for candidate in found["candidates"]) - 1) < 1e-6
        right += found["class_name"] == photo.parent.name
    assert right >= 0.7 * len(photos)


def test_pictures_of_one_request_are_recognized_as_they_are_one_by_one(service: Service) -> None:
    photos = [photo.read_bytes() for photo in sorted((service.world / "novel" / "test").glob("*/*.png"))[::40]]
    pictures = [*photos, b"no picture"]
    found = Client(service.url, TOKEN).classify(pictures)
    alone = [service.post("/recognize", {"image": encoded(photo)})[1] for photo in photos]
    for one, right in zip(found, alone, strict=False):
        assert one.answer is not None and (one.answer.class_name, one.answer.ranking) == (right["class_name"], right["ranking"])
        assert one.answer.probability == pytest.approx(right["probability"], abs=load.NEAR)
    assert found[-1].answer is None and "not a readable" in str(found[-1].error) and len(found) == len(pictures)


def test_boxes_of_a_scene_are_named_as_their_crops_are(service: Service) -> None:
    """What the crops of the batch jobs show, cut here and sent one by one as pictures of their own, is the oracle."""
    truth = json.loads((service.world / "scenes.json").read_text())
    scene = max(truth["images"], key=lambda one: sum(box["image_id"] == one["id"] for box in truth["annotations"]))
    buffer = io.BytesIO()
    Image.open(next((service.world / "scenes").glob(f"*{Path(scene['file_name']).name}"))).save(buffer, "JPEG", quality=90)
    data = buffer.getvalue()  # smaller than the file, for the limit above
    boxes = xywh_to_xyxy(np.array([one["bbox"] for one in truth["annotations"] if one["image_id"] == scene["id"]], np.float64))
    status, found = service.post("/detect", {"image": encoded(data), "boxes_xyxy": boxes.tolist()})
    assert status == 200 and len(found["boxes"]) == len(boxes) > 2, found
    cut = windows.crops(decode(data), boxes, service.settings.detect.shown)
    for pixels, box in zip(cut, found["boxes"], strict=True):
        _, alone = service.post("/recognize", {"image": encoded(reading.ppm(pixels))})
        assert (box["class_name"], box["ranking"]) == (alone["class_name"], alone["ranking"])
        assert box["probability"] == pytest.approx(alone["probability"], abs=load.NEAR)
    beyond = {"image": encoded(data), "boxes_xyxy": [[0, 0, 9, 9], [9999, 0, 10_009, 9]]}
    assert service.post("/detect", beyond)[0] == 422 and "outside" in service.post("/detect", beyond)[1]["error"]


def test_pictures_of_the_memory_are_small_jpegs(service: Service) -> None:
    def get(path: str) -> bytes:
        request = urllib.request.Request(service.url + path, headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.read()

    pictures = [Image.open(io.BytesIO(get(f"/support/0/{place}"))) for place in (0, 1)]
    assert all(one.format == "JPEG" and max(one.size) <= app.SUPPORT_SIDE for one in pictures)
    assert pictures[0].tobytes() != pictures[1].tobytes()
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get("/support/120/0")


def test_an_adapter_answers_under_its_name(service: Service) -> None:
    query = json.loads(load.draw()[0].body)
    plain, odd, again = (service.post("/rank", {**query, "adapter": name})[1]["scores"] for name in ("", "odd", ""))
    assert plain == pytest.approx(again, abs=load.NEAR) and plain != pytest.approx(odd, abs=load.NEAR)


def test_mistakes_come_back_as_one_line_and_without_the_inside(service: Service) -> None:
    whole = {"image": encoded(png()), "candidates": ["a", "b"]}
    cut = encoded((service.world / "scenes").glob("*.jpg").__next__().read_bytes()[:2000])
    wrong: list[tuple[str, dict[str, Any], int]] = [
        ("/rank", {**whole, "image": cut}, 422),
        ("/recognize", {"image": cut}, 422),
        ("/rank", {**whole, "candidates": [f"name {number}" for number in range(60)]}, 422),
        ("/rank", {**whole, "image": "A" * 200_000}, 413),
        ("/rank", {**whole, "adapter": "unknown"}, 422),
    ]
    for path, query, expected in wrong:
        status, answer = service.post(path, query)
        assert status == expected and list(answer) == ["error"], answer
        assert "Traceback" not in answer["error"] and "ray" not in answer["error"] and len(answer["error"]) < 300
    assert service.post("/rank", whole, token="wrong")[0] == 401


def test_health_and_page(service: Service) -> None:
    with urllib.request.urlopen(service.url + "/health", timeout=30) as reply:
        facts = json.load(reply)
    assert facts["classes"] == 120 and facts["method"] == "letters" and facts["adapters"] == ["odd"] and facts["token"] is True
    with urllib.request.urlopen(service.url + "/", timeout=30) as reply:
        assert b"<textarea" in reply.read()


@pytest.mark.slow
def test_batch_jobs_are_served_beside_it(service: Service, ray_session: Session) -> None:
    client.deploy(ray_session, service.settings.ranker)
    ask = client.ask(ray_session, service.settings.ranker)
    assert isinstance(ask, client.Ask)
    (ranking,) = ask([png()], [["a", "b", "c"]])
    assert sorted(ranking.order) == [0, 1, 2]
    serve.delete(client.app_name(service.settings.ranker))


@contextmanager
def served(folder: Path, settings: dict[str, Any]) -> Iterator[tuple[Service, subprocess.Popen[str]]]:
    """`rar serve` in a process of its own, until, told to end, it ends by itself with 0."""
    port = load.free_port()
    online = {"endpoints": ["rank"], "port": port}
    (folder / "rank.yaml").write_text(json.dumps({**settings, "serve": online}))  # JSON is YAML
    command = [sys.executable, "-m", "jobs.serve", str(folder / "rank.yaml"), "--out", str(folder / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stderr is not None
        said = []
        for line in server.stderr:
            said.append(line)
            if "the page is" in line:
                break
        assert server.poll() is None, said
        yield Service(f"http://127.0.0.1:{port}", folder, config.validated(config.Config, settings)), server
        assert server.wait(60) == 0
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)


@pytest.mark.slow
def test_a_terminated_server_finishes_what_it_has(tmp_path: Path) -> None:
    with served(tmp_path, {}) as (service, server), ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(service.post, "/rank", json.loads(one.body)) for one in load.draw()[:16]]
        asked[0].result()
        server.send_signal(signal.SIGTERM)
        assert [future.result()[0] for future in asked] == [200] * 16


@pytest.mark.server
def test_an_engine_that_the_server_starts_answers_as_the_local_model(tmp_path: Path, world: Path) -> None:
    """transformers' own server, which gives text: the replies are held against `generate`, on pictures that nobody resizes."""
    from tests.ranker.test_endpoint import photos

    engine = {"method": "endpoint", "engine": "transformers", "model": "miniature", "engine_args": {"device": "cpu"}}
    images, names = photos(world)
    queries = [{"image": data_url(image), "candidates": listed} for image, listed in zip(images, names, strict=True)]
    with served(tmp_path, {"ranker": engine}) as (service, server), ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda query: service.post("/rank", query), queries))
        server.send_signal(signal.SIGTERM)
    assert [status for status, _ in found] == [200] * len(queries), found
    truth = MllmRanker(config.Ranker(method="generate", device="cpu"), str(miniature.MLLM)).rank(images, names)
    for (_, answer), right in zip(found, truth, strict=True):
        assert (answer["response"], answer["ranking"], answer["status"]) == (right.response, list(right.order), right.status)
