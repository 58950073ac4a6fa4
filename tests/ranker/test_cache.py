"""The answer cache: what comes back is what was put, another question is a miss, and damage is never an answer.

Not covered: a real NFS mount.
"""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rar.ranker.cache import AnswerCache
from rar.schema import Ranking, RankStatus, UserError

NAMES = ["colt's foot", "daisy", "rose"]
ANSWER = Ranking((2, 0, 1), RankStatus.REPAIRED, (-1.5, -0.1, -3.25), "a “rose”\n", 1, 120, 7)
KEPT = Ranking(ANSWER.order, ANSWER.status, ANSWER.scores, ANSWER.response)


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_an_answer_comes_back_and_costs_nothing_the_second_time(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "new" / "folder", "f")
    assert cache.get([b"picture"], [NAMES]) == [None]
    cache.put([b"picture"], [NAMES], [ANSWER])
    again = AnswerCache(tmp_path / "new" / "folder", "f")
    assert again.get([b"picture", b"other"], [NAMES, NAMES]) == [KEPT, None]


@pytest.mark.parametrize(
    ("image", "names", "settings"),
    [
        (b"another picture", NAMES, "f"),
        (b"picture", NAMES[::-1], "f"),
        (b"picture", NAMES[:2], "f"),
        (b"picture", ["colt's foot", "daisyrose"], "f"),
        (b"picture", NAMES, "g"),
    ],
)
def test_another_question_is_a_miss(tmp_path: Path, image: bytes, names: list[str], settings: str) -> None:
    AnswerCache(tmp_path, "f").put([b"picture"], [NAMES], [ANSWER])
    assert AnswerCache(tmp_path, settings).get([image], [names]) == [None]


def test_what_cost_no_call_is_not_kept(tmp_path: Path) -> None:
    """A fallback of a failed request may succeed next time; one of an unreadable reply is the model's answer."""
    cache = AnswerCache(tmp_path, "f")
    failed = Ranking((0, 1, 2), RankStatus.FALLBACK, response="[answered 500]")
    unreadable = Ranking((0, 1, 2), RankStatus.FALLBACK, response="I cannot tell.", calls=1)
    cache.put([b"a", b"b"], [NAMES, NAMES], [failed, unreadable])
    lost, kept = cache.get([b"a", b"b"], [NAMES, NAMES])
    assert lost is None
    assert kept is not None and kept.response == "I cannot tell."


@pytest.mark.parametrize("damage", [b"", b"nonsense", b"\x00" * 200, b"0" * 16 + b"\n{}"])
def test_a_damaged_entry_is_a_miss_and_is_mended(tmp_path: Path, damage: bytes) -> None:
    cache = AnswerCache(tmp_path, "f")
    cache.put([b"picture"], [NAMES], [ANSWER])
    (entry,) = entries(tmp_path)
    entry.write_bytes(damage)
    assert cache.get([b"picture"], [NAMES]) == [None]
    cache.put([b"picture"], [NAMES], [ANSWER])
    assert cache.get([b"picture"], [NAMES]) == [KEPT]


def test_every_damaged_byte_and_every_cut_is_noticed(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path, "f")
    cache.put([b"picture"], [NAMES], [ANSWER])
    (entry,) = entries(tmp_path)
    whole = entry.read_bytes()
    for place in range(len(whole)):
        for data in (whole[:place], whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]):
            entry.write_bytes(data)
            assert cache.get([b"picture"], [NAMES]) == [None]


texts = st.text(max_size=20)
rankings = st.permutations(range(3)).flatmap(
    lambda order: st.builds(
        Ranking,
        order=st.just(tuple(order)),
        status=st.sampled_from(RankStatus),
        scores=st.one_of(st.just(()), st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 3)),
        response=texts,
        calls=st.just(1),
    )
)


@given(image=st.binary(max_size=20), names=st.lists(texts, min_size=3, max_size=3), ranking=rankings)
def test_any_answer_comes_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, image: bytes, names: list[str], ranking: Ranking
) -> None:
    cache = AnswerCache(tmp_path_factory.getbasetemp() / "cache", "f")
    cache.put([image], [names], [ranking])
    (found,) = cache.get([image], [names])
    assert found == Ranking(ranking.order, ranking.status, ranking.scores, ranking.response)


def write_many(folder: str, own: int) -> None:
    """Rewrites the same 20 entries in turn, each time with this process' own response of another length."""
    cache = AnswerCache(folder, "f")
    images = [bytes([place]) for place in range(20)]
    answer = Ranking((0, 1, 2), RankStatus.RANKED, (), f"{own}" * (1 + 5000 * own), 1)
    for _ in range(10):
        cache.put(images, [NAMES] * 20, [answer] * 20)


@pytest.mark.long
def test_two_processes_write_the_same_entries_while_a_third_reads(tmp_path: Path) -> None:
    """A reader sees one writer's whole answer or the other's, never a mixture, and after the first of them never a miss."""
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_many, args=(str(tmp_path), own)) for own in (0, 1)]
    for writer in writers:
        writer.start()
    cache, seen = AnswerCache(tmp_path, "f"), set[str]()
    while any(writer.is_alive() for writer in writers):
        (found,) = cache.get([bytes([7])], [NAMES])
        assert found is not None or not seen
        seen.update([found.response] if found else [])
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen <= {"0", "1" * 5001} and seen
    assert len(entries(tmp_path)) == 20


def test_a_folder_that_cannot_be_used_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "cache", tmp_path / "file", "s3://bucket/cache"):
        with pytest.raises(UserError, match=r"ranker\.cache"):
            AnswerCache(folder, "f")
