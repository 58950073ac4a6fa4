"""The ranker against slow oracles (one forward pass a reply, no batch, padding or cache) on tiny checkpoints of all families.

Not covered: whether a ranking is any good (random weights), GPUs, remote code.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.utils import is_num2words_available

from rar.config import Ranker
from rar.ranker.debias import log_softmax
from rar.ranker.prompt import generate_prompt, letters_prompt, likelihood_prompt, yes_no_prompt
from rar.ranker.rank import MllmRanker, rotations
from rar.ranker.wording import LABELS, PICTURE
from rar.schema import Ranking, RankStatus, UserError
from tests.tiny_mllm import FAMILIES, save_family, save_llava, word_tokenizer

NAMES = [["red cat", "blue dog"], ["small bird", "big green cat", "red dog"], ["cat", "dog", "bird", "red bird", "big cat"]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A checkpoint a family. SmolVLM's processor needs num2words."""
    root = tmp_path_factory.mktemp("mllm")
    families = [family for family in FAMILIES if family != "smolvlm" or is_num2words_available()]
    return {family: str(save_family(root / family, family)) for family in families}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, folders: dict[str, str]) -> str:
    if request.param not in folders:
        pytest.skip("SmolVLM's processor needs num2words")
    return folders[request.param]


@pytest.fixture(scope="module")
def llava(folders: dict[str, str]) -> str:
    return folders["llava"]


def loaded(folder: str, **settings: Any) -> MllmRanker:
    return MllmRanker(Ranker(device="cpu", **settings), folder)


def images(count: int, sides: tuple[int, ...] = (64, 48, 100)) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (sides[i % len(sides)], 64, 3), dtype=np.uint8) for i in range(count)]


def slow_logs(ranker: MllmRanker, pictures: list[np.ndarray], prompt: str, reply: str, end: str = "") -> np.ndarray:
    """Log-probability of each token of `reply` (and `end`) after a prompt: the whole text in one pass, this row alone."""
    parts = prompt.split(PICTURE)
    content: list[dict[str, str]] = []
    for part in parts:
        content += [{"type": "image"}, {"type": "text", "text": part}]
    text = ranker.mllm.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = ranker.mllm.processor(
        images=[pictures], text=[f"{text} {reply}{end}"], return_tensors="pt", input_data_format="channels_last"
    )
    said = len(ranker.mllm.processor.tokenizer(f"{reply}{end}")["input_ids"])
    ids = inputs["input_ids"][0, -said:]
    with torch.inference_mode():
        logs = ranker.mllm.model(**inputs).logits[0, -said - 1 : -1].log_softmax(-1)
    return logs[range(said), ids].numpy()


def slow_letters(ranker: MllmRanker, pictures: list[np.ndarray], names: list[str], counts: list[int]) -> np.ndarray:
    return log_softmax(slow_labels(ranker, pictures, names, counts))


def slow_labels(ranker: MllmRanker, pictures: list[np.ndarray], names: list[str], counts: list[int]) -> np.ndarray:
    """Log-probabilities of the labels over the whole vocabulary."""
    prompt = letters_prompt(names, exemplars=counts)
    return np.array([slow_logs(ranker, pictures, prompt, label)[0] for label in LABELS[: len(names)]])


def test_letters_equal_the_likelihood_of_appended_labels(family: str):
    """Batched and left-padded (three sizes of image, 2 to 5 candidates) against one label at a time without padding.

    Weights that were never trained spread over the whole vocabulary: a reply would hardly begin with a label, so REPAIRED.
    """
    ranker = loaded(family, batch_size=3)
    rankings = ranker.rank(images(3), NAMES)
    for image, names, ranking in zip(images(3), NAMES, rankings, strict=True):
        labels = slow_labels(ranker, [image], names, [])
        expected = log_softmax(labels)
        np.testing.assert_allclose(ranking.scores, expected, atol=1e-4)
        assert ranking.label_mass == pytest.approx(np.exp(labels).sum(), abs=1e-4)
        assert ranking.label_mass is not None and 1e-4 < ranking.label_mass < 0.5
        assert ranking.order == tuple(np.argsort(-expected, kind="stable"))
        assert (ranking.status, ranking.calls, ranking.output_tokens, ranking.response) == (RankStatus.REPAIRED, 1, 1, "")
    assert rankings[0].scores != pytest.approx(np.log([0.5, 0.5]), abs=1e-3)  # the weights do say something


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("method", ["letters", "likelihood", "first"])
def test_batches_in_lanes_are_ranked_as_one_after_the_other(family: str, method: str) -> None:
    """Families that keep positions on the model itself have one lane; the others as many as there are threads."""
    ranker = loaded(family, batch_size=3, method=method)
    assert ranker.lanes.count == (1 if "qwen" in family else 3)
    batches = [(images(3, (side, 64, 80)), [names[:count] for names in NAMES]) for side in (48, 64, 100) for count in (2, 3, 4)]
    expected = [ranker.rank(*batch) for batch in batches]
    for found, rankings in zip(ranker.lanes.map(lambda batch: ranker.rank(*batch), batches), expected, strict=True):
        for one, other in zip(found, rankings, strict=True):
            np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
            assert (one.prompt_tokens, one.output_tokens) == (other.prompt_tokens, other.output_tokens)


def test_the_plain_way_of_letters_is_short_and_gives_what_the_variants_give_of_one_rotation(llava: str) -> None:
    ranker, frames = loaded(llava, batch_size=3), set[str]()
    forward = ranker.mllm.model.forward

    def watched(*arguments: Any, **named: Any) -> Any:
        ours = (one for one in traceback.extract_stack() if f"rar{os.sep}ranker" in one.filename)
        frames.update(f"{one.filename}:{one.name}" for one in ours if "tests" not in one.filename)
        return forward(*arguments, **named)

    ranker.mllm.model.forward = watched
    plain = ranker.rank(images(3), NAMES)
    assert len(frames) <= 3, frames  # rank, _letters, next_logits
    ranker._plain = lambda: False  # type: ignore[method-assign]
    assert ranker.rank(images(3), NAMES) == plain


def test_likelihood_equals_a_pass_a_name(family: str):
    """One prefix a row, its cache shared by the names, two branches a chunk: as if each name were appended to the prompt."""
    ranker = loaded(family, method="likelihood", batch_size=2)
    rankings = ranker.rank(images(3), NAMES)
    for image, names, ranking in zip(images(3), NAMES, rankings, strict=True):
        prompt = likelihood_prompt(names)
        logs = [slow_logs(ranker, [image], prompt, name, "<eos>") for name in names]
        np.testing.assert_allclose(ranking.scores, log_softmax(np.array([log.mean() for log in logs])), atol=1e-4)
        assert (ranking.calls, ranking.output_tokens) == (1, sum(map(len, logs)))
    lengths = [ranking.prompt_tokens for ranking in loaded(family, method="letters").rank(images(3), NAMES)]
    assert all(0 < ranking.prompt_tokens < length for ranking, length in zip(rankings, lengths, strict=True))


def test_first_equals_a_pass_a_name(family: str):
    """The list that is asked for, as far as its first name and what ends it; this tokenizer knows no two quotes apart."""
    ranker = loaded(family, method="first", batch_size=2)
    rankings = ranker.rank(images(3), NAMES)
    for image, names, ranking in zip(images(3), NAMES, rankings, strict=True):
        logs = [slow_logs(ranker, [image], generate_prompt(names), f"['{name}', '") for name in names]
        np.testing.assert_allclose(ranking.scores, log_softmax(np.array([log.sum() for log in logs])), atol=1e-4)
        assert (ranking.calls, ranking.status) == (1, RankStatus.RANKED)
    twice = ranker.rank(images(1), [["cat", "cat", "red cat"]])[0]
    assert twice.scores[0] == pytest.approx(twice.scores[1], abs=1e-5)


def test_yes_no_equals_a_pass_a_candidate(family: str):
    ranker = loaded(family, method="yes_no", batch_size=3)
    for image, names, ranking in zip(images(3), NAMES, ranker.rank(images(3), NAMES), strict=True):
        odds = []
        for name in names:
            prompt = yes_no_prompt(name)
            yes = np.logaddexp(slow_logs(ranker, [image], prompt, "yes")[0], slow_logs(ranker, [image], prompt, "Yes")[0])
            odds.append(yes - slow_logs(ranker, [image], prompt, "no")[0])  # "No" is no word of this tokenizer
        np.testing.assert_allclose(ranking.scores, log_softmax(np.array(odds)), atol=1e-4)
        assert ranking.calls == ranking.output_tokens == len(names)


@pytest.mark.parametrize("permutations", [2, 26])
def test_permutations_average_rotations(family: str, permutations: int):
    """The rotations share a prefix; alone, each is a list of its own."""
    once, many = loaded(family), loaded(family, permutations=permutations, batch_size=2)
    for image, names, ranking in zip(images(3), NAMES, many.rank(images(3), NAMES), strict=True):
        total = np.zeros(len(names))
        for shift in rotations(len(names), permutations):
            total += np.roll(once.rank([image], [names[shift:] + names[:shift]])[0].scores, shift)
        expected = log_softmax(total / min(permutations, len(names)))
        np.testing.assert_allclose(ranking.scores, expected, atol=1e-4)
        assert ranking.calls == ranking.output_tokens == min(permutations, len(names))


@pytest.mark.parametrize("method", ["letters", "yes_no"])
def test_exemplars_stand_before_their_names(family: str, method: str):
    """Three pictures of the first candidate (two are shown), one of the next, none of the last; rotated with their names."""
    ranker = loaded(family, method=method, exemplars=2, batch_size=3, permutations=2)
    pool = images(7)
    shown = [[[pool[3], pool[4], pool[5]], [pool[6]], []], [[pool[5]], [], [pool[3]]]]
    names = [["red cat", "blue dog", "bird"], ["cat", "dog", "bird"]]
    rankings = ranker.rank(pool[:2], names, shown)
    for image, listed, own, ranking in zip(pool, names, shown, rankings, strict=False):
        slow = {"letters": exemplar_letters, "yes_no": exemplar_yes_no}[method]
        np.testing.assert_allclose(ranking.scores, slow(ranker, image, listed, [some[:2] for some in own]), atol=1e-4)
    bare = ranker.rank(pool[:2], names)
    assert all(one.prompt_tokens < other.prompt_tokens for one, other in zip(bare, rankings, strict=True))


def exemplar_letters(ranker: MllmRanker, image: np.ndarray, names: list[str], own: list[list[np.ndarray]]) -> np.ndarray:
    total = np.zeros(len(names))
    for shift in rotations(len(names), 2):
        turned, pictures = names[shift:] + names[:shift], own[shift:] + own[:shift]
        shown = [image, *(picture for some in pictures for picture in some)]
        total += np.roll(slow_letters(ranker, shown, turned, [len(some) for some in pictures]), shift)
    return log_softmax(total / 2)


def exemplar_yes_no(ranker: MllmRanker, image: np.ndarray, names: list[str], own: list[list[np.ndarray]]) -> np.ndarray:
    odds = []
    for name, pictures in zip(names, own, strict=True):
        prompt, shown = yes_no_prompt(name, exemplars=len(pictures)), [image, *pictures]
        yes = np.logaddexp(slow_logs(ranker, shown, prompt, "yes")[0], slow_logs(ranker, shown, prompt, "Yes")[0])
        odds.append(yes - slow_logs(ranker, shown, prompt, "no")[0])
    return log_softmax(np.array(odds))


def test_answers_do_not_depend_on_the_batch(llava: str):
    ranker = loaded(llava, batch_size=4)
    pictures, names = images(9), [NAMES[row % 3] for row in range(9)]
    together = ranker.rank(pictures, names)
    backwards = ranker.rank(pictures[::-1], names[::-1])[::-1]
    alone = [ranker.rank([picture], [listed])[0] for picture, listed in zip(pictures, names, strict=True)]
    for one, two, three in zip(together, backwards, alone, strict=True):
        np.testing.assert_allclose(one.scores, two.scores, atol=1e-4)
        np.testing.assert_allclose(one.scores, three.scores, atol=1e-4)
        assert one.prompt_tokens == two.prompt_tokens == three.prompt_tokens
    assert together[0].scores != pytest.approx(together[3].scores, abs=1e-4)  # same names, other image


def test_rotations_are_evenly_spaced():
    assert rotations(5, 1) == [0]
    assert rotations(5, 2) == [0, 2]
    assert rotations(4, 2) == [0, 2]
    assert rotations(3, 26) == [0, 1, 2]


def test_the_seconds_of_a_batch_are_shared_by_the_rows_that_were_asked(llava: str):
    ranker, started = loaded(llava), time.perf_counter()
    found = ranker.rank(images(3), [NAMES[0], ["cat"], NAMES[1]])
    elapsed = time.perf_counter() - started
    assert found[1].seconds == 0 < found[0].seconds == found[2].seconds
    assert sum(one.seconds for one in found) <= elapsed


def test_tokens_are_counted_without_padding_and_common_ones_once(llava: str):
    short, long = loaded(llava).rank(images(2), [NAMES[0], NAMES[2]])
    # <user> and <assistant>, 16 patches and CLS, "Which ... ?" 8, one line a name of label, dot and words, "Answer ... ." 5
    assert short.prompt_tokens == 2 + 17 + 8 + (4 + 4) + 5
    assert long.prompt_tokens == 2 + 17 + 8 + (3 + 3 + 3 + 4 + 4) + 5
    (twice,) = loaded(llava, permutations=2).rank(images(1), [NAMES[0]])
    common = 1 + 17 + 8 + 2  # up to the first label and its dot
    assert twice.prompt_tokens == common + 2 * (short.prompt_tokens - common)


def test_generate_is_greedy_and_unpadded(family: str):
    ranker = loaded(family, method="generate", max_new_tokens=6)
    together = ranker.rank(images(3), NAMES)
    for image, names, ranking in zip(images(3), NAMES, together, strict=True):
        alone = ranker.rank([image], [names])[0]
        assert (ranking.response, ranking.order, ranking.output_tokens) == (alone.response, alone.order, alone.output_tokens)
        assert ranking.calls == 1 and 1 <= ranking.output_tokens <= 6 and ranking.scores == ()
        assert "<" not in ranking.response


def test_generated_names_are_read_as_a_ranking(llava: str):
    """A model made to write "bird dog <eos>": its language head is replaced by a walk through these words."""
    ranker = loaded(llava, method="generate", max_new_tokens=20)
    ids = ranker.mllm.processor.tokenizer.convert_tokens_to_ids(["bird", "dog", "<eos>"])
    ranker.mllm.model.lm_head = Forced(iter(ids), len(ranker.mllm.processor.tokenizer))
    (ranking,) = ranker.rank(images(1), [["cat", "dog", "bird"]])
    assert ranking.response == "bird dog"
    assert (ranking.order, ranking.status) == ((2, 1, 0), RankStatus.REPAIRED)
    assert (ranking.calls, ranking.output_tokens) == (1, 3)


class Forced(torch.nn.Module):
    """A language head that says the given token ids, one a step."""

    def __init__(self, ids: Iterator[int], vocabulary: int) -> None:
        super().__init__()
        self.ids, self.vocabulary = ids, vocabulary

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        said = torch.full((*hidden.shape[:2], self.vocabulary), -1e9)
        said[..., next(self.ids)] = 0
        return said


@pytest.mark.parametrize("method", ["letters", "likelihood", "first", "yes_no"])
def test_equal_scores_keep_retrieval_order_and_nan_falls_back(llava: str, method: str):
    ranker = loaded(llava, method=method)
    ranker.mllm.model.lm_head.weight.data.zero_()
    (flat,) = ranker.rank(images(1), [["dog", "cat", "bird"]])
    sure = method != "letters"  # there the whole vocabulary is as likely as the labels
    assert (flat.order, flat.status) == ((0, 1, 2), RankStatus.RANKED if sure else RankStatus.REPAIRED)
    assert flat.scores == pytest.approx([-np.log(3)] * 3)
    ranker.mllm.model.lm_head.weight.data.fill_(torch.nan)
    (broken,) = ranker.rank(images(1), [["dog", "cat", "bird"]])
    assert (broken.order, broken.status, broken.scores) == ((0, 1, 2), RankStatus.FALLBACK, ())


@pytest.mark.parametrize("method", ["letters", "likelihood", "first", "yes_no", "generate"])
def test_one_candidate_costs_no_call(llava: str, method: str):
    ranker = loaded(llava, method=method, max_new_tokens=2)
    one, two, none = ranker.rank(images(3), [["cat"], ["cat", "dog"], []])
    assert (one.order, one.status, one.calls) == ((0,), RankStatus.RANKED, 0)
    assert (none.order, none.calls, two.status is not RankStatus.SKIPPED) == ((), 0, True)
    assert two.calls >= 1
    assert ranker.rank([], []) == []


@pytest.mark.parametrize(
    ("method", "settings", "room"),
    [("letters", {}, 1), ("letters", {"permutations": 3}, 1), ("generate", {"max_new_tokens": 6}, 6), ("yes_no", {}, 1)],
)
def test_prompts_beyond_the_window_fall_back_alone(llava: str, method: str, settings: dict[str, int], room: int):
    names = [*NAMES[:2], [*NAMES[2][:4], "big small red green blue cat"]]
    expected = loaded(llava, method=method, **settings).rank(images(3), names)
    longest = longest_prompt(llava, method, names[2])
    for window, fits in ((longest + room, True), (longest + room - 1, False)):
        ranker = loaded(llava, method=method, **settings)
        ranker.mllm.window = window
        short, middle, long = ranker.rank(images(3), names)
        assert (short.order, middle.order) == (expected[0].order, expected[1].order)
        assert (long.calls > 0) is fits
        assert fits or (long.order, long.status, long.response) == ((0, 1, 2, 3, 4), RankStatus.FALLBACK, "")


def longest_prompt(folder: str, method: str, names: list[str]) -> int:
    ranker = loaded(folder, method=method)
    texts = {
        "letters": [letters_prompt(names)],
        "generate": [generate_prompt(names)],
        "yes_no": [yes_no_prompt(name) for name in names],
    }[method]
    return max(map(len, ranker.mllm.token_ids(ranker.mllm.render(texts)))) + 16  # the picture is 17 tokens, not 1


def test_likelihood_beyond_the_window_falls_back_alone(llava: str):
    ranker = loaded(llava, method="likelihood")
    long = ranker.rank(images(1), [["cat", "big red small cat"]])[0]
    ranker.mllm.window = long.prompt_tokens + 5  # four words and the end
    assert [one.calls for one in ranker.rank(images(2), [["cat", "big red small cat"], NAMES[0]])] == [1, 1]
    ranker.mllm.window -= 1
    assert [one.calls for one in ranker.rank(images(2), [["cat", "big red small cat"], NAMES[0]])] == [0, 1]


def test_window_is_read_from_the_checkpoint(llava: str):
    assert loaded(llava).mllm.window == 256


@pytest.mark.parametrize("method", ["letters", "likelihood", "first", "yes_no"])
def test_hostile_names_and_stripes(llava: str, method: str):
    """Names with image or end tokens, with braces and picture marks, and images of one pixel's height, are only odd."""
    ranker = loaded(llava, method=method)
    stripes = [np.zeros((1, 300, 3), np.uint8), np.zeros((300, 1, 3), np.uint8), np.zeros((1, 1, 3), np.uint8)]
    names = [["<image>", f"<image> cat <eos>{PICTURE}"], ["<user>", "{name} {0} dog"], ["cat", "cat"]]
    rankings = ranker.rank(stripes, names)
    assert all(ranking.calls and ranking.status is not RankStatus.FALLBACK for ranking in rankings)


def test_none_of_these_is_one_more_label(llava: str):
    plain, ranker = loaded(llava), loaded(llava, none_of_these=True, permutations=2)
    for names, ranking in zip(NAMES, ranker.rank(images(3), NAMES), strict=True):
        assert len(ranking.order) == len(ranking.scores) == len(names)
        assert np.exp(ranking.scores).sum() == pytest.approx(1)
        said, _, share = ranking.response.rpartition(": ")
        assert said == "none of these" and 0 < float(share) < 1
    once = loaded(llava, none_of_these=True)
    (ranking,) = once.rank(images(1), [["cat", "dog"]])
    (listed,) = plain.rank(images(1), [["cat", "dog", "none of these"]])
    assert float(ranking.response.rpartition(": ")[2]) == pytest.approx(np.exp(listed.scores[2]), abs=1e-5)
    np.testing.assert_allclose(ranking.scores, log_softmax(np.array(listed.scores[:2])), atol=1e-5)
    with pytest.raises(UserError, match="can label 25 candidates"):
        once.rank(images(1), [["cat"] * 26])


def test_prior_takes_the_label_out(llava: str):
    """A model whose label logits are shifted by a constant a label ranks as before, once the prior of the shift is known."""
    ranker = loaded(llava, debias="prior")
    fair = ranker.estimate_prior(images(6), [NAMES[2]] * 6)
    before = ranker.rank(images(3), [NAMES[2]] * 3, prior=fair)
    ranker.mllm.model.lm_head = Partial(
        ranker.mllm.model.lm_head, dict(zip((forms[0] for forms in ranker.label_forms), (5.0, 0.0, 1.0), strict=False))
    )
    biased = ranker.rank(images(3), [NAMES[2]] * 3, prior=fair)
    assert [one.order for one in biased] != [one.order for one in before]
    prior = ranker.estimate_prior(images(6), [NAMES[2]] * 6)
    assert len(prior["5"]) == 5 and sum(prior["5"]) == pytest.approx(0)
    np.testing.assert_allclose(np.subtract(prior["5"], fair["5"]), np.array([5, 0, 1, 0, 0]) - 1.2, atol=1e-3)
    for one, other in zip(ranker.rank(images(3), [NAMES[2]] * 3, prior=prior), before, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-3)
        assert np.exp(one.scores).sum() == pytest.approx(1)


class Partial(torch.nn.Module):
    """A language head that likes some tokens more, whatever it sees."""

    def __init__(self, head: torch.nn.Module, liking: dict[int, float]) -> None:
        super().__init__()
        self.head = head
        self.liking = liking

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.head(hidden)
        for token, much in self.liking.items():
            logits[..., token] += much
        return logits


def test_prior_by_length_of_list(llava: str):
    ranker = loaded(llava, debias="prior")
    prior = ranker.estimate_prior(images(3), NAMES, counts=[2, 3, 9])
    assert sorted(prior) == ["2", "3"]  # no list has nine
    assert ranker.estimate_prior(images(3), NAMES, counts=[3, 2]) == prior
    assert sorted(ranker.estimate_prior(images(3), NAMES)) == ["2", "3", "5"]
    with pytest.raises(UserError, match="no lists of 5"):
        ranker.rank(images(1), [NAMES[2]], prior=prior)
    with pytest.raises(UserError, match="needs a label prior"):
        ranker.rank(images(1), [NAMES[2]])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", ["letters", "likelihood", "first"])
def test_half_precision(llava: str, precision: str, method: str):
    ranker = loaded(llava, precision=precision, method=method)
    assert ranker.mllm.model.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    full = loaded(llava, method=method).rank(images(3), NAMES)
    for half, exact in zip(ranker.rank(images(3), NAMES), full, strict=True):
        np.testing.assert_allclose(half.scores, exact.scores, atol=0.3)


def test_words_of_a_prompt_file_are_used(llava: str, tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text('version: 7\nletters:\n  ask: "is this {candidates}"\n  candidate: "{label} {name}"\n  between: " or "\n')
    mine = loaded(llava, prompts=str(file)).rank(images(1), [["cat", "dog"]])[0]
    ranker = loaded(llava)
    slow = [slow_logs(ranker, images(1), "is this A cat or B dog", label)[0] for label in "AB"]
    np.testing.assert_allclose(mine.scores, log_softmax(np.array(slow)), atol=1e-4)


def test_too_many_candidates_name_top_k(llava: str, tmp_path: Path):
    with pytest.raises(UserError, match=r"26 candidates .* not 27: lower retriever\.top_k"):
        loaded(llava).rank(images(1), [["cat"] * 27])
    ranker = loaded(str(save_llava(tmp_path / "few", word_tokenizer(labels="ABC"))))
    assert ranker.rank(images(1), [["cat", "dog", "bird"]])[0].status is not RankStatus.FALLBACK
    with pytest.raises(UserError, match="3 candidates"):
        ranker.rank(images(1), [["cat", "dog", "bird", "red cat"]])


def test_methods_that_a_model_has_no_words_for(llava: str, tmp_path: Path):
    unlabelled = save_llava(tmp_path / "unlabelled", word_tokenizer(labels=""))
    with pytest.raises(UserError, match="no single tokens"):
        loaded(str(unlabelled))
    file = tmp_path / "words.yaml"
    file.write_text("version: 1\nyes_no:\n  affirm: oui\n  deny: non\n")
    with pytest.raises(UserError, match="does not tell 'oui' from 'non'"):
        loaded(llava, method="yes_no", prompts=str(file))


def test_a_template_or_a_model_without_room_for_exemplars(llava: str, tmp_path: Path):
    with pytest.raises(UserError, match="template of 'likelihood' has no place"):
        loaded(llava, method="likelihood", exemplars=1)
    folder = save_llava(tmp_path / "first")
    template = folder / "chat_template.jinja"
    template.write_text(
        "{% for m in messages %}{% for part in m.content if part.type == 'image' %}<image>{% endfor %}"
        "{% for part in m.content if part.type == 'text' %} {{ part.text }}{% endfor %}{% endfor %}<assistant>"
    )
    with pytest.raises(UserError, match="moves or drops them"):
        loaded(str(folder), exemplars=1)
    assert loaded(str(folder)).rank(images(1), [["cat", "dog"]])[0].status is not RankStatus.FALLBACK


def test_picture_after_the_question(tmp_path: Path):
    """Some templates do so: then questions share nothing, and only methods of one question a row work."""
    folder = save_llava(tmp_path / "last")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
        "{% for part in m.content if part.type == 'image' %}<image>{% endfor %}{% endfor %}<assistant>"
    )
    assert loaded(str(folder)).rank(images(1), [["cat", "dog"]])[0].status is not RankStatus.FALLBACK
    with pytest.raises(UserError, match="puts the picture after the question"):
        loaded(str(folder), method="yes_no").rank(images(1), [["cat", "dog"]])


def test_a_ranking_is_equal_to_itself(llava: str):
    """Resumed runs give the same bits."""
    for method in ("letters", "likelihood", "first", "yes_no"):
        one: list[Ranking] = loaded(llava, method=method, permutations=3).rank(images(3), NAMES)
        assert loaded(llava, method=method, permutations=3).rank(images(3), NAMES) == one
