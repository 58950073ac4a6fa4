"""Pictures beside names: small whatever they were, kept by bytes, and read where nothing else waits for them."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rar.engine import exemplars
from rar.engine.exemplars import ENTRY_BYTES, EXEMPLAR_SIDE, Pictures
from rar.engine.replica import RankerReplica


@pytest.mark.parametrize(
    ("size", "form", "kept"),
    [((1500, 1000), "png", (504, 336)), ((1500, 1000), "jpg", (504, 336)), ((90, 400), "png", (90, 400))],
)
def test_large_pictures_are_kept_small(tmp_path: Path, size: tuple[int, int], form: str, kept: tuple[int, int]) -> None:
    ramp = np.linspace(0, 255, size[0]).astype(np.uint8)
    Image.fromarray(np.broadcast_to(ramp[None, :, None], (size[1], size[0], 3)).copy()).save(tmp_path / f"a.{form}")
    picture = Pictures()((str(tmp_path / f"a.{form}"), None, None))
    assert picture is not None and picture.shape == (kept[1], kept[0], 3) and min(picture.shape[:2]) <= EXEMPLAR_SIDE
    assert np.abs(picture[0, :, 0].astype(int) - np.linspace(0, 255, kept[0])).max() < 4


def test_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    places = [(str(tmp_path / name), None, None) for name in ("text.png", "good.png", "none.png")]
    assert [picture.shape for picture in Pictures().at(places)] == [(8, 8, 3)]


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(1, 6))
def test_the_least_lately_used_go_first_and_bytes_are_bounded(asked: list[int], room: int) -> None:
    """Against a list that is searched: 9 pictures of one size, and one that cannot be read."""
    read: list[int] = []

    def fake(place: exemplars.Place) -> np.ndarray | None:
        read.append(int(place[0]))
        return None if place[0] == "9" else np.full((4, 4, 3), int(place[0]), np.uint8)

    cost = ENTRY_BYTES + 48
    kept: list[int] = []
    expected: list[int] = []
    pictures = Pictures(room * cost)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exemplars, "read_small", fake)
        for one in asked:
            found = pictures((str(one), None, None))
            assert (found is None) == (one == 9) and (found is None or (found == one).all())
            if one in kept:
                kept.remove(one)
            else:
                expected.append(one)
            kept.append(one)
            while sum(ENTRY_BYTES if other == 9 else cost for other in kept) > room * cost:
                kept.pop(0)
            assert pictures.bytes <= room * cost and [int(place[0]) for place in pictures.kept] == kept
    assert read == expected


def test_a_picture_that_is_slow_to_read_keeps_no_health_check_waiting(tmp_path: Path) -> None:
    """The exemplar is a pipe that is filled only after the event loop, where Serve's checks run, has been seen to turn."""
    slow, turned = tmp_path / "slow.ppm", threading.Event()
    os.mkfifo(slow)
    data = b"P6 8 8 255\n" + bytes(192)
    replica = RankerReplica({"exemplars": 1, "batch_size": 2})

    def fill() -> None:
        turned.wait(20)
        slow.write_bytes(data)

    async def run() -> bool:
        shown: list[list[list[exemplars.Place]]] = [[[(str(slow), None, None)], []]]
        ranking = asyncio.create_task(replica.rank([data], [["red ring", "blue star"]], exemplars=shown))
        await asyncio.sleep(0.2)
        replica.check_health()
        waits = not ranking.done() and not turned.is_set()
        turned.set()
        (found,) = await ranking
        return waits and found.status == "ranked"

    writer = threading.Thread(target=fill)
    writer.start()
    assert asyncio.run(run())
    writer.join()
