"""The drawn world, its files, its tokenizers and what is committed of the models. Not covered: how well the models do."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

from rar import miniature
from rar.miniature import data
from rar.miniature.world import (
    COLOURS,
    MARKINGS,
    PATTERNS,
    SHAPES,
    Spec,
    all_classes,
    families,
    paste,
    render,
    rng_of,
    vocabulary,
)
from rar.ranker.prompt import generate_answer, generate_prompt, letters_prompt
from rar.ranker.wording import LABELS

SEEDS, SPLITS = range(9), ("train", "validation", "novel")

specs = st.builds(Spec, st.sampled_from(SHAPES), st.sampled_from(COLOURS), st.sampled_from(PATTERNS), st.sampled_from(MARKINGS))


def test_a_class_is_named_by_what_it_shows() -> None:
    assert Spec("heart", "teal", "striped", "chevron").name == "striped teal heart with chevron"


def test_splits_share_no_family_and_leave_none_out() -> None:
    split = {name: set(families(name)) for name in SPLITS}
    assert {name: len(pairs) for name, pairs in split.items()} == {"train": 70, "validation": 10, "novel": 20}
    assert len(set.union(*split.values())) == 100 == len(SHAPES) * len(COLOURS)


@pytest.mark.parametrize("split", SPLITS)
def test_every_shape_and_every_colour_is_in_every_split(split: str) -> None:
    assert {shape for shape, _ in families(split)} == set(SHAPES)
    assert {colour for _, colour in families(split)} == set(COLOURS)


def test_no_name_stands_for_two_classes() -> None:
    names = [spec.name for split in SPLITS for spec in all_classes(split)]
    assert len(names) == len(set(names)) == 100 * 54


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_vocabulary_is_120_classes_of_its_split_with_two_siblings_each(split: str, seed: int) -> None:
    chosen = vocabulary(split, seed)
    assert len(chosen) == len(set(chosen)) == 120
    assert set(chosen) <= set(all_classes(split))
    siblings = Counter((spec.shape, spec.colour, spec.pattern) for spec in chosen)
    assert set(siblings.values()) == {3}
    assert chosen == vocabulary(split, seed)


def test_novel_vocabularies_are_disjoint() -> None:
    drawn = [spec for seed in SEEDS for spec in vocabulary("novel", seed)]
    assert len(drawn) == len(set(drawn)) == 9 * 120


def test_other_vocabularies_differ() -> None:
    for split in ("train", "validation"):
        assert len({tuple(vocabulary(split, seed)) for seed in SEEDS}) == 9


@pytest.mark.parametrize("seed", [-1, 9])
def test_world_seeds_end(seed: int) -> None:
    with pytest.raises(ValueError, match=r"0\.\.8"):
        vocabulary("novel", seed)


@settings(max_examples=20)
@given(specs, st.integers(0, 999))
def test_a_photo_is_a_function_of_its_key(spec: Spec, number: int) -> None:
    first = render(spec, 64, rng_of(0, "test", spec.name, number))
    assert first.shape == (64, 64, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, render(spec, 64, rng_of(0, "test", spec.name, number)))
    for key in ((0, "test", spec.name, number + 1), (1, "test", spec.name, number), (0, "other", spec.name, number)):
        assert (first != render(spec, 64, rng_of(*key))).any()


@settings(max_examples=30)
@given(specs, st.floats(12, 60), st.floats(-0.3, 1.3), st.floats(-0.3, 1.3), st.integers(0, 99))
def test_the_box_of_an_object_is_tight(spec: Spec, radius: float, x: float, y: float, seed: int) -> None:
    """Against the pixels that a flat picture loses; half-covered ones at the edge may count or not. May leave the picture."""
    flat = np.full((120, 160, 3), -9.0, np.float32)
    image = flat.copy()
    centre = (radius / 2 + x * (160 - radius), radius / 2 + y * (120 - radius))
    centre = (min(max(centre[0], 0), 160), min(max(centre[1], 0), 120))
    box_xyxy = paste(image, spec, centre, radius, np.random.default_rng(seed))
    rows, columns = (np.nonzero((image != flat).any(axis=(2, axis)))[0] for axis in (1, 0))
    touched = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    np.testing.assert_allclose(box_xyxy, touched, atol=2)
    assert 0 <= box_xyxy[0] < box_xyxy[2] <= 160 and 0 <= box_xyxy[1] < box_xyxy[3] <= 120


def test_a_world_holds_what_it_says(world: Path) -> None:
    for group, split in (("novel", "novel"), ("seen", "train")):
        names = sorted(spec.name for spec in vocabulary(split, 0))
        for part, count in (("support", 2), ("test", 1)):
            photos = Counter(file.parent.name for file in (world / group / part).glob("*/*.png"))
            assert sorted(photos) == names and set(photos.values()) == {count}
    assert len(list((world / "scenes").glob("*.jpg"))) == 4
    photo = Image.open(next((world / "novel" / "test").glob("*/*.png")))
    assert photo.size == (data.DRAWN, data.DRAWN) and photo.mode == "RGB"


def test_no_photo_comes_twice(world: Path) -> None:
    digests = [hashlib.sha256(Image.open(file).tobytes()).hexdigest() for file in world.glob("*/*/*/*.png")]
    assert len(digests) == len(set(digests)) == 2 * 120 * 3


def test_no_photo_is_a_training_photo(world: Path) -> None:
    spec = vocabulary("train", 0)[0]
    drawn = [Image.open(file).tobytes() for file in world.glob(f"seen/*/{spec.name}/*.png")]
    trained = [render(spec, data.DRAWN, rng_of(0, "train", spec.name, number)).tobytes() for number in range(24)]
    assert len(drawn) == 3 and not set(drawn) & set(trained)


def test_a_world_that_stands_is_left_alone_and_another_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "vocabulary", lambda split, seed: vocabulary(split, seed)[:2])
    monkeypatch.setattr(data, "DETECTED", {"frequent": 2, "common": 1, "rare": 1})
    monkeypatch.setattr(data, "_check", lambda folder, expected: None)
    folder = tmp_path / "world"
    data.write_world(folder, 0, shots=1, tests=1, scenes=1)
    photo = next(folder.glob("novel/test/*/*.png"))
    drawn = photo.read_bytes()
    photo.write_bytes(b"kept")
    data.write_world(folder, 0, shots=1, tests=1, scenes=1)
    assert photo.read_bytes() == b"kept"
    data.write_world(folder, 0, shots=2, tests=1, scenes=1)
    assert photo.read_bytes() == drawn
    assert len(list(folder.glob("novel/support/*/*.png"))) == 4


def test_scenes_hold_three_groups_of_classes() -> None:
    chosen, frequencies = data.scene_classes(0)
    assert Counter(frequencies) == {"frequent": 60, "common": 60, "rare": 60}
    assert len(set(chosen)) == 180
    trained = set(all_classes("train"))
    for spec, frequency in zip(chosen, frequencies, strict=True):
        assert (spec in trained) == (frequency == "frequent")
        assert spec in vocabulary("train" if frequency == "frequent" else "novel", 0)


def test_the_scenes_json_is_coco(world: Path) -> None:
    truth = json.loads((world / "scenes.json").read_text())
    chosen, frequencies = data.scene_classes(0)
    assert [(one["id"], one["name"], one["frequency"]) for one in truth["categories"]] == [
        (number + 1, spec.name, frequency[0]) for number, (spec, frequency) in enumerate(zip(chosen, frequencies, strict=True))
    ]
    sizes = {one["id"]: Image.open(world / one["file_name"]).size for one in truth["images"]}
    assert [(one["width"], one["height"]) for one in truth["images"]] == list(sizes.values()) == [(320, 256)] * 4
    assert len({one["id"] for one in truth["annotations"]}) == len(truth["annotations"])
    for one in truth["annotations"]:
        left, top, width, height = one["bbox"]
        assert 0 <= left < left + width <= 320 and 0 <= top < top + height <= 256
        assert width >= 8 and height >= 8 and one["area"] == width * height and one["iscrowd"] == 0
        assert one["category_id"] in range(1, 181)
    assert {one["image_id"] for one in truth["annotations"]} == set(sizes)


def test_the_scenes_boxes_are_where_the_pixels_changed(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same objects on a flat ground: every pixel that changed lies in a box, and each box is filled to its sides."""
    monkeypatch.setattr(data, "background", lambda height, width, rng: np.full((height, width, 3), -9.0, np.float32))
    monkeypatch.setattr(data, "finish", lambda image, rng: image)
    image, placed = data.draw_scene(*data.scene_classes(0), rng_of(0, "scene", 0))
    changed = (image != -9.0).any(axis=2)
    outside = changed.copy()
    for one in placed:
        left, top, right, bottom = (int(value) for value in one["box_xyxy"])
        outside[max(top - 2, 0) : bottom + 2, max(left - 2, 0) : right + 2] = False
        inside = changed[top:bottom, left:right]
        for side in (inside[:2], inside[-2:], inside[:, :2], inside[:, -2:]):
            assert side.any()
    assert changed.any() and not outside.any()


def test_a_scenes_json_and_picture_are_of_one_drawing(world: Path) -> None:
    truth = json.loads((world / "scenes.json").read_text())
    for number in range(4):
        image, placed = data.draw_scene(*data.scene_classes(0), rng_of(0, "scene", number))
        stored = np.asarray(Image.open(world / "scenes" / f"{number:05d}.jpg"))
        assert np.abs(stored.astype(int) - image).mean() < 5  # JPEG
        found = [(a["category_id"], a["bbox"]) for a in truth["annotations"] if a["image_id"] == number + 1]
        assert found == [(one["spec"] + 1, xywh(one["box_xyxy"])) for one in placed]


def xywh(box_xyxy: Sequence[float]) -> list[float]:
    left, top, right, bottom = box_xyxy
    return [left, top, right - left, bottom - top]


def test_noisy_proposals_lie_near_their_objects_and_the_better_ones_score_higher() -> None:
    box = [100.0, 80.0, 40.0, 40.0]
    pictures = [{"id": n, "width": 320, "height": 256} for n in range(400)]
    scenes = {"images": pictures, "annotations": [{"image_id": n, "bbox": box} for n in range(400)]}
    found = data.noisy_proposals(scenes, 0)
    assert found == data.noisy_proposals(scenes, 0) != data.noisy_proposals(scenes, 1)
    near = [one for one in found if np.abs(np.array(one["bbox"]) - box).max() < 20]
    assert 0.85 * 400 < len({one["image_id"] for one in near}) < 400 < len(near)
    errors = [np.abs(np.array(one["bbox"]) - box).mean() for one in near]
    assert np.corrcoef(errors, [one["score"] for one in near])[0, 1] < 0
    strays = [one["score"] for one in found if one not in near]
    assert np.mean(strays) < 0.3 < 0.7 < np.mean([one["score"] for one in near])


def test_render_all_is_ordered_by_class_and_cached(tmp_path: Path) -> None:
    chosen = vocabulary("validation", 0)[:3]
    pixels = data.render_all(chosen, "validation", 2, 0)
    assert pixels.shape == (6, data.KEPT, data.KEPT, 3)
    photo = render(chosen[1], data.DRAWN, rng_of(0, "validation", chosen[1].name, 1))
    np.testing.assert_array_equal(pixels[3], data.reduced(photo))
    cached = [data.render_all(chosen, "validation", 2, 0, tmp_path / "pixels.npy") for _ in range(2)]
    for each in cached:
        np.testing.assert_array_equal(each, pixels)


EVERY_WORD = [Spec(SHAPES[n % 10], COLOURS[n % 10], PATTERNS[n % 6], MARKINGS[n % 9]).name for n in range(20)]


def test_the_clip_tokenizer_knows_every_word() -> None:
    from rar.miniature.tokens import TEMPLATE, clip_tokenizer

    tokenizer = clip_tokenizer()
    for name in EVERY_WORD:
        assert tokenizer.unk_token_id not in tokenizer(TEMPLATE.format(name)).input_ids
    assert tokenizer.unk_token_id in tokenizer("a zebra").input_ids


def test_the_mllm_tokenizer_knows_every_word() -> None:
    from rar.miniature.tokens import CAPTION, mllm_tokenizer

    tokenizer = mllm_tokenizer()
    prompts = [ask(EVERY_WORD) for ask in (letters_prompt, generate_prompt, generate_answer)]
    for text in (CAPTION, "USER: ASSISTANT:", ". ".join(LABELS), *prompts):
        assert tokenizer.unk_token_id not in tokenizer(text).input_ids
    assert tokenizer.unk_token_id in tokenizer("a zebra").input_ids


def test_a_label_is_one_token_and_labels_lie_side_by_side() -> None:
    from rar.miniature.tokens import mllm_tokenizer

    ids = mllm_tokenizer()(LABELS[0] + " " + " ".join(LABELS), add_special_tokens=False).input_ids
    assert ids[1:] == list(range(ids[0], ids[0] + 26))


def test_the_text_towers_last_token_has_the_highest_id() -> None:
    """open_clip's text tower pools where the id is highest."""
    from rar.miniature.tokens import TEMPLATE, clip_tokenizer

    tokenizer = clip_tokenizer()
    for row in tokenizer([TEMPLATE.format(name) for name in EVERY_WORD]).input_ids:
        assert row[0] == tokenizer.bos_token_id
        assert row[-1] == tokenizer.eos_token_id == max(tokenizer.get_vocab().values())
        assert row.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("which", ["clip", "mllm"])
def test_the_committed_tokenizers_are_the_codes(which: str) -> None:
    from transformers import PreTrainedTokenizerFast

    from rar.miniature.tokens import clip_tokenizer, mllm_tokenizer

    folder, tokenizer = {"clip": (miniature.CLIP, clip_tokenizer()), "mllm": (miniature.MLLM, mllm_tokenizer())}[which]
    assert PreTrainedTokenizerFast.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()


def test_the_committed_weights_are_small_and_complete() -> None:
    assert sum(file.stat().st_size for file in miniature.WEIGHTS.rglob("*")) < 12 << 20
    clip = json.loads((miniature.CLIP / "open_clip_config.json").read_text())
    assert set(clip) == {"model_cfg", "preprocess_cfg"}
    assert json.loads((miniature.MLLM / "config.json").read_text())["architectures"] == ["LlavaForConditionalGeneration"]
    for file in ("model.safetensors", "processor_config.json", "chat_template.jinja"):
        assert (miniature.MLLM / file).is_file()


def test_the_committed_chat_template_is_the_codes() -> None:
    from rar.miniature.train_mllm import TEMPLATE

    assert (miniature.MLLM / "chat_template.jinja").read_text() == TEMPLATE


def test_where_the_listed_names_end() -> None:
    """Two letter questions, one shorter: 5 is A, 6 B, 7 C; 4 is Answer; 40 and more are other words; 3 ends a turn."""
    import torch

    from rar.miniature.train_mllm import IGNORE, name_ends

    asked = [[40, 5, 41, 42, 6, 43, 7, 44, 45, 4, 46], [40, 5, 41, 6, 42, 43, 44, 4, 46]]
    ids = torch.tensor([[*asked[0], 6, 3], [*asked[1], 5, 3, 0, 0]])
    labels = torch.tensor([[IGNORE] * 11 + [6, 3], [IGNORE] * 9 + [5, 3] + [IGNORE] * 2])
    ends, right = name_ends(ids, labels, 5, 4)
    assert [row.nonzero()[:, 0].tolist() for row in ends] == [[3, 5, 8], [2, 6]]
    assert [row.nonzero()[:, 0].tolist() for row in right] == [[5], [2]]


def test_where_the_names_of_a_real_question_end() -> None:
    import torch

    from rar.miniature.train_mllm import Asker, name_ends, stack

    asker = Asker(vocabulary("train", 0))
    order = np.array([4, 9, 2, 7])
    ids, labels = stack([asker.letter(2, order), asker.letter(9, order[:2])])
    ends, right = name_ends(ids, labels, asker.first_label, asker.answer)
    ending = [[asker.tokenizer.decode(ids[row, place]) for place in ends[row].nonzero()[:, 0]] for row in range(2)]
    assert ending == [[asker.specs[number].marking for number in numbers] for numbers in (order, order[:2])]
    assert torch.equal(right.sum(1), torch.tensor([1, 1]))
    assert ends[0].nonzero()[2, 0] == right[0].nonzero()[0, 0]
    assert ends[1].nonzero()[1, 0] == right[1].nonzero()[0, 0]


def test_the_mllm_reads_the_question_that_it_was_trained_on() -> None:
    """The chat template, as a user of transformers applies it, gives the tokens of training, but for the image's length."""
    from transformers import LlavaProcessor

    from rar.miniature.train_mllm import IGNORE, IMAGE_TOKENS, Asker

    asker = Asker(vocabulary("train", 0))
    ids, labels = asker.letter(3, np.array([3, 1]))
    asked = ids[: labels.index(next(label for label in labels if label != IGNORE))]
    prompt = letters_prompt([asker.specs[number].name for number in (3, 1)])
    content: Any = [{"type": "image"}, {"type": "text", "text": prompt}]
    processor = LlavaProcessor.from_pretrained(miniature.MLLM)
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    batch = processor(images=[Image.new("RGB", (96, 96))], text=[text], return_tensors="pt")
    assert batch["input_ids"][0].tolist() == asked
    assert [asker.tokenizer.decode(one) for one in asked].count("<image>") == IMAGE_TOKENS


def test_a_trained_retriever_can_be_saved_and_loaded(tmp_path: Path) -> None:
    """The folder that training writes is one that the encoder reads, with the numbers that were trained."""
    import torch

    from rar.config import Encoder
    from rar.encoder.towers import ClipEncoder
    from rar.miniature import train_clip

    torch.manual_seed(0)
    model = train_clip.new_model(32, 8).eval()
    train_clip.save(model, 32, 8, tmp_path / "clip")
    names = [spec.name for spec in vocabulary("novel", 0)[:4]]
    encoder = ClipEncoder(Encoder(model=str(tmp_path / "clip"), templates=["a photo of a {}."]))
    with torch.inference_mode():
        expected = train_clip.encode_names(model, names).numpy()
    assert (encoder.prototypes(names) * expected).sum(axis=1) == pytest.approx(1, abs=1e-3)  # saved as fp16


def test_the_towers_tensors_have_the_names_that_vllm_looks_for() -> None:
    with safe_open(miniature.MLLM / "model.safetensors", "pt") as weights:
        tower = [name for name in weights.keys() if name.startswith("vision_tower.")]  # noqa: SIM118
    assert len(tower) > 50 and all(name.startswith("vision_tower.vision_model.") for name in tower)
