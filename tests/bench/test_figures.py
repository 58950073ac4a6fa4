"""What is kept of a bench, and the README's table of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jobs.bench import bench
from rar.bench import figures
from rar.schema import UserError

WHERE: dict[str, Any] = {
    "hardware": {"cpu": "Abacus", "cores": 2, "load": 0.25},
    "versions": {"python": "3.11.9", "torch": "2.9", "ray": "2.60", "pymilvus": "3.0.2", "rar": "0123456789abcdef"},
    "threads": 2,
}


def test_the_readme_holds_what_is_kept() -> None:
    text = figures.README.read_text()
    assert figures.written(text, figures.kept()) == text, "`rar bench readme` writes it"


def test_the_table_has_a_row_a_comparison_and_a_row_a_timed_command() -> None:
    compared = {"ours": 350.4, "reference": 18.07, "ratio": 19.4, "ratio_low": 0.812, "ratio_high": 1234.5, "repeats": 5}
    commands = {"help": {"seconds": 0.301, "low": 0.3, "high": 0.5, "phases": {"imports": 0.2}}}
    rank = {"command": "rar bench rank", "images": 96, "rows": {"letters": {"paper": compared}}, **WHERE}
    start = {"command": "rar bench start-up", "commands": commands, "repeats": 3, **WHERE}
    where = "2 cores of Abacus, load before 0.25, python 3.11.9, torch 2.9, ray 2.60, pymilvus 3.0.2, rar 0123456"
    assert figures.table({"rank": rank, "start-up": start}).splitlines() == [
        "| bench | of | ours | reference | ratio (least to greatest) | repeats |",
        "|---|---|---|---|---|---|",
        "| `rank` | letters paper | 350/s | 18.1/s | 19.4 (.812 to 1,234) | 5 |",
        "| `start-up` | help | .301 s (.3 to .5) | - | - | 3 |",
        "",
        f"- `rank`: `rar bench rank`, {where}",
        f"- `start-up`: `rar bench start-up`, {where}",
    ]


def test_a_readme_without_its_markers_is_refused() -> None:
    with pytest.raises(UserError, match="no place for figures"):
        figures.written("# rar\n", {})


def test_a_line_is_printed_and_kept_with_its_command_and_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "FOLDER", tmp_path / "figures")
    (tmp_path / "replies.json").write_text(json.dumps([{"kind": "plain", "reply": "cat", "names": ["cat", "dog"], "best": 0}]))
    done = CliRunner().invoke(bench, ["keep", "replies", "--data", str(tmp_path / "replies.json")])
    assert done.exit_code == 0, done.output
    (line,) = figures.kept().values()
    assert line.pop("command") == f"rar bench replies --data {tmp_path / 'replies.json'}"
    assert line == json.loads(done.stdout.splitlines()[-1]) and line["of"] == 1
    assert {"cpu", "cores", "load"} == line["hardware"].keys() and line["versions"].keys() == WHERE["versions"].keys()
    failed = CliRunner().invoke(bench, ["keep", "replies", "--data", str(tmp_path / "gone.json")])
    assert failed.exit_code == 2 and list(figures.kept()) == ["replies"]
