"""What decides a prediction, and what does not: a run may be resumed on another machine, with other workers and replicas."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from rar.config import SPEED_ONLY, Config
from rar.ranker.wording import load_wording


def fingerprint(settings: Config) -> str:
    """16 hex digits; equal for two configs that must give the same predictions. Raises UserError for faulty prompts."""
    data = settings.model_dump(mode="json")
    for key in SPEED_ONLY:
        *sections, last = key.split(".")
        where: Any = data
        for section in sections:
            where = (where or {}).get(section)
        if where is not None:  # an optional section
            del where[last]
    data["ranker"]["prompts"] = load_wording(settings.ranker.prompts).fingerprint()
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
