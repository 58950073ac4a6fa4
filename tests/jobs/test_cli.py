"""The list of verbs loads none of them, and says of each what it says itself; the line that a run ends with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer

from jobs import common
from jobs.cli import VERBS, app, said
from rar.config import Config
from rar.runfolder import RunFolder
from tests.conftest import ROOT


def test_help_loads_nothing_that_a_verb_needs() -> None:
    code = "import sys; from jobs.cli import app; app(['--help'], standalone_mode=False)\nprint(set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    *shown, loaded = done.stdout.splitlines()
    assert all(any(f" {verb} " in line for line in shown) for verb in VERBS)
    for module in ("pyarrow", "numpy", "pydantic", "ray", "torch", "rar", "jobs.classify"):
        assert f"'{module}'" not in loaded, module


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_that_is_called_is_the_one_in_the_list(verb: str) -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    name, command, rest = group.resolve_command(typer.Context(group), [verb, "--help"])
    assert (name, rest) == (verb, ["--help"]) and command is not None and command is not group.commands[verb]
    shown = [one.help.split() if one.help else [] for one in (command, group.commands[verb])]
    assert shown[0] == shown[1] == (said(verb) or "").split() != []
    assert {"install_completion", "show_completion"}.isdisjoint(one.name for one in command.params)


def test_a_run_ends_with_its_counts_and_its_slowest_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, counts = Config(), {"input": 4, "ok": 4, "failed": 0, "skipped": 0}
    folder = RunFolder.open(tmp_path / "run", "classify", settings, fresh=False, name="birds", group="zoo")
    folder.finish(counts, {}, 5.0, settings, {})
    assert common.verdict(folder, settings) == 0 and "slowest" not in capsys.readouterr().err
    stats = {"read.rows": 4, "read.seconds": 3.0, "embed.rows": 4, "embed.seconds": 2.0, "embed.at_once": 1}
    folder.finish(counts, {}, 5.0, settings, {**stats, "pipeline.seconds": 4.0, "pipeline.tasks": 2})
    assert common.verdict(folder, settings) == 0
    told = capsys.readouterr().err
    assert told == f"{folder.path}: 4 ok, 0 failed, 0 skipped of 4; the slowest stage was embed, 50% busy\n"
