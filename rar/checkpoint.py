"""Opening a transformers checkpoint so that whatever is wrong with it is one line that names the config key."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from transformers import AutoConfig, AutoProcessor
from transformers.utils import logging

from rar.device import dtype_of
from rar.schema import UserError, first_line
from rar.storage import is_model_folder


def model_type(path: str, key: str) -> str:
    """The `model_type` in a checkpoint's config, before any weight is read. path: a local folder or a hub name."""
    try:
        return AutoConfig.from_pretrained(path, local_files_only=is_model_folder(path, key)).model_type
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{key} {path!r} cannot be loaded: {first_line(error)}") from None


def load(
    path: str,
    key: str,
    auto_model: Any,
    precision: str,
    needless: tuple[str, ...] = (),
    pictures: Mapping[str, Any] = MappingProxyType({}),
    **weights: Any,
) -> tuple[Any, Any]:
    """(processor, model). auto_model: an AutoModelFor... class; weights: what else `from_pretrained` takes.

    pictures: settings of the image processor in place of the checkpoint's; one that it does not have is refused.

    A checkpoint with weights missing is refused: transformers would fill them with random numbers. needless: beginnings of the
    names of weights that the caller does not use, and that may be missing.
    """
    options = {"trust_remote_code": weights.pop("trust_remote_code", False), "local_files_only": is_model_folder(path, key)}
    logging.disable_progress_bar()
    try:
        processor = AutoProcessor.from_pretrained(path, **pictures, **options)
        loaded: Any = auto_model.from_pretrained(
            path, dtype=dtype_of(precision), output_loading_info=True, **weights, **options
        )
    except (OSError, ValueError, TypeError, ImportError) as error:
        told = f" with {dict(pictures)}" if pictures else ""
        raise UserError(f"{key} {path!r} cannot be loaded{told}: {first_line(error)}") from None
    own: Any = getattr(processor, "image_processor", None)
    known = list(own.valid_kwargs.__annotations__ if hasattr(own, "valid_kwargs") else vars(own)) if pictures else []
    for name in pictures:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
            raise UserError(f"{key} {path!r}: its image processor has no {name!r}; {hint}")
    model, missing = loaded[0], sorted(name for name in loaded[1]["missing_keys"] if not name.startswith(needless))
    if missing:
        raise UserError(f"{key} {path!r} lacks {len(missing)} of its weights, the first is {missing[0]!r}")
    return processor, model
