"""Asking servers without a replica between, in process. The whole way through Ray is in tests/run/test_recognise.

Not covered: a cluster whose workers reach a server by other ways than the driver.
"""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from rar.config import Ranker
from rar.engine import direct
from rar.ranker.cache import AnswerCache
from rar.ranker.endpoint import EndpointRanker
from tests.chat_server import BEST, NAMES, colour_model, picture, serving


def png(image: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()


def test_a_shard_is_ranked_in_one_session(tmp_path: Path) -> None:
    """A picture that cannot be read costs no call, and what is in the cache none either."""
    with serving() as server:
        server.answer = colour_model()
        settings = Ranker(method="endpoint", model="colours", base_url=server.url)
        cache = AnswerCache(tmp_path / "cache", "0" * 32)
        ask = partial(cache.filled, direct.AskServers(settings, EndpointRanker(settings).probe()))
        shard = [png(picture("red")), b"no picture", png(picture("blue"))], [NAMES] * 3
        probes = len(server.seen)
        red, bad, blue = ask(*shard)
        assert (red.order[0], blue.order[0]) == (BEST["red"], BEST["blue"])
        assert (bad.status, bad.calls) == ("fallback", 0) and "not a readable" in bad.response
        assert len(server.seen) == probes + 2
        again = ask(*shard)[0]
        assert again.order == red.order and again.label_mass == red.label_mass
        assert len(server.seen) == probes + 2


def test_a_picture_that_cannot_be_sent_costs_its_own_row() -> None:
    """JPEG, in which large pictures go, ends at 65,500 pixels; the others of the shard are ranked, once."""
    with serving() as server:
        server.answer = colour_model()
        settings = Ranker(method="endpoint", model="colours", base_url=server.url)
        ask = direct.AskServers(settings, EndpointRanker(settings).probe())
        probes = len(server.seen)
        pictures = [picture("red"), np.zeros((5, 66_000, 3), np.uint8), picture("blue")]
        red, long, blue = ask([png(each) for each in pictures], [NAMES] * 3)
        assert (red.order[0], blue.order[0]) == (BEST["red"], BEST["blue"]) and len(server.seen) == probes + 2
        assert (long.status, long.order, long.calls) == ("fallback", (0, 1, 2), 0) and "OSError" in long.response


def test_calls_of_a_shard_are_counted_before_it_is_begun() -> None:
    settings = Ranker(method="endpoint", model="colours", base_url="http://host/v1", permutations=3)
    lists = [NAMES, NAMES[:2], NAMES[:1]]
    assert direct.AskServers(settings, direct.Offers(True, True))._calls(lists) == 3 + 2
    assert direct.AskServers(settings, direct.Offers(False, True))._calls(lists) == 1 + 1
    assert direct.AskServers(settings, direct.Offers(True, False, reranks="rerank"))._calls(lists) == len(NAMES) + 2
