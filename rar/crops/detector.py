"""Proposals of our own: where objects may be, by an open detector of transformers, whatever they are.

Two families, and how each is made to forget classes:

- OWLv2 has an objectness head, trained to say whether any text could ever match a patch. It is read directly, so that neither
  the prompt nor the text tower takes part (Minderer et al. 2306.09683, section 2).
- Grounding DINO and MM-Grounding DINO (2303.05499, 2401.02361) only answer to text. They are asked for one general word, and a
  box's score is its best match with any token of it, as in their own post-processing. The score is a similarity to the prompt:
  another prompt is another scale, and `threshold` has to move with it.

Choices, and what they cost:

- Boxes come back through the checkpoint's own image processor, which knows how it resized and padded: OWLv2 pads to a square at
  the bottom and right, Grounding DINO keeps the ratio.
- A batch of Grounding DINO holds images of one size only. It would pad others, and its backbone sees the padding: an image's
  boxes would depend on its neighbours. The cost is smaller batches where a corpus has many sizes.
- Scores and boxes leave the model in float32, but in half precision its last layer has rounded them: bf16 corners are good to
  about 1/256 of the image's side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torchvision.ops import nms
from transformers import AutoModelForZeroShotObjectDetection

from rar import checkpoint
from rar.boxes import MIN_SIDE, clip_xyxy
from rar.config import Detector
from rar.device import pick_device
from rar.schema import UserError

KEY = "detect.detector.model"
GROUNDED = ("grounding-dino", "mm-grounding-dino")
FAMILIES = (*GROUNDED, "owlv2")
PIXELS = {"return_tensors": "pt", "input_data_format": "channels_last"}  # else three rows are taken for three channels


class Output(NamedTuple):
    """What the processors' post-processing reads of a forward pass."""

    logits: torch.Tensor  # (B, Q, tokens) float32
    pred_boxes: torch.Tensor  # (B, Q, 4) float32: centre x, y, width, height as fractions of the image the model saw


class Proposer:
    """Finds class-agnostic boxes. Raises UserError for another kind of model, one that cannot be loaded, or no such device."""

    def __init__(self, settings: Detector) -> None:
        self.settings = settings
        self.family = checkpoint.model_type(settings.model, KEY)
        if self.family not in FAMILIES:
            raise UserError(f"{KEY} {settings.model!r} is a {self.family} model; proposals need one of {', '.join(FAMILIES)}")
        self.device = pick_device(settings.device, "detect.detector.device")
        self.processor, model = checkpoint.load(settings.model, KEY, AutoModelForZeroShotObjectDetection, settings.precision)
        self.model = model.to(self.device).eval()
        self.phrases = [part.strip() for part in settings.prompt.split(".") if part.strip()]
        if self.family in GROUNDED and not self.phrases:
            raise UserError("detect.detector.prompt has no word; Grounding DINO must be asked for something, e.g. 'object'")

    def propose(self, images: Sequence[np.ndarray], max_boxes: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Boxes of each image, best first: (boxes_xyxy (P, 4) float32, scores (P,) float32 in 0..1), P <= max_boxes.

        images: (H, W, 3) uint8 RGB, any sizes. Boxes are in pixels of the image as given, clipped to it, at least a pixel a
        side and above `threshold`; of two that overlap more than `nms_iou` the better one stays. An image's boxes do not
        depend on the others.
        """
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for rows in self._batches(images):
            batch = [images[row] for row in rows]
            sizes = [image.shape[:2] for image in batch]
            output = self._objectness(batch) if self.family == "owlv2" else self._grounded(batch)
            raw = self.processor.image_processor.post_process_object_detection(output, self.settings.threshold, sizes)
            for row, size, one in zip(rows, sizes, raw, strict=True):
                found[row] = self._tidy(one["boxes"].cpu().numpy(), one["scores"].cpu().numpy(), size, max_boxes)
        return [found[row] for row in range(len(images))]

    def _batches(self, images: Sequence[np.ndarray]) -> Iterator[list[int]]:
        """Positions of images that go through the model together."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, image in enumerate(images):
            groups.setdefault(image.shape if self.family in GROUNDED else (), []).append(row)
        for group in groups.values():
            for start in range(0, len(group), self.settings.batch_size):
                yield group[start : start + self.settings.batch_size]

    @torch.inference_mode()
    def _objectness(self, images: list[np.ndarray]) -> Output:
        """OWLv2 without its text tower."""
        pixels = self._placed(self.processor.image_processor(images, **PIXELS))["pixel_values"]
        features = self.model.image_embedder(pixels)[0]  # (B, rows, columns, D)
        flat = features.flatten(1, 2)
        boxes = self.model.box_predictor(flat, features)
        return Output(self.model.objectness_predictor(flat)[..., None].float(), boxes.float())

    @torch.inference_mode()
    def _grounded(self, images: list[np.ndarray]) -> Output:
        inputs = self.processor(images=images, text=[self.phrases] * len(images), padding=True, **PIXELS)
        output = self.model(**self._placed(inputs))
        return Output(output.logits.float(), output.pred_boxes.float())

    def _placed(self, inputs: Any) -> dict[str, torch.Tensor]:
        dtype = self.model.dtype
        return {key: value.to(self.device, dtype if value.is_floating_point() else None) for key, value in inputs.items()}

    def _tidy(
        self, boxes_xyxy: np.ndarray, scores: np.ndarray, size: tuple[int, ...], max_boxes: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Clipped, degenerate ones dropped, suppressed, best first. size: height, width."""
        boxes = clip_xyxy(boxes_xyxy, size[1], size[0]).astype(np.float32)
        usable = (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(axis=1) & np.isfinite(scores)
        boxes, scores = boxes[usable], scores[usable]
        kept = nms(torch.from_numpy(boxes), torch.from_numpy(scores), self.settings.nms_iou).numpy()[:max_boxes]
        return boxes[kept], scores[kept]
