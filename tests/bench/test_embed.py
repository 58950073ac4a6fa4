"""The bench of the encoder on a few small runs: that it counts the same work on both sides, and what it needs.

Not covered: speed, which `rar bench embed` measures.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rar.bench import embed
from rar.config import Encoder
from rar.encoder.towers import load_encoder


def test_the_bare_pass_embeds_what_the_pipeline_does(tmp_path: Path) -> None:
    embed.draw(tmp_path, 3)
    encoder = load_encoder(Encoder())
    files = sorted(tmp_path.glob("*.jpg"))
    squares = embed.squares_of(encoder, files)
    with torch.inference_mode():
        bare = torch.nn.functional.normalize(encoder.forward(squares), dim=1).numpy()
    pixels = embed.pixels_of(encoder, files)
    assert np.abs(bare - encoder.embed_images(pixels)).max() < 1e-5
    assert len({file.read_bytes() for file in files}) == 3, "every picture is another"


@pytest.mark.long
def test_the_whole_bench() -> None:
    found = embed.run(pictures=12, repeats=1, model="miniature")
    assert found["pictures"] == 12 and set(found["whole"]) == {"bare", "loop"} and set(found["lanes"]) == set(embed.LANED)
    for row in (*found["whole"].values(), *found["order"].values(), *found["lanes"].values()):
        assert row["repeats"] == 1 and row["ratio"] == pytest.approx(row["ours"] / row["reference"])
