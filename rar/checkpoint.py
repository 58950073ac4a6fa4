"""Opening a transformers checkpoint so that whatever is wrong with it is one line that names the config key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor
from transformers.utils import logging

from rar.schema import UserError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def pick_device(name: str, key: str) -> torch.device:
    """'auto' is the first of cuda, mps, cpu that is there. Raises UserError, naming the config key, for one that is not."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"{key} {name!r} cannot be used here: {first_line(error)}") from None


def model_type(path: str, key: str) -> str:
    """The `model_type` in a checkpoint's config, before any weight is read. path: a local folder or a hub name."""
    if not _is_local(path) and not HUB_NAME.fullmatch(path):
        raise UserError(f"{key} {path!r} is no folder; give a local model folder or a hub name")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=_is_local(path)).model_type
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{key} {path!r} cannot be loaded: {first_line(error)}") from None


def load(path: str, key: str, auto_model: Any, precision: str, device: torch.device) -> tuple[Any, Any]:
    """(processor, model in inference mode). auto_model: an AutoModelFor... class.

    A checkpoint with weights missing is refused: transformers would fill them with random numbers.
    """
    logging.disable_progress_bar()
    try:
        processor = AutoProcessor.from_pretrained(path, local_files_only=_is_local(path))
        loaded: Any = auto_model.from_pretrained(
            path, dtype=PRECISIONS[precision], output_loading_info=True, local_files_only=_is_local(path)
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{key} {path!r} cannot be loaded: {first_line(error)}") from None
    model, missing = loaded[0], sorted(loaded[1]["missing_keys"])
    if missing:
        raise UserError(f"{key} {path!r} lacks {len(missing)} of its weights, the first is {missing[0]!r}")
    return processor, model.to(device).eval()


def _is_local(path: str) -> bool:
    return Path(path).is_dir()


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
