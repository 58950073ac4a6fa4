"""Trains the 64-pixel vision tower that both the MLLM and the control start from: which shape, colour, pattern and marking.

A contrastive tower of this size and time ties shape to colour: a linear probe of one read the shape of 22 % of the validation
photos, whose (shape, colour) pairs it had not seen. Naming the attributes one by one, on photos whose colour channels are
shuffled half of the time (their colour is then not asked), unties them.
"""

from __future__ import annotations

import time

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from rar.hardware import multiplies
from rar.miniature.train_clip import Images
from rar.miniature.world import COLOURS, MARKINGS, PATTERNS, SHAPES, Spec

PARTS = {"shape": SHAPES, "colour": COLOURS, "pattern": PATTERNS, "marking": MARKINGS}


def attributes(specs: list[Spec]) -> torch.Tensor:
    """(C, 4) long: the value of each attribute of each class."""
    return torch.tensor([[values.index(getattr(spec, part)) for part, values in PARTS.items()] for spec in specs])


def train(
    model: open_clip.CLIP, images: Images, steps: int, seed: int, lr: float = 1.2e-3, batch: int = 256
) -> torch.nn.Linear:
    """Train model.visual in place; returns the attribute heads, which are thrown away after `accuracy`."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 13])
    sizes = [len(values) for values in PARTS.values()]
    heads = torch.nn.Linear(model.visual.output_dim, sum(sizes))
    parameters = [*model.visual.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, steps + 1, pct_start=0.1)
    truth, started, seen = attributes(images.specs), time.time(), []
    model.train()
    for step in range(steps):
        classes = rng.integers(0, len(images.specs), batch)
        pixels, wanted = images.draw(classes, rng), truth[classes]
        pixels[: batch // 2] = pixels[: batch // 2, rng.permutation(3).tolist()]
        wanted[: batch // 2, 1] = -100  # the colour of shuffled channels is not asked
        with sdpa_kernel(SDPBackend.MATH):
            with torch.autocast("cpu", torch.bfloat16, enabled=multiplies("bf16")):
                logits = heads(model.visual(pixels)).float().split(sizes, 1)
            each = [F.cross_entropy(part, wanted[:, i], label_smoothing=0.05) for i, part in enumerate(logits)]
            loss = torch.stack(each).sum()
            optimiser.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        right = [(part.argmax(1) == wanted[:, i])[batch // 2 :].float().mean().item() for i, part in enumerate(logits)]
        seen.append(right)
        if step % 50 == 49:
            rates = " ".join(f"{part} {rate:.3f}" for part, rate in zip(PARTS, np.mean(seen[-50:], 0), strict=True))
            print(f"tower step {step + 1}/{steps} {rates} {time.time() - started:.0f} s", flush=True)
    model.eval()
    return heads


@torch.inference_mode()
def accuracy(model: open_clip.CLIP, heads: torch.nn.Linear, pixels: np.ndarray, specs: list[Spec]) -> dict[str, float]:
    """Share of photos whose attribute is read rightly. pixels (N, 64, 64, 3) uint8, N a multiple of the classes."""
    truth = attributes(specs).repeat_interleave(len(pixels) // len(specs), 0)
    batch = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    logits = heads(model.visual(batch)).split([len(values) for values in PARTS.values()], 1)
    right = [(one.argmax(1) == truth[:, i]).float().mean().item() for i, one in enumerate(logits)]
    return dict(zip(PARTS, right, strict=True))
