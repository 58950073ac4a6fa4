"""Pictures a second from JPEG files to vectors, against the bare forward pass and the loop that one writes first; by the order
of pixels in memory that the forward pass is given; and by how batches share the cores.

Pictures are drawn (500 x 375, smooth with grain, JPEG of about 60 kB). Weights do not matter here, and are random by default.
All of it runs with the threads that torch takes on this machine, in fp32, in one process beside the pipeline's own.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from rar import config
from rar.bench.timing import paired
from rar.corpus.decode import decode, fit_square
from rar.encoder.towers import ClipEncoder, ImageEncoder, load_encoder
from rar.engine import pipeline, session
from rar.run import steps
from rar.run.work import classify_work

MODEL = "ViT-B-32/random"
CONVOLUTIONAL = "timm/efficientnet_lite0/random"
LANED = (MODEL, CONVOLUTIONAL, "miniature")
BATCHES = (8, 16, 32, 64, 128)
LOOPED, LANED_PICTURES = 64, 128  # of the pictures, as all would take the loop minutes, and show no more of lanes and orders
Row = dict[str, Any]


def run(pictures: int = 1024, repeats: int = 5, model: str = MODEL) -> Row:
    """whole: files to vectors in shards of the command's size, against `bare` (the forward pass alone, in the batch that suits
    it best) and against `loop`. Of fewer than four shards of pictures, little is done at the same time.

    order: of MODEL and of a convolutional one, channels last (as a decoded picture lies, and as we leave it) against planes.
    lanes: of these and of the miniature, a batch a core (`device.Lanes`) against all cores on one batch after the other.
    """
    with tempfile.TemporaryDirectory(prefix="rar_bench_") as temporary:
        folder = Path(temporary)
        draw(folder, pictures)
        settings = config.validated(
            config.Config,
            {
                "corpus": {"uri": str(folder)},
                "encoder": {"model": model, "precision": "fp32"},
                "ranker": {"method": "none"},
            },
        )
        whole = from_files(settings, repeats)
        files = sorted(folder.glob("*.jpg"))[:LANED_PICTURES]
        squares = squares_of(load_encoder(settings.encoder), files)
        lanes = {name: by_lanes(load_encoder(config.Encoder(model=name, precision="fp32")), files, repeats) for name in LANED}
    order = {
        name: by_order(load_encoder(config.Encoder(model=name, precision="fp32")), squares, repeats)
        for name in (MODEL, CONVOLUTIONAL)
    }
    return {
        "model": model,
        "pictures": pictures,
        "threads": torch.get_num_threads(),
        "whole": whole,
        "order": order,
        "lanes": lanes,
    }


def draw(folder: Path, count: int) -> None:
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
        grain = random.normal(0, 8, (375, 500, 1))
        Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(
            folder / f"{number:04}.jpg", quality=90
        )


def from_files(settings: config.Config, repeats: int) -> Row:
    """Rows of `timing.paired`, pictures/s: {"bare": ..., "loop": ...}."""
    work = classify_work(settings)
    files = [Path(uri) for uri in work.index["uri"].to_pylist()]
    encoder = load_encoder(settings.encoder)
    squares = squares_of(encoder, files)
    best = min(BATCHES, key=lambda batch: _seconds(encoder, squares[:LANED_PICTURES], batch))
    with session.opened() as opened:
        facts = opened.encoder(settings.encoder).facts

        def ours() -> None:
            rows = pipeline.collect(steps.vectors(opened, settings, work, facts))
            assert rows.num_rows == len(files) and rows["error"].null_count == len(files)

        bare = paired(ours, lambda: forward(encoder, squares, best), len(files), repeats)
        few = files[:LOOPED]
        loop = paired(ours, lambda: one_by_one(encoder, few), len(files), repeats, less=len(few))
    return {"bare": bare | {"batch": best}, "loop": loop}


@torch.inference_mode()
def forward(encoder: ClipEncoder | ImageEncoder, squares: torch.Tensor, batch: int) -> None:
    for start in range(0, len(squares), batch):
        encoder.forward(squares[start : start + batch])


def one_by_one(encoder: ClipEncoder | ImageEncoder, files: list[Path]) -> None:
    """As the reference's notebooks have it: a picture is opened, prepared and embedded before the next one."""
    for file in files:
        forward(encoder, squares_of(encoder, [file]), 1)


def by_order(encoder: ClipEncoder | ImageEncoder, squares: torch.Tensor, repeats: int) -> Row:
    """ours: channels last; reference: planes, which is what torch calls contiguous."""
    side = encoder.preprocess.crop
    last = torch.nn.functional.interpolate(squares, (side, side)).contiguous(memory_format=torch.channels_last)
    planes = last.contiguous(memory_format=torch.contiguous_format)
    return paired(lambda: forward(encoder, last, 32), lambda: forward(encoder, planes, 32), len(squares), repeats)


def by_lanes(encoder: ClipEncoder | ImageEncoder, files: list[Path], repeats: int) -> Row:
    """ours: batches as they are embedded; reference: one after the other."""
    pixels, size = pixels_of(encoder, files), encoder.settings.batch_size
    batches = [pixels[start : start + size] for start in range(0, len(pixels), size)]
    return paired(lambda: encoder.embed_images(pixels), lambda: list(map(encoder.embed_images, batches)), len(pixels), repeats)


def squares_of(encoder: ClipEncoder | ImageEncoder, files: list[Path]) -> torch.Tensor:
    """(N, 3, crop, crop) float32, normalised, as the encoder's forward pass gets them."""
    pixels, crop = torch.from_numpy(pixels_of(encoder, files)), encoder.preprocess.crop
    start = round((encoder.side - crop) / 2)
    pixels = pixels[:, start : start + crop, start : start + crop].permute(0, 3, 1, 2).float()
    return (pixels - encoder.mean) / encoder.std


def pixels_of(encoder: ClipEncoder | ImageEncoder, files: list[Path]) -> np.ndarray:
    """(N, side, side, 3) uint8, as the pipeline ships them."""
    fitting = (encoder.side, encoder.resize_mode, encoder.interpolation)
    return np.stack([fit_square(decode(file.read_bytes()), *fitting) for file in files])


def _seconds(encoder: ClipEncoder | ImageEncoder, squares: torch.Tensor, batch: int) -> float:
    started = time.perf_counter()
    forward(encoder, squares, batch)
    return time.perf_counter() - started
