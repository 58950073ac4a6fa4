"""Sentence encoders: pooling against a slow way of its own, the layouts that are read, and what is refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertModel

from rar import miniature
from rar.encoder.sentences import BATCH, SentenceEncoder
from rar.schema import UserError
from tests import tiny_bert

NAMES = ["herring gull", "gull", "a tawny owl at night", "owl", "red", "GULL", "gull " * 200]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_bert.write(tmp_path / "bert")


def put(file: Path, data: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data))


def slowly(folder: Path, text: str, pooling: str) -> np.ndarray:
    """One text at a time, so that nothing is padded, pooled by numpy."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    ids = tokenizer(text, truncation=True, max_length=30)["input_ids"]
    with torch.inference_mode():
        states = model.eval()(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy().astype(np.float64)
    vector = states[0] if pooling == "cls" else np.array([column.sum() / len(ids) for column in states.T])
    return vector / np.sqrt((vector**2).sum())


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vectors_are_those_of_one_text_at_a_time(pooling: str, folder: Path) -> None:
    """In one batch with longer ones, and cut at the model's length; 32 positions less 2."""
    if pooling == "cls":
        put(folder / "1_Pooling/config.json", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    made = SentenceEncoder(str(folder))
    found = made.embed(NAMES)
    assert found.shape == (len(NAMES), made.dim) and found.dtype == np.float32
    np.testing.assert_allclose(found, [slowly(folder, name, pooling) for name in NAMES], atol=1e-5)
    np.testing.assert_array_equal(made.embed([]), np.zeros((0, made.dim)))
    many = made.embed(NAMES * BATCH)
    np.testing.assert_allclose(many, np.tile(found, (BATCH, 1)), atol=1e-5)


def test_the_two_poolings_differ_and_the_newer_spelling_is_read(folder: Path) -> None:
    mean = SentenceEncoder(str(folder)).embed(NAMES)
    put(folder / "1_Pooling/config.json", {"embedding_dimension": 16, "pooling_mode": "cls"})
    assert np.abs(SentenceEncoder(str(folder)).embed(NAMES) - mean).max() > 0.05


def test_the_layout_of_sentence_transformers_is_read(folder: Path, tmp_path: Path) -> None:
    """Weights in a folder of their own, a shorter length, lower case; a pooler that was not saved is not missed."""
    shutil.copytree(folder, tmp_path / "st/0_Transformer")
    BertModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(tmp_path / "st/0_Transformer")
    kinds = {"0_Transformer": "Transformer", "9_Pooling": "Pooling", "2_Normalize": "Normalize"}
    put(tmp_path / "st/modules.json", [{"path": path, "type": f"a.b.{kind}"} for path, kind in kinds.items()])
    put(tmp_path / "st/9_Pooling/config.json", {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False})
    put(tmp_path / "st/0_Transformer/sentence_bert_config.json", {"max_seq_length": 4, "do_lower_case": True})
    made = SentenceEncoder(str(tmp_path / "st"))
    long, short, loud = made.embed(["a tawny owl at night", "a tawny", "A TAWNY"])
    np.testing.assert_allclose(long, short, atol=1e-5)
    np.testing.assert_array_equal(short, loud)


def broken(folder: Path, fault: str) -> None:
    if fault == "Dense":
        put(folder / "modules.json", [{"path": "", "type": "a.Transformer"}, {"path": "2_Dense", "type": "a.models.Dense"}])
    elif fault == "max":
        put(folder / "1_Pooling/config.json", {"pooling_mode_max_tokens": True})
    elif fault == "mean and max":
        put(folder / "1_Pooling/config.json", {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True})
    elif fault == "prompt":
        put(folder / "config_sentence_transformers.json", {"prompts": {"q": "query: "}, "default_prompt_name": "q"})
    elif fault == "no JSON":
        (folder / "modules.json").write_text("[")
    elif fault == "its weights":
        state = BertModel.from_pretrained(folder).state_dict()
        kept = {name: tensor for name, tensor in state.items() if "layer.0.attention" not in name}
        BertModel.from_pretrained(folder).save_pretrained(folder, state_dict=kept)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("Dense", "ends in a module 'Dense'; only Transformer, Pooling, Normalize are done"),
        ("max", "pools by max; one of mean and cls is done"),
        ("mean and max", "pools by max and mean; one of mean and cls is done"),
        ("prompt", "puts a prompt before each text"),
        ("no JSON", "modules.json is no JSON"),
        ("its weights", "of its weights, the first is"),
    ],
)
def test_what_is_not_done_is_refused_in_one_line(fault: str, said: str, folder: Path) -> None:
    broken(folder, fault)
    with pytest.raises(UserError) as refused:
        SentenceEncoder(str(folder))
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_other_folders_are_no_sentence_encoders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, said in (
        (str(tmp_path / "none"), "--judge: there is no folder"),
        (str(tmp_path / "empty"), "neither config.json nor modules.json"),
        (str(miniature.MLLM), "--judge: .* holds no encoder of text alone"),
    ):
        with pytest.raises(UserError, match=said) as refused:
            SentenceEncoder(folder, "--judge")
        assert "\n" not in str(refused.value)
