"""The lists of one epoch for other people's trainers, with the prompts that ranking uses.

`llava`: one JSON of LLaVA / ShareGPT conversations. `swift`: JSONL of ms-swift (messages, images). Both name local files;
pictures inside tars or parquet, or far away, are written beside them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from rar.config import Config
from rar.ranker.wording import load_wording
from rar.tune import draw
from rar.tune.pictures import Pictures

FILES = {"llava": "llava.json", "swift": "swift.jsonl"}


def write(settings: Config, rows: pa.Table, folder: Path, kind: str) -> Path:
    """Write the first epoch's lists; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    lessons = draw.epoch_of(settings, rows)(0)
    files, ids = _files(rows, sorted({lesson.row for lesson in lessons}), folder), rows["image_id"].to_pylist()
    wording = load_wording(settings.ranker.prompts)
    records = []
    for number, lesson in enumerate(lessons):
        asked, answer = draw.turn(lesson, wording, settings.ranker.method)
        records.append(_record(kind, f"{ids[lesson.row]}-{number}", files[lesson.row], asked, answer))
    target = folder / FILES[kind]
    text = json.dumps(records, ensure_ascii=False, indent=1) if kind == "llava" else _lines(records)
    target.write_text(text, encoding="utf-8")
    return target


def _record(kind: str, name: str, picture: str, asked: str, answer: str) -> dict[str, Any]:
    text = f"<image>\n{asked}" if kind == "llava" else f"<image>{asked}"
    if kind == "llava":
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
        return {"id": name, "image": picture, "conversations": turns}
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [picture]}


def _lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _files(rows: pa.Table, wanted: Sequence[int], folder: Path) -> dict[int, str]:
    """Row -> a local file that shows it."""
    pictures, found = Pictures(rows), {}
    ids = rows["image_id"].to_pylist()
    for row in wanted:
        place = pictures.places[row]
        local = place["picture"] or (place["uri"] if place["offset"] is None and Path(place["uri"]).is_file() else None)
        if local is None:
            copy = folder / "pictures" / ids[row]
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(pictures.encoded([row])[0])
            local = str(copy)
        found[row] = str(Path(local).resolve())
    return found
