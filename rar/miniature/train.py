"""Trains everything: `python -m rar.miniature.train --out DIR` draws photos, trains, measures and writes weights and card.

In order, on two cores: the retriever (CLIP, 32 pixels) beside a CLIP of 64 pixels, whose tower then learns attributes; from it
start the MLLM and the control. The control is a CLIP of the MLLM's resolution and tower, trained contrastively for
as many seconds as the MLLM was: it says what pixels and minutes alone are worth.

Validation families choose; novel classes are looked at once, at the end, for the card. Seeded, but not bit for bit the same
on another processor: bfloat16 kernels differ, and where there are none all is float32.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch

from rar.miniature import data, train_clip, train_mllm, train_tower
from rar.miniature.world import Spec, all_classes, render, rng_of, vocabulary

PER_CLASS, TESTS, TOP_K = 24, 10, 5
STEPS = {"retriever": 480, "clip64": 480, "tower": 700, "mllm": 1800}
CAPTIONS = 600  # steps of a describer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for clip/, mllm/ and card.json")
    parser.add_argument("--cache", type=Path, required=True, help="folder for the drawn photos (1.1 GB)")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all steps; 0.01 tries the script out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--describer", action="store_true", help="only mllm/, taught to name pictures and never shown a list")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    steps = {part: max(2, round(count * options.scale)) for part, count in STEPS.items()}
    if options.describer:
        return describer(options.out, options.cache, steps | {"mllm": max(2, round(CAPTIONS * options.scale))}, options.seed)
    card = train(options.out, options.cache, steps, options.seed)
    (options.out / "card.json").write_text(json.dumps(card, indent=1))
    print(json.dumps(card))


def train(out: Path, cache: Path, steps: dict[str, int], seed: int) -> dict[str, Any]:
    """All models in turn; returns the card: seconds and accuracies of each."""
    specs = all_classes("train")
    pixels = data.render_all(specs, "train", PER_CLASS, seed, cache / f"train-{seed}.npy")
    images = train_clip.Images(pixels, specs, PER_CLASS)
    shapes = {"retriever": (32, 8), "clip64": (train_mllm.SIDE, train_mllm.PATCH)}
    with ProcessPoolExecutor(2) as pool:  # one thread each: two small models fill two cores better than one after the other
        pairs = [(name, side, patch) for name, (side, patch) in shapes.items()]
        states = dict(zip(shapes, pool.map(partial(_train_clip, cache, steps, seed), pairs), strict=True))
    retriever, clip64 = (_restored(shapes[name], states[name]) for name in shapes)
    train_clip.save(retriever, 32, 8, out / "clip")
    seconds: dict[str, float] = {}
    with _timed(seconds, "tower"):
        heads = train_tower.train(clip64, images, steps["tower"], seed)
    mllm = _new_mllm(clip64, seed)
    confusions = train_mllm.Confusions(train_clip.embed(retriever, pixels), _texts(retriever, specs))
    with _timed(seconds, "mllm"):
        train_mllm.train(mllm, images, confusions, steps["mllm"], seed)
    train_mllm.save(mllm, out / "mllm")
    towers = train_tower.accuracy(clip64, heads, *_photos("validation", 0))
    with _timed(seconds, "control"):
        train_control(clip64, images, seconds["mllm"], seed)
    torch.save(clip64.state_dict(), cache / "control.pt")
    return card(retriever, mllm, clip64, {"seconds": seconds, "steps": steps, "tower.validation": towers, "seed": seed})


def describer(out: Path, cache: Path, steps: dict[str, int], seed: int) -> None:
    """The MLLM's tower and captions alone: who never saw a list, to measure what `rar tune` teaches."""
    specs = all_classes("train")
    pixels = data.render_all(specs, "train", PER_CLASS, seed, cache / f"train-{seed}.npy")
    images = train_clip.Images(pixels, specs, PER_CLASS)
    torch.manual_seed(seed)
    clip64 = train_clip.new_model(train_mllm.SIDE, train_mllm.PATCH)
    train_clip.train(clip64, images, steps["clip64"], seed)
    train_tower.train(clip64, images, steps["tower"], seed)
    mllm = _new_mllm(clip64, seed)
    train_mllm.train(mllm, images, None, steps["mllm"], seed, stages=train_mllm.DESCRIBER)
    train_mllm.save(mllm, out / "mllm")


def _new_mllm(clip64: open_clip.CLIP, seed: int) -> Any:
    """An untrained MLLM with that tower."""
    tokenizer = train_mllm.mllm_tokenizer()
    torch.manual_seed(seed)
    mllm = train_mllm.new_model(len(tokenizer), int(tokenizer.convert_tokens_to_ids("<image>")))  # type: ignore[arg-type]
    train_mllm.start_tower(mllm, clip64)
    return mllm


def train_control(clip64: open_clip.CLIP, images: train_clip.Images, seconds: float, seed: int) -> None:
    """Contrastive training, from the MLLM's own starting tower, for about as long as the MLLM was trained."""
    started = time.monotonic()
    train_clip.train(clip64, images, 20, seed)  # measures the pace, and warms up
    steps = max(2, int(20 * seconds / (time.monotonic() - started)) - 20)
    train_clip.train(clip64, images, steps, seed + 1)


def card(retriever: open_clip.CLIP, mllm: Any, control: open_clip.CLIP, facts: dict[str, Any]) -> dict[str, Any]:
    """Top-1 among 120 classes: retriever, retriever then MLLM (shuffled letters), control; on each split of two world seeds."""
    found: dict[str, Any] = dict(facts)
    for split in ("validation", "novel", "train"):
        for world_seed in (0, 1):
            pixels, specs = _photos(split, world_seed)
            truth = np.repeat(np.arange(len(specs)), TESTS)
            scores = train_clip.embed(retriever, pixels) @ _texts(retriever, specs).T
            candidates = scores.topk(TOP_K).indices.numpy()
            recalled = (candidates == truth[:, None]).any(1)
            ranked = train_mllm.letters_accuracy(mllm, pixels[recalled], truth[recalled], specs, candidates[recalled], 0)
            found[f"{split}.{world_seed}"] = {
                "images": len(pixels),
                "retriever.top1": round(float((candidates[:, 0] == truth).mean()), 4),
                "retriever.top5": round(float(recalled.mean()), 4),
                "mllm.top1": round(ranked * float(recalled.mean()), 4),
                "control.top1": round(train_clip.accuracy(control, pixels, truth, [s.name for s in specs])[0], 4),
            }
    return found


def _photos(split: str, world_seed: int) -> tuple[np.ndarray, list[Spec]]:
    """Test photos of a vocabulary, (120 * TESTS, 64, 64, 3) uint8; the novel and train ones are the demo's first ten."""
    specs = vocabulary(split, world_seed)
    stream = {"novel": "novel test", "train": "seen test", "validation": "validation"}[split]
    photos = [
        data.reduced(render(spec, data.DRAWN, rng_of(world_seed, stream, spec.name, number)))
        for spec in specs
        for number in range(TESTS)
    ]
    return np.stack(photos), specs


def _train_clip(cache: Path, steps: dict[str, int], seed: int, task: tuple[str, int, int]) -> dict[str, torch.Tensor]:
    name, side, patch = task
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    images = train_clip.Images(np.load(cache / f"train-{seed}.npy", mmap_mode="r"), all_classes("train"), PER_CLASS)
    model = train_clip.new_model(side, patch)
    train_clip.train(model, images, steps[name], seed)
    return model.state_dict()


def _restored(shape: tuple[int, int], state: dict[str, torch.Tensor]) -> open_clip.CLIP:
    model = train_clip.new_model(*shape)
    model.load_state_dict(state)
    return model.eval()


@torch.inference_mode()
def _texts(model: open_clip.CLIP, specs: list[Spec]) -> torch.Tensor:
    return train_clip.encode_names(model, [spec.name for spec in specs]).float().clone()


class _timed:
    """Notes how long a block took."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.name] = round(time.monotonic() - self.started, 1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main()
