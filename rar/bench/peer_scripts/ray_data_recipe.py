"""PICTURES WEIGHTS OUT: a folder of JPEGs to parquet of path and vector in OUT, by Ray Data's recipe for batch inference.

`read_images`, a transform by `map`, `map_batches` with a class that holds the model, `write_parquet`. One actor in the pool, 64
pictures a batch; processors and threads are what Ray gives to those who say nothing.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import open_clip
import ray
import torch
from PIL import Image


class Embedder:
    def __init__(self, weights: str) -> None:
        self.model = open_clip.create_model("ViT-B-32", pretrained=weights).eval()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        with torch.inference_mode():
            vectors = self.model.encode_image(torch.as_tensor(np.stack(list(batch["pixels"]))))
        return {"path": batch["path"], "vector": torch.nn.functional.normalize(vectors, dim=-1).numpy()}


def main(pictures: str, weights: str, out: str) -> None:
    transform = open_clip.image_transform(224, is_train=False)

    def prepared(row: dict[str, Any]) -> dict[str, Any]:
        return {"path": row["path"], "pixels": transform(Image.fromarray(row["image"])).numpy()}

    images = ray.data.read_images(pictures, mode="RGB", include_paths=True)
    embedder = images.map(prepared).map_batches(
        Embedder,
        fn_constructor_args=(weights,),
        batch_size=64,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    embedder.write_parquet(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
