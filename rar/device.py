"""Where a model of torch runs and in what precision; what every room that loads one shares."""

from __future__ import annotations

import torch

from rar.schema import UserError, first_line

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str, key: str) -> torch.device:
    """'auto' is the first of cuda, mps, cpu that is there. Raises UserError, naming the config key, for one that is not."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"{key} {name!r} cannot be used here: {first_line(error)}") from None


def fast_bf16() -> bool:
    """Whether this machine's processor multiplies bfloat16 itself. On one that does not, float32 is far faster."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
