"""A replica of the MLLM ranker on Ray Serve, with two entrances, each deployed apart (see client).

`rank` is for batch jobs: a request is a batch, up to `ranker.batch_size` images of one shard with their candidates. Batching by
arrival would make what shares a forward pass depend on timing, and with it the last digits of every score; a resumed run then
could not be told to give the same predictions. It also costs one message an image. The callers are patient: when the queue
is full they wait and ask again.

`rank_several` is for the HTTP gateways: single requests that waited together in one of them travel in one message, as a message
costs more than a small model's answer. Here they meet those of other gateways, and what waits together is ranked together, as
many as `ranker.batch_size` and BATCH_TOKENS allow. The two are different applications of the same class, as no queue
limit and no autoscaling target would fit both. Cost: a cluster that does both holds the model twice.

In a replica one thread runs the model, others decode; the event loop stays free for health checks. On a CPU several threads run
it for batch jobs, a batch each (`device.Lanes`), while a single request is sooner answered by all cores together. A batch that
fails is halved until the image is found that fails alone (isolate), so that one image cannot spoil its neighbors'.
"""

from __future__ import annotations

import asyncio
import collections
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import numpy as np
from ray import serve
from ray.serve.metrics import Counter

from rar import config, miniature
from rar.corpus.decode import decode
from rar.engine.batching import WAIT_S, Batcher
from rar.engine.exemplars import Exemplars, Pictures, Place
from rar.engine.isolate import Broken, Isolate, reason
from rar.engine.models import free_gpu_memory
from rar.ranker.debias import Prior
from rar.schema import Ranking, RankStatus, RowError, Unavailable, UserError

One = tuple[bytes, list[str]]  # an encoded image, its candidates' names
CHARS_PER_TOKEN = 3.0  # of candidates' names; what a picture and the prompt cost is learned from the answers
FIRST_GUESS = 512.0  # tokens of a picture and its prompt before the first answer
BATCH_TOKENS = 16384  # of one forward pass of single requests, padding included
LOADED_ADAPTERS = 2  # that a replica keeps, each with its model
TELL_S = 1.0  # from a device that is gone to the end of its process, in which the request that met it is answered
SICK = 3  # batches in a row without any answer after which a replica asks to be replaced
FAULTS = (RowError, UserError, Unavailable)  # of one request


class Ranks(Protocol):
    """What MllmRanker and EndpointRanker have in common."""

    def rank(self, images: Sequence[np.ndarray], names: Sequence[Sequence[str]]) -> list[Ranking]: ...


class RankerReplica:
    """One loaded MLLM. Not a Serve class by itself, so that it can be called in a test."""

    def __init__(
        self,
        settings: dict[str, Any],
        online: dict[str, Any] | None = None,
        threads: int | None = None,
        prior: Prior | None = None,
        exemplars: Exemplars | None = None,
    ) -> None:
        """settings: config.Ranker, online: config.Serve, as dictionaries. threads: of the model; None: as many as Ray gives.

        prior, exemplars: of single requests; a batch brings its own.
        """
        self.known_prior, self.known_exemplars, self.pictures = prior, exemplars, Pictures()
        self.settings, self.online = config.Ranker(**settings), config.Serve(**(online or {}))
        self.worker, self.decoders = ThreadPoolExecutor(1), ThreadPoolExecutor(min(4, os.cpu_count() or 1))
        self.threads = threads
        self.mistake: str | None = None  # kept and asked for: a constructor that raises would be tried again and again
        self.failures, self.ending = 0, False
        self.meters = Meters()
        try:
            self.ranker: Any = load_ranker(self.settings, threads)
        except UserError as error:
            self.mistake = str(error)
            return
        if online is None and self.settings.method != "endpoint":
            self.worker = self.ranker.lanes.pool  # type: ignore[attr-defined]
        self.whole = self._isolate(self.ranker, (UserError, Unavailable))
        self.base = self._batcher(self.ranker)

        # a function, as Serve hangs the loaded adapters on it
        async def adapt(name: str) -> Batcher[One, Ranking]:
            """Load an adapter with a model of its own: Serve calls it where it is not loaded, and drops the least used one."""
            settings = self.settings.model_copy(update={"adapter": self.online.adapters[name]})
            loading = asyncio.get_running_loop().run_in_executor(self.worker, load_ranker, settings, self.threads)
            return self._batcher(await loading)

        self.adapted = serve.multiplexed(adapt, max_num_models_per_replica=LOADED_ADAPTERS)

    async def fault(self) -> str | Unavailable | None:
        """What the user must mend before this replica can rank, or who is away (a str, or Unavailable); None if all is well."""
        if self.mistake is None and self.settings.method == "endpoint":
            try:
                self.ranker.offers = await asyncio.get_running_loop().run_in_executor(self.worker, self.ranker.probe)
            except UserError as error:
                return str(error)
            except Unavailable as error:
                return error
        return self.mistake

    def check_health(self) -> None:
        """Serve asks every few seconds and replaces a replica that raises."""
        if self.failures >= SICK:
            raise RuntimeError(f"the model failed {self.failures} times in a row")

    async def rank(
        self,
        images: list[bytes],
        names: list[list[str]],
        prior: Prior | None = None,
        exemplars: list[list[list[Place]]] | None = None,
    ) -> list[Ranking]:
        """One Ranking an image. A picture that cannot be decoded, or that the model fails on, is a FALLBACK with its reason as
        the response. Raises Broken where the device is gone with these pictures.

        exemplars: for each image and candidate, where pictures of the class lie; one that cannot be read is left out.
        """
        pictures = await self._decoded(images)
        good = [row for row, picture in enumerate(pictures) if not isinstance(picture, RowError)]
        columns: list[list[Any]] = [[pictures[row] for row in good], [names[row] for row in good]]
        if exemplars is not None:
            columns.append(await self._shown([exemplars[row] for row in good]))
        rank = partial(self.whole, *columns, **_given(prior))
        answers: list[Any] = list(pictures)
        try:
            found = await asyncio.get_running_loop().run_in_executor(self.worker, rank)
        except Broken as error:
            raise await self._ended(error) from None
        for row, answer in zip(good, found, strict=True):
            answers[row] = answer
        return [
            fallback(len(listed), reason(answer)) if isinstance(answer, Exception) else answer
            for answer, listed in zip(answers, names, strict=True)
        ]

    async def prior(self, images: list[bytes], names: list[list[str]], counts: list[int]) -> Prior:
        """The label prior of `ranker.debias: prior`, estimated on images of no known class; counts: lengths of lists.

        Pictures that cannot be decoded, or that the model fails on by themselves, are left out.
        """
        pixels = await self._decoded(images)
        good = [row for row, picture in enumerate(pixels) if not isinstance(picture, RowError)]
        shown: list[Any] = [[pixels[row] for row in good], [names[row] for row in good], counts]
        return await asyncio.get_running_loop().run_in_executor(self.worker, self._estimated, *shown)

    def _estimated(self, images: list[np.ndarray], names: list[list[str]], counts: list[int]) -> Prior:
        try:
            return self.ranker.estimate_prior(images, names, counts)
        except FAULTS:
            raise
        except Exception:
            good = [row for row, picture in enumerate(images) if self._survives(picture, names[row], counts)]
            if len(good) == len(images):
                raise
        return self.ranker.estimate_prior([images[row] for row in good], [names[row] for row in good], counts)

    def _survives(self, picture: np.ndarray, listed: list[str], counts: list[int]) -> bool:
        try:
            self.ranker.estimate_prior([picture], [listed], counts)
        except Exception:
            return False
        return True

    async def rank_several(self, requests: list[One], adapter: str = "") -> list[Ranking | Exception]:
        """`rank_one` of each; what they raise is told in a RuntimeError of one line, as it must not cost the others theirs."""
        found = await asyncio.gather(*(self.rank_one(*one, adapter) for one in requests), return_exceptions=True)
        known = (Ranking, *FAULTS)
        return [one if isinstance(one, known) else RuntimeError(reason(one)) for one in found]  # type: ignore[arg-type]

    async def rank_one(self, image: bytes, names: list[str], adapter: str = "") -> Ranking | Exception:
        """Rank one image together with others that wait. adapter: a name of `serve.adapters`; "" is the model as it is.

        What is wrong with the request (RowError: the picture cannot be decoded; UserError: this method cannot rank so many; or
        Unavailable) is returned: an exception would be logged here and bring its traceback along.
        """
        try:
            batcher = await self.adapted(adapter) if adapter else self.base
            return await batcher((image, names))
        except FAULTS as fault:
            return fault

    def _batcher(self, ranker: Ranks) -> Batcher[One, Ranking]:
        fits = Fits(self.settings.batch_size, BATCH_TOKENS)
        isolated = self._isolate(ranker, (Unavailable,))

        async def work(waiting: list[One]) -> list[Ranking | Exception]:
            answers = await self._answers(isolated, waiting)
            fits.learn([names for _, names in waiting], answers)
            return answers

        return Batcher(work, fits, WAIT_S)

    def _isolate(self, ranker: Ranks, raised: tuple[type[Exception], ...]) -> Isolate[Ranking]:
        return Isolate(ranker.rank, free_gpu_memory, raised, self._note)

    def _note(self, answers: list[Ranking | Exception], seconds: float) -> None:
        """In the model's thread."""
        rankings = [answer for answer in answers if isinstance(answer, Ranking)]
        if rankings:
            self.meters.note(rankings, seconds)
            self.failures = 0
        elif any(not isinstance(answer, FAULTS) for answer in answers):
            self.failures += 1

    async def _answers(self, isolated: Isolate[Ranking], waiting: list[One]) -> list[Ranking | Exception]:
        """A Ranking or its own fault for each."""
        answers: list[Any] = list(await self._decoded([image for image, _ in waiting]))
        good = [row for row, picture in enumerate(answers) if not isinstance(picture, RowError)]
        names, known = [waiting[row][1] for row in good], self.known_exemplars
        columns: list[list[Any]] = [[answers[row] for row in good], names]
        if known is not None:
            columns.append(await self._shown([[known.get(name, []) for name in listed] for listed in names]))
        rank = partial(isolated, *columns, **_given(self.known_prior))
        try:
            found = await asyncio.get_running_loop().run_in_executor(self.worker, rank)
        except Unavailable as error:  # an endpoint that stayed away does so for all of them
            found = [error] * len(good)
        except Broken as error:
            raise await self._ended(error) from None
        for row, answer in zip(good, found, strict=True):
            answers[row] = answer
        return answers

    async def _ended(self, error: Broken) -> Broken:
        """The device answers nothing more: this process ends, and Serve starts another.

        Who broke it is told. All others that find it so die with the process, and are sent again: it was not by their fault.
        """
        if self.ending:
            await asyncio.Event().wait()
        self.ending = True
        asyncio.get_running_loop().call_later(TELL_S, os._exit, 1)
        return error

    async def _decoded(self, images: Sequence[bytes]) -> list[np.ndarray | RowError]:
        loop = asyncio.get_running_loop()
        return list(await asyncio.gather(*(loop.run_in_executor(self.decoders, try_decode, image) for image in images)))

    async def _shown(self, places: list[list[list[Place]]]) -> list[list[list[np.ndarray]]]:
        """The pictures of each row's candidates, read beside the event loop."""
        loop, at = asyncio.get_running_loop(), self.pictures.at
        jobs = (loop.run_in_executor(self.decoders, lambda row=row: [at(each) for each in row]) for row in places)  # type: ignore[misc]
        return list(await asyncio.gather(*jobs))


def _given(prior: Prior | None) -> dict[str, Any]:
    """For local models alone: an endpoint's ranker takes no prior."""
    return {} if prior is None else {"prior": prior}


def fallback(count: int, why: str) -> Ranking:
    """The retriever's order of `count` candidates."""
    return Ranking(tuple(range(count)), RankStatus.FALLBACK, response=f"[{why}]")


def load_ranker(settings: config.Ranker, threads: int | None) -> Ranks:
    """The ranker of a config. Raises UserError where it cannot be loaded."""
    if settings.method == "endpoint":
        from rar.ranker.endpoint import EndpointRanker

        return EndpointRanker(settings)
    import torch

    from rar.ranker.rank import MllmRanker

    if threads is not None:
        torch.set_num_threads(threads)
    return MllmRanker(settings, model_path(settings))


def model_path(settings: config.Ranker) -> str:
    return str(miniature.MLLM) if settings.model == "miniature" else settings.model


def try_decode(image: bytes) -> np.ndarray | RowError:
    try:
        return decode(image)
    except RowError as error:
        return error


class Meters:
    """What Ray's agent on every node tells Prometheus, beside Serve's own numbers (requests by status, queues, latency).

    Counters, whose rates and ratios say everything: Ray keeps a histogram's buckets only, and its sum is a guess.
    """

    def __init__(self) -> None:
        self.images = Counter("rar_ranked_images", "Images ranked, by how it came about.", ("status",))
        self.candidates = Counter("rar_ranked_candidates", "Candidates of the images ranked.")
        self.batches = Counter("rar_batches", "Batches ranked.")
        self.seconds = Counter("rar_batch_seconds", "Seconds that batches took.")
        self.calls = Counter("rar_mllm_calls", "Calls of the MLLM.")
        self.tokens = Counter("rar_mllm_tokens", "Tokens read and written by the MLLM.", ("kind",))

    def note(self, answers: Sequence[Ranking], seconds: float) -> None:
        for status, count in collections.Counter(answer.status for answer in answers).items():
            self.images.inc(count, {"status": status.value})
        self.batches.inc()
        self.seconds.inc(seconds)
        for counter, amount, tags in (
            (self.candidates, sum(len(answer.order) for answer in answers), {}),
            (self.calls, sum(answer.calls for answer in answers), {}),
            (self.tokens, sum(answer.prompt_tokens for answer in answers), {"kind": "prompt"}),
            (self.tokens, sum(answer.output_tokens for answer in answers), {"kind": "output"}),
        ):
            if amount:  # Ray refuses an increment of nothing
                counter.inc(amount, tags)


class Fits:
    """Whether images make one forward pass: at most `images` of them, and `tokens` with all padded to the longest prompt."""

    def __init__(self, images: int, tokens: int) -> None:
        self.images, self.tokens = images, tokens
        self.base = FIRST_GUESS

    def __call__(self, waiting: list[One]) -> bool:
        longest = max(text_tokens(names) for _, names in waiting)
        return len(waiting) <= self.images and len(waiting) * (self.base + longest) <= self.tokens

    def learn(self, names: Sequence[list[str]], answers: Sequence[Any]) -> None:
        """Correct the guess by what the answers say they cost."""
        for listed, answer in zip(names, answers, strict=True):
            if isinstance(answer, Ranking) and answer.calls:
                self.base += 0.1 * (answer.prompt_tokens - text_tokens(listed) - self.base)


def text_tokens(names: list[str]) -> float:
    return sum(map(len, names)) / CHARS_PER_TOKEN
