"""Towers: images and class names to unit-norm vectors. The home of torch, open_clip and timm.

Two kinds: `ClipEncoder` is any open_clip model (softmax or sigmoid, with its own tokenizer and context length; the miniature is
one), `ImageEncoder` any timm model, for memories of images alone. `load_encoder` tells them apart by the config's name.

Choices, and what they cost:
- The resize and crop of a model's preprocessing are `decode.fit_square`, because the pipeline decodes in other processes and
  ships uint8 squares; only the normalisation happens here, on the device. timm's `crop_pct` below 1 is shipped with its margin
  and the middle is cut here: up to half as many bytes more, and for odd margins up to a pixel beside timm's own cut.
- `views` average what the tower says of the square and its mirror image (`flip`, 2 forward passes), or of the square, its four
  corners at 7/8, and the mirror image of each (`crops`, 10). They come from the shipped square, so what the preprocessing cut
  off stays unseen, and corners are enlarged again. Support images get the same views as queries, so that what is fitted on the
  memory holds for queries.
- A class with descriptions is the mean of two unit vectors: its templates' mean and its sentences' mean. A plain mean over all
  sentences would weigh templates by how much somebody wrote about a class, and tilt scores between classes.
- Weights are loaded as float32 and cast as a whole afterwards; pixels are normalised in float32.
- A sigmoid model's bias and any model's temperature play no part: both leave the order of classes alone, and the retriever
  fits a temperature of its own.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import timm
import torch
import torch.nn.functional as F

from rar import config, miniature
from rar.device import Lanes, dtype_of, pick_device
from rar.encoder.names import check_name
from rar.encoder.templates import filled, read_descriptions, templates_of
from rar.schema import UserError

CORNER = 7 / 8  # side of a corner view, of the square's
TEXT_BATCH = 256
PANGRAM = "The quick brown fox jumps over the lazy dog."  # its tokens stand for the tokenizer in the fingerprint


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes input: `fit_square(image, side, resize_mode, interpolation)`, the middle `crop` pixels, mean, std.

    mean and std are of pixels in 0..1.
    """

    side: int
    crop: int
    resize_mode: str
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def check(self, name: str) -> None:
        """Raises UserError for what `decode.fit_square` does not do."""
        if self.resize_mode not in ("shortest", "squash"):
            raise UserError(f"encoder.model: {name} has resize mode {self.resize_mode!r}; only shortest and squash are done")
        if self.interpolation not in ("bicubic", "bilinear"):
            raise UserError(f"encoder.model: {name} resizes by {self.interpolation!r}; only bicubic and bilinear are done")


class _Encoder:
    """What both kinds share. side: pixels of the shipped square. dim: embedding length.

    identity: what decides an embedding beside weights and preprocessing, as JSON; part of the fingerprint.
    """

    def __init__(
        self,
        settings: config.Encoder,
        model: Any,
        forward: Callable[[torch.Tensor], torch.Tensor],
        preprocess: Preprocess,
        identity: list[Any],
    ) -> None:
        preprocess.check(settings.model)
        self.settings, self.model, self.preprocess, self.identity = settings, model, preprocess, identity
        self.side, self.resize_mode, self.interpolation = preprocess.side, preprocess.resize_mode, preprocess.interpolation
        self.device = pick_device(settings.device, "encoder.device")
        self.dtype = dtype_of(settings.precision)
        self.model.to(self.device, self.dtype).eval()
        self.mean, self.std = (
            torch.tensor(values, device=self.device).view(1, 3, 1, 1) * 255 for values in (preprocess.mean, preprocess.std)
        )
        self.forward = forward
        self.dim = self._batch(np.zeros((1, self.side, self.side, 3), np.uint8)).shape[1]  # one that cannot run fails here
        self.forward = torch.compile(forward) if settings.compile else forward
        self.lanes = Lanes(self.device)

    def embed_images(self, pixels: np.ndarray) -> np.ndarray:
        """pixels (N, side, side, 3) uint8 RGB -> (N, dim) float32, unit norm. Batches of a fixed size, in order."""
        size = self.settings.batch_size
        batches = [pixels[start : start + size] for start in range(0, len(pixels), size)]
        if len(batches) == 1:  # with all threads
            return self._batch(batches[0])
        return np.concatenate([np.zeros((0, self.dim), np.float32), *self.lanes.map(self._batch, batches)])

    @torch.inference_mode()
    def _batch(self, pixels: np.ndarray) -> np.ndarray:
        # channels last, as a picture lies: convolutions are 1.7 times as fast so, and a ViT is no slower (rar bench embed)
        batch = torch.from_numpy(np.array(pixels)).to(self.device).permute(0, 3, 1, 2).float()
        features = []
        for view in views(_middle(batch, self.preprocess.crop), self.settings.views, self.interpolation):
            seen = self.forward(((view - self.mean) / self.std).to(self.dtype)).float()
            if seen.ndim != 2:
                raise UserError(f"encoder.model: {self.settings.model} gives a map, not a vector; choose a model that pools")
            features.append(F.normalize(seen, dim=1))
        return F.normalize(torch.stack(features).sum(0), dim=1).cpu().numpy()

    def fingerprint(self) -> str:
        """16 hex digits of all that decides an embedding: weights, architecture, preprocessing, precision, views, text side.

        `views` is in it because image entries depend on it. Cost: a memory of texts alone is refused too where it changes.
        """
        facts: list[Any] = [asdict(self.preprocess), self.settings.precision, self.settings.views, self.identity]
        facts += ["scaled decode"] * self.settings.scaled_decode
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]


class ClipEncoder(_Encoder):
    """An open_clip model: embeds images and texts."""

    embeds_texts = True

    def __init__(self, settings: config.Encoder) -> None:
        self.templates = templates_of(settings.templates)
        self.descriptions = read_descriptions(settings.descriptions) if settings.descriptions else {}
        model, self.tokenizer, architecture = _load_clip(settings.model)
        tokens = self.tokenizer([PANGRAM]).tolist()
        identity = [architecture, tokens, self.templates, self.descriptions]
        super().__init__(settings, model, model.encode_image, _clip_preprocess(settings.model, model), identity)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """(N, dim) float32, unit norm. What is longer than the model's context is cut."""
        out = [np.zeros((0, self.dim), np.float32)]
        for start in range(0, len(texts), TEXT_BATCH):
            ids = self.tokenizer(list(texts[start : start + TEXT_BATCH])).to(self.device)
            out.append(F.normalize(self.model.encode_text(ids).float(), dim=1).cpu().numpy())
        return np.concatenate(out)

    def prototypes(self, names: Sequence[str]) -> np.ndarray:
        """One vector a class, of its templates and, where there are any, its descriptions. (len(names), dim) float32."""
        total = sum(self.embed_texts([filled(template, name) for name in names]) for template in self.templates)
        found = _unit(np.asarray(total))
        described = [row for row, name in enumerate(names) if name in self.descriptions]
        if described:
            sentences = [self.descriptions[names[row]] for row in described]
            owner = np.repeat(described, [len(own) for own in sentences])
            means = np.zeros_like(found)
            np.add.at(means, owner, self.embed_texts([sentence for own in sentences for sentence in own]))
            found[described] = _unit(found[described] + _unit(means[described]))
        return found


class ImageEncoder(_Encoder):
    """A timm model without its classifier: embeds images alone."""

    embeds_texts = False

    def __init__(self, settings: config.Encoder) -> None:
        model, architecture = _load_timm(settings.model)
        super().__init__(settings, model, model, _timm_preprocess(settings.model, model), architecture)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Raises UserError: there is no text tower."""
        raise UserError(
            f"encoder.model: {self.settings.model} embeds images alone, so class names cannot be searched; "
            "leave out memory.classes and give labelled images (memory.support), or use a CLIP"
        )

    prototypes = embed_texts


def load_encoder(settings: config.Encoder) -> ClipEncoder | ImageEncoder:
    """The encoder a config names, ready to embed. Raises UserError in one line for what the user must mend.

    settings.model: a local folder of open_clip (open_clip_config.json) or timm (config.json), else `timm/NAME[/random]`, else
    open_clip's `architecture/pretrained` or `architecture/random`, else `miniature`.
    """
    folder = Path(settings.model)
    if settings.model == "precomputed":
        raise UserError("encoder.model: precomputed embeds nothing; give embeddings as corpus and memory, or name an encoder")
    if not folder.is_dir():
        return ImageEncoder(settings) if settings.model.startswith("timm/") else ClipEncoder(settings)
    if (folder / "open_clip_config.json").is_file():
        return ClipEncoder(settings)
    if (folder / "config.json").is_file():
        return ImageEncoder(settings)
    raise UserError(f"encoder.model: folder {folder} has neither open_clip_config.json (a CLIP) nor config.json (a timm model)")


def views(batch: torch.Tensor, kind: str, interpolation: str) -> Iterator[torch.Tensor]:
    """(N, 3, S, S) float32 in 0..255 -> each view of it, of the same shape: one, 2 (`flip`) or 10 (`crops`)."""
    squares = [batch]
    if kind == "crops":
        side = batch.shape[-1]
        cut = round(side * CORNER)
        for top, left in ((0, 0), (0, side - cut), (side - cut, 0), (side - cut, side - cut)):
            corner = batch[..., top : top + cut, left : left + cut]
            squares.append(F.interpolate(corner, size=(side, side), mode=interpolation).clamp(0, 255))
    for square in squares:
        yield square
        if kind != "one":
            yield square.flip(-1)


def _middle(batch: torch.Tensor, crop: int) -> torch.Tensor:
    start = round((batch.shape[-1] - crop) / 2)
    return batch[..., start : start + crop, start : start + crop]


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# Loading


def _load_clip(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """Model, tokenizer and architecture by open_clip name or local folder. Raises UserError in one line."""
    folder = miniature.CLIP if name == "miniature" else Path(name)
    if folder.is_dir():
        source, loading = f"local-dir:{folder}", {"require_pretrained": True}
    else:
        source, loading = _open_clip_name(name)
    try:
        model = open_clip.create_model(source, **loading)
        tokenizer = open_clip.get_tokenizer(source)
    except Exception as error:  # broken weights, configs and tokenizers, and what is not there, have no type in common
        raise UserError(f"encoder.model: could not load {name}: {_in_short(error)}") from None
    architecture = open_clip.get_model_config(source) | {"quick_gelu": _is_quick(source, loading)}
    return model, tokenizer, architecture


def _open_clip_name(name: str) -> tuple[str, dict[str, Any]]:
    """`architecture/pretrained` -> architecture and the arguments of open_clip.create_model."""
    check_name(name)
    architecture, _, pretrained = name.partition("/")
    if pretrained == "random":
        torch.manual_seed(0)  # for throughput measurements and plumbing checks: deterministic, meaningless
        return architecture, {"pretrained_text": False}
    weights = open_clip.get_pretrained_cfg(architecture, pretrained)
    if not weights:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        raise UserError(f"encoder.model: {architecture} has no weights {pretrained!r}; choose from: {tags}, random")
    # Weights trained with QuickGELU say so, but create_model only warns where the architecture does not.
    return architecture, {"pretrained": pretrained, "force_quick_gelu": weights.get("quick_gelu", False)}


def _is_quick(source: str, loading: dict[str, Any]) -> bool:
    return bool(loading.get("force_quick_gelu") or open_clip.get_model_config(source).get("quick_gelu"))


def _clip_preprocess(name: str, model: Any) -> Preprocess:
    found = open_clip.get_model_preprocess_cfg(model)
    size = found["size"]
    side = _square(name, (size, size) if isinstance(size, int) else tuple(size))
    mode = found.get("resize_mode", "shortest")
    return Preprocess(side, side, mode, found["interpolation"], tuple(found["mean"]), tuple(found["std"]))


def _load_timm(name: str) -> tuple[Any, list[Any]]:
    """Model without classifier, and its architecture, by `timm/NAME[/random]` or local folder. Raises UserError in one line."""
    if Path(name).is_dir():
        source, pretrained = f"local-dir:{name}", True
    else:
        source, slash, weights = name.removeprefix("timm/").partition("/")
        pretrained = weights != "random"
        if not pretrained:
            torch.manual_seed(0)
        if slash and pretrained:
            raise UserError(f"encoder.model: {name!r} is not 'timm/NAME' or 'timm/NAME/random', e.g. timm/resnet50.a1_in1k")
        if not timm.is_model(source.partition(".")[0]):
            (nearest,) = difflib.get_close_matches(source, timm.list_models(), n=1, cutoff=0.0)
            raise UserError(f"encoder.model: timm knows no model {source!r}; did you mean {nearest!r}?")
    try:
        model: Any = timm.create_model(source, pretrained=pretrained, num_classes=0)
    except Exception as error:  # broken weights, configs and tokenizers, and what is not there, have no type in common
        raise UserError(f"encoder.model: could not load {name}: {_in_short(error)}") from None
    saved = json.loads((Path(name) / "config.json").read_text()) if Path(name).is_dir() else {}
    return model, [model.pretrained_cfg["architecture"], saved.get("global_pool"), saved.get("model_args")]


def _timm_preprocess(name: str, model: Any) -> Preprocess:
    """timm's evaluation transform: resize to size / crop_pct, then the middle."""
    found = timm.data.resolve_model_data_config(model)
    modes = {"center": "shortest", "squash": "squash"}
    crop = _square(name, tuple(found["input_size"][1:]))
    side = int(crop / found["crop_pct"])
    mode = modes.get(found["crop_mode"], found["crop_mode"])
    return Preprocess(side, crop, mode, found["interpolation"], tuple(found["mean"]), tuple(found["std"]))


def _square(name: str, size: tuple[int, ...]) -> int:
    if size[0] != size[1]:
        raise UserError(f"encoder.model: {name} takes {size[0]} x {size[1]} pixels; only square inputs are done")
    return size[0]


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
