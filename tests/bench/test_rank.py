"""The ranker's benches on a few images: every row is there, and both sides do the same work.

Not covered: speed, which `rar bench rank` measures; a GPU.
"""

from __future__ import annotations

import re

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from rar import miniature
from rar.bench import consistency, rank
from rar.config import Ranker
from rar.ranker.rank import MllmRanker


def test_rows_and_split():
    result = rank.run(images=3, repeats=1)
    rows = result["rows"]["letters"]
    assert {"ours", "reference", "ratio"} <= rows["paper"].keys() & rows["bare_forward"].keys()
    assert rows["paper"]["ratio"] > 1
    assert set(result["split"]) == {"template", "processor", "forward", "whole"} and min(result["split"].values()) > 0


def test_the_reference_ranks_and_the_forward_is_that_of_letters():
    work = rank.draw(4)
    ranker = MllmRanker(Ranker(batch_size=4, device="cpu"), str(miniature.MLLM))
    sorted_names = rank.paper_loop(ranker, work)
    written = MllmRanker(Ranker(method="generate", device="cpu"), str(miniature.MLLM)).rank(work.images, work.names)
    assert sorted_names == [re.findall(r"' (.+?) '", one.response) for one in written]
    (logits,) = rank.bare_forward(ranker, rank.prepare(ranker, work))
    order = sorted(range(4), key=lambda row: len(rank._prompts(ranker, work)[row].text))
    rankings = ranker.rank(work.images, work.names)
    labels = logits[:, [forms[0] for forms in ranker.label_forms[:5]]].log_softmax(-1)
    torch.testing.assert_close(
        labels.double(), torch.tensor([rankings[row].scores for row in order]).double(), atol=1e-4, rtol=0
    )


def test_random_weights_of_a_small_architecture():
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
        ),
        text_config=LlamaConfig(
            vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        ),
    )
    result = rank.random_weights(images=2, repeats=1, reply_tokens=5, config=config, device="cpu")
    assert result["use"]["tokens_per_s"] > 0 and result["use"]["tflops"] > 0
    assert result["rows"]["letters"]["paper"]["ratio"] > 0


def test_forced_replies_have_their_length():
    ranker = MllmRanker(Ranker(device="cpu"), str(miniature.MLLM))
    lengths = []
    ranker.mllm.model.register_forward_pre_hook(lambda *_: lengths.append(1))
    rank.paper_loop(ranker, rank.draw(1), forced_tokens=9)
    assert len(lengths) == 9  # a pass a token


def test_architecture_of_7b_has_seven_billion_parameters():
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(rank.llava_7b())
    assert 6.9e9 < sum(weight.numel() for weight in model.parameters()) < 7.2e9


def test_consistency_measures_every_way():
    pictures, candidates, truth = consistency.draw(6, seed=0)
    names = [[candidate.class_name for candidate in row] for row in candidates]
    row = consistency.measure(Ranker(device="cpu"), pictures, names, candidates, truth)
    assert set(row) == {"top1", "fused", "order_decides", "images_per_s"}
    assert 0 <= row["order_decides"] <= 1 and row["top1"] > 0.3
    assert consistency.share([1, 2], [1, 3]) == 0.5
    assert all(isinstance(Ranker(**settings), Ranker) for settings in consistency.WAYS.values())
    assert np.array_equal(consistency.draw(2, seed=0)[0][1], pictures[1])
