"""PICTURES WEIGHTS OUT: a folder of JPEGs to OUT/vectors.npy and OUT/names.txt, by open_clip and torch's DataLoader.

Written as the libraries' own examples have it; two processes decode, the main one embeds 64 pictures at a time in fp32.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset


class Pictures(Dataset[torch.Tensor]):
    def __init__(self, files: list[Path], preprocess: Any) -> None:
        self.files, self.preprocess = files, preprocess

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.preprocess(Image.open(self.files[number]))


def main(pictures: str, weights: str, out: str) -> None:
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32", pretrained=weights)
    model.eval()
    files = sorted(Path(pictures).glob("*.jpg"))
    found = []
    with torch.inference_mode():
        for batch in DataLoader(Pictures(files, preprocess), batch_size=64, num_workers=2):
            found.append(torch.nn.functional.normalize(model.encode_image(batch), dim=-1).numpy())
    np.save(Path(out) / "vectors.npy", np.concatenate(found))
    (Path(out) / "names.txt").write_text("\n".join(file.name for file in files))


if __name__ == "__main__":
    main(*sys.argv[1:])
