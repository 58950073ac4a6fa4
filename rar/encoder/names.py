"""Whether an encoder's name can be anything at all, told without loading torch: a typing mistake is answered at once.

What a folder holds, and whether open_clip has weights of that name, is found out when they are loaded (towers).
"""

from __future__ import annotations

import difflib
from importlib.util import find_spec
from pathlib import Path

from rar.schema import UserError


def check_name(name: str) -> None:
    """Raises UserError for a name that is no model's folder here, none of rar's own, and no architecture that open_clip knows.

    timm's names are many and told by timm alone; they pass.
    """
    if name in ("miniature", "precomputed") or name.startswith("timm/"):
        return
    if (folder := Path(name)).is_dir():
        if not any((folder / file).is_file() for file in ("open_clip_config.json", "config.json")):
            raise UserError(
                f"encoder.model: folder {folder} has neither open_clip_config.json (a CLIP) nor config.json (a timm model)"
            )
        return
    architecture, slash, rest = name.partition("/")
    if name.startswith((".", "/", "~")) or "/" in rest:
        raise UserError(f"encoder.model: there is no folder {name} here (a cluster needs it on a disk that all nodes share)")
    if not slash:
        raise UserError(f"encoder.model: {name!r} is neither a folder nor 'architecture/pretrained', e.g. ViT-B-16/openai")
    known = _architectures()
    if architecture not in known:
        (nearest,) = difflib.get_close_matches(architecture, known, n=1, cutoff=0.0)
        raise UserError(
            f"encoder.model: open_clip knows no architecture {architecture!r}; did you mean {nearest!r}? "
            f"Nor is there a folder {name}"
        )


def check_sentence_encoder(folder: str, key: str = "run.sentence_encoder") -> None:
    """Raises UserError for what is no folder of transformers here: only local encoders judge names."""
    if not Path(folder).is_dir():
        raise UserError(f"{key}: there is no folder {folder} here; name a local sentence encoder (nothing is fetched)")
    if not any((Path(folder) / name).is_file() for name in ("config.json", "modules.json")):
        raise UserError(f"{key}: folder {folder} holds no sentence encoder: neither config.json nor modules.json is in it")


def _architectures() -> list[str]:
    """Those of the installed open_clip, by its files: importing it takes seconds."""
    spec = find_spec("open_clip")
    assert spec is not None and spec.submodule_search_locations is not None
    return sorted(file.stem for file in (Path(spec.submodule_search_locations[0]) / "model_configs").glob("*.json"))
