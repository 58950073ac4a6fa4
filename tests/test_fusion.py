from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rar import fusion
from rar.fusion import Calibration
from rar.schema import Candidate, Ranking, RankStatus
from tests.conftest import SHARED_DATA

needs_data = pytest.mark.skipif(not SHARED_DATA.exists(), reason="needs ../shared/data")


def candidates(*scores: float) -> list[Candidate]:
    return [Candidate(10 + position, f"class {position}", score) for position, score in enumerate(scores)]


def ranking(*order: int, scores: tuple[float, ...] = (), status: RankStatus = RankStatus.RANKED) -> Ranking:
    return Ranking(tuple(order), status, scores)


Case = tuple[list[list[Candidate]], list[Ranking], list[int]]


def world(n: int, ranker: str, seed: int = 0, noise: float = 1.5) -> Case:
    """Five candidates, the truth among them; a retriever whose logits are noisy and a ranker that is `perfect` or `noise`."""
    rng = np.random.default_rng(seed)
    rows, rankings, truth = [], [], []
    for _ in range(n):
        true = int(rng.integers(5))
        logits = rng.normal(size=5) * noise + 2.0 * (np.arange(5) == true)
        by_score = np.argsort(-logits)
        rows.append([Candidate(int(class_id), f"class {class_id}", float(logits[class_id])) for class_id in by_score])
        order = rng.permutation(5)
        if ranker == "perfect":
            order = np.argsort(by_score != true, kind="stable")
        rankings.append(ranking(*order.tolist()))
        truth.append(true)
    return rows, rankings, truth


def top1(case: Case, calibration: Calibration) -> float:
    hits = [row[fusion.fuse(row, rank, calibration)[0][0]].class_id == true for row, rank, true in zip(*case, strict=True)]
    return float(np.mean(hits))


finite = st.floats(-50, 50)


@settings(max_examples=200)
@given(st.data(), st.integers(0, 8), finite, finite, st.sampled_from(list(RankStatus)), st.booleans())
def test_fused_order_is_a_permutation_and_probabilities_sum_to_one(
    data: st.DataObject, n: int, a: float, b: float, status: RankStatus, scored: bool
) -> None:
    row = candidates(*data.draw(st.lists(finite, min_size=n, max_size=n)))
    scores = tuple(data.draw(st.lists(finite, min_size=n, max_size=n))) if scored else ()
    rank = ranking(*data.draw(st.permutations(range(n))), scores=scores, status=status)
    order, probabilities = fusion.fuse(row, rank, Calibration(abs(a), abs(b), abs(a)))
    assert sorted(order) == list(range(n)) and len(probabilities) == n
    if n:
        assert sum(probabilities) == pytest.approx(1) and min(probabilities) >= 0
        assert list(order) == sorted(range(n), key=lambda position: -probabilities[position]) or len(set(probabilities)) < n


def test_fuse_adds_the_two_logits() -> None:
    order, probabilities = fusion.fuse(candidates(2, 1), ranking(1, 0, scores=(-3.0, -0.5)), Calibration(1, 1))
    assert order == (1, 0)
    assert probabilities == pytest.approx((1 / (1 + math.exp(1.5)), 1 / (1 + math.exp(-1.5))))


def test_an_order_alone_counts_by_its_ranks() -> None:
    _, probabilities = fusion.fuse(candidates(0, 0, 0), ranking(2, 0, 1), Calibration(1, 1))
    assert probabilities == pytest.approx((1 / 2 / (11 / 6), 1 / 3 / (11 / 6), 1 / (11 / 6)))


def test_ties_keep_retrieval_order() -> None:
    order, _ = fusion.fuse(candidates(*[1, 2] * 20), ranking(*reversed(range(40))), Calibration(1, 0))
    assert order == (*range(1, 40, 2), *range(0, 40, 2))


@pytest.mark.parametrize("status", [RankStatus.SKIPPED, RankStatus.FALLBACK])
def test_a_silent_ranking_leaves_the_retriever_alone(status: RankStatus) -> None:
    calibration = Calibration(weight_retriever=0.1, weight_ranker=9, retriever_scale=2)
    order, probabilities = fusion.fuse(candidates(1, 0.5), ranking(1, 0, status=status), calibration)
    assert order == (0, 1)
    assert probabilities == pytest.approx((1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))))


def test_no_candidates() -> None:
    assert fusion.fuse([], ranking(), Calibration()) == ((), ())
    assert fusion.skips([], Calibration())


def test_routed_by_the_retrievers_probability() -> None:
    even, sure = candidates(1, 1), candidates(5, 0)
    assert [fusion.skips(row, Calibration(threshold=0.9)) for row in (even, sure)] == [False, True]
    assert [fusion.skips(row, Calibration(threshold=0.9, retriever_scale=0.1)) for row in (even, sure)] == [False, False]


def test_default_asks_always_unless_there_is_nothing_to_order() -> None:
    assert not fusion.skips(candidates(1000, 0), Calibration())
    assert fusion.skips(candidates(1), Calibration())


@settings(max_examples=50)
@given(st.floats(0, 100), st.floats(0, 100), st.one_of(st.just(math.inf), st.floats(0, 1)), st.integers(0, 9999))
def test_calibration_survives_json(a: float, b: float, threshold: float, images: int) -> None:
    calibration = Calibration(a, b, a, threshold, 0.1, images, 0.5, None)
    text = json.dumps(calibration.to_dict(), allow_nan=False)
    assert Calibration.from_dict(json.loads(text)) == calibration
    rounded = calibration.rounded()
    assert rounded == rounded.rounded() and rounded.weight_ranker == pytest.approx(b, rel=1e-3)
    assert rounded.threshold == threshold if threshold == math.inf else abs(rounded.threshold - threshold) <= 1e-3 * threshold


def test_fits_of_two_machines_are_one_calibration() -> None:
    one = Calibration(0.123456, 2.34567, 0.98765, 0.87654, 0.0123412)
    other = Calibration(0.1234561, 2.3456702, 0.987651, 0.8765402, 0.0123413)
    assert one.rounded() == other.rounded() == Calibration(0.1235, 2.346, 0.9877, 0.8765, 0.01234)


def test_too_few_images_give_the_default() -> None:
    assert fusion.fit([], [], []) == Calibration()
    rows, rankings, truth = world(19, "perfect")
    assert fusion.fit(rows, rankings, truth) == Calibration(images=19)
    assert fusion.fit(rows * 5, rankings * 5, [99] * 95) == Calibration(images=0)


def test_a_perfect_ranker_has_its_way() -> None:
    calibration = fusion.fit(*world(400, "perfect"))
    new = world(400, "perfect", seed=1)
    assert calibration.weight_ranker > 3 and calibration.fused_top1 is not None and calibration.fused_top1 > 0.99
    assert top1(new, calibration) > 0.99 > 0.85 > top1(new, Calibration(1, 0))


@pytest.mark.parametrize("seed", range(8))
def test_a_ranker_that_knows_nothing_does_no_harm(seed: int) -> None:
    calibration = fusion.fit(*world(400, "noise", seed))
    new = world(1000, "noise", seed + 100)
    assert calibration.weight_ranker < 0.35
    assert top1(new, calibration) > top1(new, Calibration(1, 0)) - 0.02


def test_where_ranking_does_not_pay_nobody_is_asked() -> None:
    fitted = [fusion.fit(*world(400, "noise", seed)) for seed in range(8)]
    guarded = [calibration for calibration in fitted if calibration.weight_ranker == 0]
    assert len(guarded) >= 4
    for calibration in guarded:
        assert calibration.threshold == 0 and fusion.skips(candidates(0, 0, 0), calibration)
        assert fusion.fuse(candidates(3, 2, 1), ranking(2, 1, 0), calibration)[0] == (0, 1, 2)


def test_fitted_weights_are_the_true_ones() -> None:
    """Truth drawn from softmax(0.5 s + 2 r): the fit finds 0.5 and 2."""
    rng = np.random.default_rng(0)
    rows, rankings, truth = [], [], []
    for _ in range(4000):
        retriever, ranker = rng.normal(size=4) * 3, rng.normal(size=4)
        chances = np.exp(0.5 * retriever + 2 * ranker)
        row = candidates(*retriever.tolist())
        rows.append(row)
        rankings.append(ranking(*np.argsort(-ranker).tolist(), scores=tuple(ranker.tolist())))
        truth.append(row[rng.choice(4, p=chances / chances.sum())].class_id)
    calibration = fusion.fit(rows, rankings, truth)
    assert calibration.weight_retriever == pytest.approx(0.5, abs=0.05)
    assert calibration.weight_ranker == pytest.approx(2, abs=0.15)


def test_weights_do_not_turn_negative() -> None:
    rows, rankings, truth = world(200, "perfect")
    backwards = [ranking(*reversed(rank.order)) for rank in rankings]
    assert fusion.fit(rows, backwards, truth).weight_ranker == 0


def test_solver_against_a_grid() -> None:
    rng = np.random.default_rng(0)
    scores, truth, prior = rng.normal(size=(2, 30, 4)), rng.integers(4, size=30), np.array([0.3, 0.2])
    scores[0, np.arange(30), truth] += 1
    penalty = np.where(rng.random((30, 4)) < 0.2, -np.inf, 0.0)
    penalty[np.arange(30), truth] = 0

    def loss(weights: np.ndarray) -> float:
        logits = np.tensordot(weights, scores, 1) + penalty
        chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        return float(-np.log(chances[np.arange(30), truth]).sum() + ((weights - prior) ** 2).sum())

    found = fusion.fit_weights(scores, penalty, truth, prior, 2.0)
    grid = [np.array([a, b]) for a in np.linspace(0, 2, 81) for b in np.linspace(0, 2, 81)]
    assert loss(found) <= min(map(loss, grid))


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.99])
def test_the_candidates_shown_hold_the_truth_as_often_as_asked(coverage: float) -> None:
    calibration = fusion.fit(*world(400, "perfect"), coverage=coverage)
    held = []
    for seed in range(1, 9):
        rows, _, truth = world(400, "perfect", seed)
        shown = [
            {one.class_id for one in row[: max(1, fusion.n_shown(row, replace(calibration, threshold=math.inf)))]}
            for row in rows
        ]
        inside = [class_id in {one.class_id for one in row} for row, class_id in zip(rows, truth, strict=True)]
        held += [class_id in few for few, class_id, known in zip(shown, truth, inside, strict=True) if known]
    assert np.mean(held) == pytest.approx(coverage, abs=0.05) or np.mean(held) > coverage  # one candidate is always kept


def test_without_coverage_all_candidates_are_shown() -> None:
    rows, rankings, truth = world(400, "perfect")
    calibration = replace(fusion.fit(rows, rankings, truth), threshold=math.inf)
    assert {fusion.n_shown(row, calibration) for row in rows} == {len(rows[0])}


def test_a_lone_candidate_is_not_worth_a_question() -> None:
    sure, unsure = candidates(5.0, 0.0, -1.0), candidates(1.0, 0.9, -4.0)
    calibration = Calibration(least_probability=0.05)
    assert (fusion.n_shown(sure, calibration), fusion.n_shown(unsure, calibration)) == (0, 2)


def test_a_ranking_of_the_first_is_one_of_all() -> None:
    partial = Ranking((1, 0), RankStatus.RANKED, (-2.0, -0.1))
    whole = fusion.among(partial, 4)
    assert (whole.order, whole.scores) == ((1, 0, 2, 3), (-2.0, -0.1, -2.0, -2.0))
    assert fusion.among(Ranking((1, 0), RankStatus.RANKED), 3).scores == ()


def test_silent_rankings_say_nothing_of_the_ranker() -> None:
    rows, rankings, truth = world(200, "perfect")
    silent = [ranking(*rank.order, status=RankStatus.FALLBACK) for rank in rankings]
    with_silent = fusion.fit(rows + rows, rankings + silent, truth + truth)
    alone = fusion.fit(rows, rankings, truth)
    assert with_silent.weight_ranker == pytest.approx(alone.weight_ranker, rel=1e-3)
    assert with_silent.images == 400 and with_silent.fused_top1 < alone.fused_top1 == 1  # type: ignore[operator]


def test_cross_validated_chances_have_not_seen_the_images_own_truth() -> None:
    rows, rankings, truth = world(100, "perfect")
    other = [(true + 1) % 5 if image % fusion.N_FOLDS == 0 else true for image, true in enumerate(truth)]
    before = fusion._Table.of(rows, rankings, truth).cross_validated_chances()
    after = fusion._Table.of(rows, rankings, other).cross_validated_chances()
    np.testing.assert_array_equal(before[:: fusion.N_FOLDS], after[:: fusion.N_FOLDS])
    assert np.abs(before[1] - after[1]).max() > 1e-3


def test_ragged_lists_and_truth_outside() -> None:
    rows, rankings, truth = world(200, "perfect")
    short = [row[:2] for row in rows[:50]]
    short_rankings = [ranking(*(position for position in rank.order if position < 2)) for rank in rankings[:50]]
    calibration = fusion.fit(short + rows[50:] + [[]], short_rankings + rankings[50:] + [ranking()], [*truth, 3])
    inside = sum(true in [candidate.class_id for candidate in row] for row, true in zip(short, truth[:50], strict=True))
    assert calibration.images == 150 + inside
    assert calibration.weight_ranker > 1


def test_cosines_and_logits_are_calibrated_alike() -> None:
    """The scale of the retriever's scores (cosines or logits) changes its weight and nothing else."""
    rows, rankings, truth = world(300, "perfect", noise=1.0)
    rankings = rankings[:150] + world(150, "noise", seed=7)[1]
    cosines = [[Candidate(c.class_id, c.class_name, c.score / 100) for c in row] for row in rows]
    logits_fit, cosine_fit = fusion.fit(rows, rankings, truth), fusion.fit(cosines, rankings, truth)
    assert cosine_fit.weight_retriever == pytest.approx(100 * logits_fit.weight_retriever, rel=1e-3)
    assert cosine_fit.weight_ranker == pytest.approx(logits_fit.weight_ranker, rel=1e-3)
    assert cosine_fit.threshold == pytest.approx(logits_fit.threshold, abs=1e-6)


def test_threshold_is_the_lowest_affordable_one() -> None:
    confidence, costs = np.array([0.9, 0.8, 0.7, 0.6]), np.array([0.0, 0.0, 0.01, 0.5])
    assert fusion._threshold(confidence, costs) == 0.7
    assert fusion._threshold(confidence, costs[::-1]) == math.inf
    assert fusion._threshold(confidence, np.zeros(4)) == 0.6


def replay(name: str, top_k: int) -> Case:
    """CLIP's candidates, ranked by GPT-4V's answers matched by lower-cased name; unmatched candidates follow."""
    data = np.load(SHARED_DATA / "clip_top10" / f"{name}.npz")
    names = json.loads((SHARED_DATA / "clip_top10" / f"{name}.classes.json").read_text())
    responses = json.loads((SHARED_DATA / "gpt4v_rankings" / f"{name}.json").read_text())["responses"]
    rows, rankings = [], []
    for file, ids, logits in zip(data["files"].tolist(), data["candidate_ids"], data["candidate_logits"], strict=True):
        pairs = zip(ids[:top_k].tolist(), logits[:top_k].tolist(), strict=True)
        row = [Candidate(class_id, names[class_id], logit) for class_id, logit in pairs]
        positions = {candidate.class_name.lower(): position for position, candidate in enumerate(row)}
        named = dict.fromkeys(positions[answer.lower()] for answer in responses[file] if answer.lower() in positions)
        status = RankStatus.REPAIRED if named else RankStatus.FALLBACK
        rows.append(row)
        rankings.append(ranking(*(named | dict.fromkeys(range(top_k))), status=status))
    return rows, rankings, data["class_id"].tolist()


def select(case: Case, rows: np.ndarray) -> Case:
    candidates_, rankings, truth = case
    return [candidates_[row] for row in rows], [rankings[row] for row in rows], [truth[row] for row in rows]


@needs_data
@pytest.mark.parametrize(("name", "fused_at_least", "asked_at_most"), [("cars", 0.71, 0.6), ("aircraft", 0.49, 0.95)])
def test_replayed_gpt4v_rankings(name: str, fused_at_least: float, asked_at_most: float) -> None:
    """Real CLIP candidates and GPT-4V answers: fitted on 20 %, measured on the rest."""
    case, results = replay(name, 10), []
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(case[0]))
        fitted_on, measured_on = np.split(order, [len(order) // 5])
        calibration = fusion.fit(*select(case, fitted_on))
        new = select(case, measured_on)
        past = [fusion.skips(row, calibration) for row in new[0]]
        skipped = [Ranking(rank.order, RankStatus.SKIPPED) if skip else rank for rank, skip in zip(new[1], past, strict=True)]
        retriever = float(np.mean([row[0].class_id == true for row, true in zip(new[0], new[2], strict=True)]))
        routed = top1((new[0], skipped, new[2]), calibration)
        results.append([retriever, top1(new, calibration), routed, 1 - float(np.mean(past))])
    retriever, fused, routed, asked = np.mean(results, axis=0)
    assert fused >= fused_at_least and fused > retriever + 0.05
    assert routed >= fused - 0.005 and asked <= asked_at_most
