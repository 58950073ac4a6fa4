"""What is trained is what ranking reads: losses against the ranker's own scores, on tiny checkpoints of all families."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from transformers.utils import is_num2words_available

from rar.config import Ranker, Tune
from rar.ranker import naming, prefix
from rar.ranker.mllm import Prompt
from rar.ranker.prompt import generate_answer, generate_prompt
from rar.ranker.rank import MllmRanker
from rar.schema import UserError
from rar.tune import losses, spoken
from rar.tune.draw import Lesson
from rar.tune.features import Features
from rar.tune.lessons import Teacher
from rar.tune.pictures import Pictures
from rar.tune.train import trainable
from tests.tiny_mllm import FAMILIES, save_family, save_llava

LESSONS = [
    Lesson(0, ["red cat", "blue dog", "big green cat"], [1, 0, 2], 1),
    Lesson(1, ["small bird", "cat"], [0, 1], 0),
    Lesson(2, ["dog", "bird", "red bird", "cat"], [3, 0, 1, 2], 3),
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    root, records = tmp_path_factory.mktemp("pictures"), []
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
        records.append({"uri": str(root / f"{number}.png"), "offset": None, "size": None, "picture": None})
    return Pictures(pa.Table.from_pylist(records))


@pytest.fixture(params=FAMILIES)
def ranker(request: pytest.FixtureRequest, tmp_path: Path) -> MllmRanker:
    if request.param == "smolvlm" and not is_num2words_available():
        pytest.skip("SmolVLM's processor needs num2words")
    return MllmRanker(Ranker(device="cpu"), str(save_family(tmp_path / "model", request.param)))


def teacher(ranker: MllmRanker, pictures: Pictures, method: str = "letters", **more: bool) -> Teacher:
    return Teacher(ranker.mllm, ranker.wording, pictures, method=method, **{"as_text": False, **more})


def test_the_loss_is_the_score_that_ranking_gives_and_an_adapter_learns_by_it(ranker: MllmRanker, pictures: Pictures) -> None:
    images = pictures([lesson.row for lesson in LESSONS])
    batch = teacher(ranker, pictures)(LESSONS)
    table = losses.label_table(ranker.label_forms, torch.device("cpu"))
    model = ranker.mllm.model

    def loss() -> torch.Tensor:
        logits = model(**batch["model"], **ranker.mllm.last_only, use_cache=False).logits[:, -1]
        parts = (batch["shown"], batch["answer"], batch["order"])
        return losses.of_labels(logits, table, *parts, mass=0.0, listwise=0.0)

    ranked = ranker.rank(images, [lesson.names for lesson in LESSONS])
    scores = [one.scores[lesson.answer] for one, lesson in zip(ranked, LESSONS, strict=True)]
    first = loss()
    assert first.item() == pytest.approx(-float(np.mean(scores)), abs=1e-4)
    model = ranker.mllm.model = trainable(ranker, Tune(lora_rank=4))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert names and not any(part in name for name in names for part in ("vision", "visual", "lm_head"))
    assert loss().item() == pytest.approx(first.item(), abs=1e-4)  # a new adapter does nothing
    optimiser = torch.optim.AdamW(trained, lr=0.02)
    for _ in range(4):
        optimiser.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert loss().item() < first.item()


def test_a_reply_as_text_is_scored_as_likelihood_scores_it(ranker: MllmRanker, pictures: Pictures) -> None:
    lessons = LESSONS[:2]
    batch = teacher(ranker, pictures, "generate", as_text=True)(lessons)
    with torch.inference_mode():
        logits = ranker.mllm.model(**batch["model"], use_cache=False).logits
        found = [float(losses.of_text(logits[row : row + 1], *_row(batch, row))) for row in range(len(lessons))]
    replies = [generate_answer([lesson.names[place] for place in lesson.order]) for lesson in lessons]
    texts = ranker.mllm.render([generate_prompt(lesson.names) for lesson in lessons])
    prompts = [Prompt(row, 0, [pictures([row])[0]], text) for row, text in enumerate(texts)]
    ids = naming.replies(ranker.mllm, texts, [[reply] for reply in replies])
    means = {prompt.row: mean[0] for prompt, mean, *_ in prefix.scores(ranker.mllm, prompts, ids, mean=True)}
    assert found == pytest.approx([-means[row] for row in range(len(lessons))], abs=1e-3)


@pytest.mark.parametrize("method", ["likelihood", "first"])
def test_names_as_labels_are_what_is_read_and_an_adapter_learns_by_them(
    ranker: MllmRanker, pictures: Pictures, tmp_path: Path, method: Literal["likelihood", "first"]
) -> None:
    reads = MllmRanker(Ranker(device="cpu", method=method), str(tmp_path / "model"))
    ranked = reads.rank(pictures([lesson.row for lesson in LESSONS]), [lesson.names for lesson in LESSONS])
    scores = [one.scores[lesson.answer] for one, lesson in zip(ranked, LESSONS, strict=True)]
    batch = teacher(ranker, pictures, method, anchored=True)(LESSONS)
    given, mllm = batch["spoken"], ranker.mllm
    assert (batch["anchor"] is given) == (method == "likelihood") and "model" not in batch
    assert method == "likelihood" or {len(row.ids) - 1 for row in batch["anchor"].rows} == {2}
    before = spoken.logs_of(mllm, given)

    def loss() -> torch.Tensor:
        return losses.of_names(spoken.written(spoken.logs_of(mllm, given), given), mean=method == "likelihood")

    first = loss()
    assert first.item() == pytest.approx(-float(np.mean(scores)), abs=1e-4)
    model = mllm.model = trainable(ranker, Tune(lora_rank=4))
    assert losses.drift(before, spoken.logs_of(mllm, given)).item() == pytest.approx(0, abs=1e-5)
    optimiser = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.003)
    for _ in range(6):
        optimiser.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert loss().item() < first.item()
    assert losses.drift(before, spoken.logs_of(mllm, given)).item() > 1e-5
    with torch.no_grad(), model.disable_adapter():
        assert losses.drift(before, spoken.logs_of(mllm, given)).item() == pytest.approx(0, abs=1e-5)


def test_of_names_and_drift_are_loops() -> None:
    torch.manual_seed(0)
    written = [[torch.randn(4), torch.randn(2)], [torch.randn(3), torch.randn(3), torch.randn(1)]]
    for mean in (False, True):
        total = 0.0
        for row in written:
            scores = [float(one.sum()) / (len(one) if mean else 1) for one in row]
            total -= scores[0] - float(np.logaddexp.reduce(scores))
        assert float(losses.of_names(written, mean=mean)) == pytest.approx(total / 2, abs=1e-5)
    then, now = ([[torch.randn(2, 5).log_softmax(-1), torch.randn(1, 5).log_softmax(-1)]] for _ in range(2))
    divergences = [
        sum(np.exp(p) * (p - q) for p, q in zip(one.tolist(), other.tolist(), strict=True))
        for before, after in zip(then[0], now[0], strict=True)
        for one, other in zip(before, after, strict=True)
    ]
    assert float(losses.drift(then, now)) == pytest.approx(np.mean(divergences), abs=1e-5)


def test_features_stand_for_pixels_and_are_computed_once(ranker: MllmRanker, pictures: Pictures) -> None:
    mllm, lists = ranker.mllm, [["red cat", "cat"], ["small bird"], ["dog", "bird"]]
    prompts = [Prompt(row, 0, pictures([row]), text) for row, text in enumerate(mllm.render(["Name it."] * 3))]

    def seen() -> tuple[torch.Tensor, list[np.ndarray]]:
        with torch.inference_mode():
            logits = mllm.model(**teacher(ranker, pictures)(LESSONS)["model"], use_cache=False).logits[:, -1]
        ids = naming.replies(mllm, [prompt.text for prompt in prompts], lists)
        found = {prompt.row: means for prompt, means, *_ in prefix.scores(mllm, prompts, ids, mean=True)}
        return logits, [found[row] for row in range(3)]

    logits, means = seen()
    assert Features.fit(mllm)
    features = mllm.features = Features(mllm)
    assert not any(key.startswith("pixel_") for key in teacher(ranker, pictures)(LESSONS)["model"])
    for _ in range(2):
        again, likely = seen()
        assert torch.allclose(again, logits, atol=1e-4)
        assert all(np.allclose(one, other, atol=1e-4) for one, other in zip(likely, means, strict=True))
    assert features.computed == len(features.known) == 3
    small = mllm.features = Features(mllm, kept=features.kept - features.left)  # room for all
    seen()
    assert small.left == 0 and small.computed == 3
    none = mllm.features = Features(mllm, kept=0)
    seen()
    assert not none.known and none.left == 0 and none.computed == 6


def _row(batch: dict[str, torch.Tensor], row: int) -> tuple[torch.Tensor, torch.Tensor]:
    return batch["model"]["input_ids"][row : row + 1], batch["reply"][row : row + 1]  # type: ignore[index,call-overload]


def test_rank_net_is_a_loop_over_pairs() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 5)
    order = torch.tensor([[3, 0, 1, 4, 2], [1, 2, 0, -1, -1]])
    means = []
    for row, places in ((0, [3, 0, 1, 4, 2]), (1, [1, 2, 0])):
        total = weights = 0.0
        for better in range(len(places)):
            for worse in range(better + 1, len(places)):
                weight = 1 / (better + 1 + worse + 1)
                gap = float(scores[row, places[worse]] - scores[row, places[better]])
                total += weight * float(np.log1p(np.exp(gap)))
                weights += weight
        means.append(total / weights)
    assert float(losses.rank_net(scores, order)) == pytest.approx(np.mean(means), abs=1e-5)


def test_mass_draws_the_first_token_to_labels() -> None:
    logits = torch.zeros(1, 10, requires_grad=True)
    table = losses.label_table([(1,), (2, 3)], torch.device("cpu"))
    given = (logits, table, torch.tensor([2]), torch.tensor([0]), torch.tensor([[0, 1]]))
    plain, more = (losses.of_labels(*given, mass=mass, listwise=0.0).item() for mass in (0.0, 1.0))
    assert plain == pytest.approx(np.log(3)) and more - plain == pytest.approx(np.log(10 / 3))


def test_none_of_these_is_the_label_after_the_last_name(tmp_path: Path, pictures: Pictures) -> None:
    ranker = MllmRanker(Ranker(device="cpu"), str(save_llava(tmp_path / "llava")))
    lesson = Lesson(0, ["cat", "dog"], [0, 1], 2, True)
    batch = teacher(ranker, pictures)([lesson])
    assert batch["shown"].tolist() == [3] and batch["answer"].tolist() == [2]
    asked = MllmRanker(Ranker(device="cpu", none_of_these=True), str(tmp_path / "llava"))
    (ranking,) = asked.rank(pictures([0]), [lesson.names])
    logits = ranker.mllm.model(**batch["model"]).logits[:, -1]
    table = losses.label_table(ranker.label_forms, torch.device("cpu"))
    given = (logits, table, batch["shown"], batch["answer"], batch["order"])
    chance = float(torch.exp(-losses.of_labels(*given, mass=0.0, listwise=0.0)))
    assert chance == pytest.approx(float(ranking.response.rpartition(": ")[2]), abs=1e-4)


def test_a_list_beyond_the_window_is_one_line(tmp_path: Path, pictures: Pictures) -> None:
    ranker = MllmRanker(Ranker(device="cpu"), str(save_llava(tmp_path / "short", window=48)))
    with pytest.raises(UserError, match=r"a list of 12 candidates takes \d+ tokens, and .* reads 48: lower tune.max_list"):
        teacher(ranker, pictures)([Lesson(0, ["red cat"] * 12, list(range(12)), 0)])


def test_a_picture_that_is_gone_is_one_line(tmp_path: Path) -> None:
    gone = Pictures(pa.table({"uri": [str(tmp_path / "no.png")], "offset": [None], "size": [None], "picture": [None]}))
    with pytest.raises(UserError, match="was read before and cannot be now"):
        gone([0])
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    (tmp_path / "no.png").write_bytes(file.getvalue()[:40])
    with pytest.raises(UserError, match="was read before and cannot be now"):
        gone([0])
