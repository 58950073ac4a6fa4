"""CLIP towers: images and class names to unit-norm vectors. The home of torch and open_clip.

One encoder class serves real models and the miniature alike: an open_clip name `architecture/pretrained`, a local folder in
open_clip's format, or `miniature`. The resize and centre crop of the model's
`preprocess_cfg` are `decode.fit_square`, because the pipeline decodes in other processes and ships uint8 arrays of a fixed
size; only the normalisation happens here, on the device. A test holds the two against open_clip's own transform.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F

from rar import config, miniature
from rar.schema import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ClipEncoder:
    """An open_clip model ready to embed.

    side: pixels of the square input. dim: embedding length. logit_scale: the model's trained inverse temperature.
    """

    def __init__(self, settings: config.Encoder) -> None:
        self.settings = settings
        self.device = pick_device(settings.device)
        self.model, self.tokenizer = _load(settings.model)  # Any: open_clip's models share methods, not a class
        self.model.to(self.device, DTYPES[settings.precision]).eval()
        self.preprocess = open_clip.get_model_preprocess_cfg(self.model)
        size = self.preprocess["size"]
        self.side: int = size[0] if isinstance(size, tuple | list) else size
        self.resize_mode: str = self.preprocess.get("resize_mode", "shortest")
        self.interpolation: str = self.preprocess["interpolation"]
        if self.resize_mode not in ("shortest", "squash"):
            raise UserError(f"encoder.model: {settings.model} has resize_mode {self.resize_mode!r}, not shortest or squash")
        self.mean = torch.tensor(self.preprocess["mean"], device=self.device).view(1, 3, 1, 1) * 255
        self.std = torch.tensor(self.preprocess["std"], device=self.device).view(1, 3, 1, 1) * 255
        self.dim: int = self.embed_texts(["a"]).shape[1]
        self.logit_scale = float(self.model.logit_scale.detach().float().exp())
        self._encode = torch.compile(self.model.encode_image) if settings.compile else self.model.encode_image

    @torch.inference_mode()
    def embed_images(self, pixels: np.ndarray) -> np.ndarray:
        """pixels (N, side, side, 3) uint8 RGB -> (N, dim) float32, unit norm. Batches of a fixed size, in order."""
        out = [np.zeros((0, self.dim), np.float32)]
        for start in range(0, len(pixels), self.settings.batch_size):
            batch = torch.from_numpy(np.array(pixels[start : start + self.settings.batch_size]))
            batch = (batch.to(self.device).permute(0, 3, 1, 2).float() - self.mean) / self.std
            features = self._encode(batch.to(DTYPES[self.settings.precision]))
            out.append(F.normalize(features.float(), dim=1).cpu().numpy())
        return np.concatenate(out)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """(N, dim) float32, unit norm."""
        out = []
        for start in range(0, len(texts), 256):
            ids = self.tokenizer(list(texts[start : start + 256])).to(self.device)
            out.append(F.normalize(self.model.encode_text(ids).float(), dim=1).cpu().numpy())
        return np.concatenate(out)

    def prototypes(self, names: Sequence[str]) -> np.ndarray:
        """One vector a class: the mean over the templates, re-normalised. (len(names), dim) float32."""
        total = sum(self.embed_texts([template.format(name) for name in names]) for template in self.settings.templates)
        return total / np.linalg.norm(total, axis=1, keepdims=True)

    def fingerprint(self) -> str:
        """16 hex digits of weights, preprocessing, precision and templates: what decides an embedding."""
        digest = hashlib.sha256(json.dumps([self.preprocess, self.settings.precision, self.settings.templates]).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else b"")
        return digest.hexdigest()[:16]


def pick_device(wanted: str) -> str:
    """`auto` is the GPU where there is one. Raises UserError for a device that is not there."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {wanted!r} was asked for, but torch sees no GPU here; use device: cpu")
    return wanted


def _load(name: str) -> tuple[Any, Any]:
    """Model and tokenizer by open_clip name or local folder. Raises UserError in one line."""
    folder = miniature.CLIP if name == "miniature" else Path(name)
    if folder.is_dir():
        if not (folder / "open_clip_config.json").is_file():
            raise UserError(f"encoder.model: folder {name} has no open_clip_config.json; is it an open_clip folder?")
        source = f"local-dir:{folder}"
        model = open_clip.create_model(source)
        return model, open_clip.get_tokenizer(source)
    architecture, slash, pretrained = name.partition("/")
    if not slash:
        raise UserError(f"encoder.model: {name!r} is neither a folder nor 'architecture/pretrained', e.g. ViT-B-16/openai")
    if architecture not in open_clip.list_models():
        raise UserError(f"encoder.model: open_clip knows no architecture {architecture!r}; see open_clip.list_models()")
    if pretrained != "random" and pretrained not in open_clip.list_pretrained_tags_by_model(architecture):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        raise UserError(f"encoder.model: {architecture} has no weights {pretrained!r}; choose from: {tags}, random")
    if pretrained == "random":  # throughput measurements and plumbing checks: deterministic, meaningless
        torch.manual_seed(0)
        return open_clip.create_model(architecture), open_clip.get_tokenizer(architecture)
    try:
        return open_clip.create_model(architecture, pretrained=pretrained), open_clip.get_tokenizer(architecture)
    except (OSError, RuntimeError) as error:
        raise UserError(f"encoder.model: could not load {name}: {' '.join(str(error).split())[:200]}") from None
