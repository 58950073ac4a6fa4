"""Where a model of torch runs and in what precision; what every room that loads one shares. torch itself is imported late."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rar.schema import UserError, first_line

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
FLAGS = {"bf16": {"avx512_bf16", "amx_bf16", "bf16"}, "fp16": {"avx512_fp16", "amx_fp16", "fphp"}}  # Linux's names, x86 and ARM


def dtype_of(precision: str) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, DTYPES[precision])
    return found


def pick_device(name: str, key: str) -> torch.device:
    """'auto' is the first of cuda, mps, cpu that is there. Raises UserError, naming the config key, for one that is not."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"{key} {name!r} cannot be used here: {first_line(error)}") from None


def multiplies(precision: str, told: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this machine's processor multiplies such numbers itself (as Linux tells it; elsewhere it is taken to).

    One that does not is slower with them than in float32, by far: a product of 1024 x 1024 in bfloat16 took 140 times as long.
    """
    if precision == "fp32" or not told.exists():
        return True
    return not FLAGS[precision].isdisjoint(told.read_text().split())
