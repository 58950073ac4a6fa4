"""What numbers a machine multiplies itself, told without torch: by Linux's flags of the processor, and by nvidia-smi.

`native` is what `precision: auto` becomes when a config is read, on the machine that starts the command, once: all workers of a
run then use the same, as vectors of two precisions must not mix in a memory, and a run resumed elsewhere is told of it
(identity). Cost: a cluster's head without a GPU says fp32 for workers that have one; there the config says bf16 itself.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

FLAGS = {"bf16": {"avx512_bf16", "amx_bf16", "bf16"}, "fp16": {"avx512_fp16", "amx_fp16", "fphp"}}  # Linux's names, x86 and ARM
CPUINFO = Path("/proc/cpuinfo")
BF16_SINCE = 8.0  # CUDA compute capability (Ampere)


def multiplies(precision: str, told: Path = CPUINFO) -> bool:
    """Whether this machine's processor multiplies such numbers itself (as Linux tells it; elsewhere it is taken to).

    One that does not is slower with them than in float32, by far.
    """
    if precision == "fp32" or not told.exists():
        return True
    return not FLAGS[precision].isdisjoint(told.read_text().split())


def native(device: str = "auto", told: Path = CPUINFO) -> str:
    """bf16 where what `device` (as in a config: auto, cpu, cuda, mps) means here is told to multiply it; else fp32."""
    if device in ("auto", "cuda") and (found := _capabilities()):
        return "bf16" if min(found) >= BF16_SINCE else "fp32"
    return "bf16" if device in ("auto", "cpu") and told.exists() and multiplies("bf16", told) else "fp32"


@cache
def _capabilities() -> tuple[float, ...]:
    """CUDA compute capability of each GPU of this machine; () where there is none, none may be used, or none is told."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not (tool := shutil.which("nvidia-smi")):
        return ()
    asked = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout
        return tuple(map(float, told.split()))
    except (OSError, ValueError, subprocess.SubprocessError):
        return ()
