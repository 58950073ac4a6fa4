"""Whether replies are read as meant (`rar bench replies`): recorded or made-up replies, each with the name that it states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rar.ranker.reply import parse
from rar.schema import RankStatus, UserError


def run(file: Path) -> dict[str, Any]:
    """Read every reply of a JSON list of {"kind", "reply", "names", "best"}; `best` is one of `names`.

    Returns {"missed": {kind: what was read instead}, "right", "of", "ranked_but_wrong"}: the last counts replies that are
    read as another name without a doubt. Raises UserError for a file of another shape.
    """
    try:
        cases = json.loads(file.read_text(encoding="utf-8"))
        read = [(case["kind"], case["names"], *parse(case["reply"], case["names"]), case["best"]) for case in cases]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{file} is no JSON list of {{kind, reply, names, best}} ({reason})") from None
    wrong = [
        (kind, names[order[0]] if order else "", status)
        for kind, names, order, status, best in read
        if not order or names[order[0]] != best
    ]
    return {
        "missed": {kind: f"{name} ({status})" for kind, name, status in wrong},
        "right": len(read) - len(wrong),
        "of": len(read),
        "ranked_but_wrong": sum(status is RankStatus.RANKED for _, _, status in wrong),
    }
