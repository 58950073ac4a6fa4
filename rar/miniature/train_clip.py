"""Trains the miniature CLIP, and the control: the same recipe at the MLLM's resolution and training time.

Contrastive learning over batches of distinct classes; half of each batch are siblings (same family and pattern, another
marking), because a random batch rarely holds the pairs that are hard to tell apart.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from rar.hardware import multiplies
from rar.miniature.tokens import TEMPLATE, clip_tokenizer
from rar.miniature.world import MARKINGS, Spec

MEAN = STD = (0.5, 0.5, 0.5)
CONTEXT = 16


@dataclass(frozen=True)
class Images:
    """Training images: pixels (N, S, S, 3) uint8 (memory-mapped), class_id (N,) into specs, ordered by class."""

    pixels: np.ndarray
    specs: list[Spec]
    per_class: int

    def draw(self, classes: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        """One random image of each class, as `take` gives them."""
        return self.take(classes * self.per_class + rng.integers(0, self.per_class, len(classes)), rng)

    def take(self, rows: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        """(B, 3, S, S) float in -1..1, shifted together by up to two pixels."""
        batch = torch.from_numpy(np.stack([self.pixels[row] for row in rows])).permute(0, 3, 1, 2).float()
        dy, dx = rng.integers(-2, 3, 2).tolist()
        return torch.roll(batch, (dy, dx), (2, 3)) / 127.5 - 1


def model_config(side: int, patch: int, vocabulary: int) -> dict:
    """open_clip's model_cfg of a miniature CLIP."""
    vision = {"image_size": side, "layers": 4, "width": 192, "head_width": 32, "patch_size": patch, "mlp_ratio": 4.0}
    text = {"context_length": CONTEXT, "vocab_size": vocabulary, "width": 128, "heads": 4, "layers": 2}
    return {"embed_dim": 128, "vision_cfg": vision, "text_cfg": {**text, "hf_tokenizer_name": "local"}}


def new_model(side: int, patch: int) -> open_clip.CLIP:
    cfg = model_config(side, patch, len(clip_tokenizer()))
    del cfg["text_cfg"]["hf_tokenizer_name"]  # CLIP's own text tower, whatever the tokenizer
    return open_clip.CLIP(**cfg)


def encode_names(model: open_clip.CLIP, names: list[str]) -> torch.Tensor:
    """(N, 128) unit-norm embeddings of the templated names."""
    texts = [TEMPLATE.format(name) for name in names]
    ids = clip_tokenizer()(texts, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt").input_ids
    return model.encode_text(ids, normalize=True)


def resize(batch: torch.Tensor, side: int) -> torch.Tensor:
    return batch if batch.shape[-1] == side else F.interpolate(batch, size=side, mode="bicubic", antialias=True)


def train(model: open_clip.CLIP, images: Images, steps: int, seed: int, *, lr: float = 1.5e-3, batch: int = 256) -> None:
    """Train in place for a number of steps under a one-cycle schedule; prints a line every hundred steps."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 11])
    side = model.visual.image_size[0]
    names = [spec.name for spec in images.specs]
    ids = clip_tokenizer()(
        [TEMPLATE.format(n) for n in names], padding="max_length", max_length=CONTEXT, return_tensors="pt"
    ).input_ids
    decay = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimiser = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, steps + 1, pct_start=0.1)
    started, running = time.time(), 0.0
    model.train()
    for step in range(steps):
        classes = draw_classes(len(names), batch, rng)
        pixels = resize(images.draw(classes, rng), side)
        # fused attention's backward is slow here
        with torch.autocast("cpu", torch.bfloat16, enabled=multiplies("bf16")), sdpa_kernel(SDPBackend.MATH):
            image = model.encode_image(pixels, normalize=True)
            text = model.encode_text(ids[classes], normalize=True)
        logits = model.logit_scale.exp().clamp(max=100) * image.float() @ text.float().T
        target = torch.arange(len(classes))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimiser.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        running += (logits.argmax(1) == target).float().mean().item()
        if step % 50 == 49:
            print(
                f"clip{side} step {step + 1}/{steps} batch accuracy {running / 50:.3f} {time.time() - started:.0f} s",
                flush=True,
            )
            running = 0.0
    model.eval()


def draw_classes(classes: int, batch: int, rng: np.random.Generator) -> np.ndarray:
    """Distinct class numbers: half at random, half in pairs that differ in the marking alone (markings vary fastest)."""
    group = len(MARKINGS)
    picked = set()
    for number in rng.permutation(classes // group)[: batch // 4]:
        picked.update(number * group + rng.permutation(group)[:2])
    rest = [c for c in rng.permutation(classes)[:batch] if c not in picked]
    return np.array([*picked, *rest][:batch])


@torch.inference_mode()
def accuracy(model: open_clip.CLIP, pixels: np.ndarray, truth: np.ndarray, names: list[str]) -> tuple[float, float]:
    """Zero-shot top-1 and top-5 over a vocabulary. pixels (N, S, S, 3) uint8; truth (N,) positions in names."""
    text = encode_names(model, names)
    embedded = embed(model, pixels)
    top = (embedded @ text.T).topk(5).indices.numpy()
    return float((top[:, 0] == truth).mean()), float((top == truth[:, None]).any(1).mean())


@torch.inference_mode()
def embed(model: open_clip.CLIP, pixels: np.ndarray) -> torch.Tensor:
    """(N, 128) unit-norm image embeddings."""
    side, out = model.visual.image_size[0], []
    for start in range(0, len(pixels), 512):
        batch = torch.from_numpy(np.array(pixels[start : start + 512])).permute(0, 3, 1, 2).float() / 127.5 - 1
        out.append(model.encode_image(resize(batch, side), normalize=True).float())
    return torch.cat(out)


def save(model: open_clip.CLIP, side: int, patch: int, folder: Path) -> None:
    """Write open_clip's local folder: config, fp16 weights, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": model_config(side, patch, len(clip_tokenizer())), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1))
    weights = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    clip_tokenizer().save_pretrained(folder)
