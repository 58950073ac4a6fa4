"""`rar data` as a user types it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rar.corpus.datasets.known import known
from tests.conftest import ROOT
from tests.corpus.datasets import trees
from tests.corpus.datasets.test_clip_benchmark import write


def rar(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "jobs.data", *words], capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_what_is_known_is_printed() -> None:
    result = rar()
    assert (result.returncode, result.stderr) == (0, "")
    names = [line.split()[0] for line in result.stdout.splitlines()[1:]]
    assert names[: len(known())] == list(known()) and {"wds_NAME", "huggingface"} < set(names)
    assert "oxford_pets                   37" in result.stdout and "a photo of a {}, a type of pet." in result.stdout


def test_a_whole_set_and_a_broken_one(tmp_path: Path) -> None:
    write(tmp_path, [(1, 1), (2, 2)])
    whole = rar("check", "wds_vtab-made", "--root", str(tmp_path))
    assert (whole.returncode, whole.stderr) == (0, "") and whole.stdout.splitlines()[1].split()[:2] == ["test", "2"]
    trees.make("dtd", tmp_path)
    small = rar("check", "dtd", "--root", str(tmp_path))
    assert small.returncode == 2 and len(small.stdout.splitlines()) == 4
    assert small.stderr.count("\n") == 1 and "dtd: split train has 94 pictures, 2,820 were published" in small.stderr
    (tmp_path / "empty").mkdir()
    gone = rar("check", "dtd", "--root", str(tmp_path / "empty"), "--split", "test")
    assert (
        gone.returncode == 2
        and gone.stderr.count("\n") == 1
        and "split_zhou_DescribableTextures.json is missing" in gone.stderr
    )
