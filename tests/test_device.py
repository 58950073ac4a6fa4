"""Which processors multiply narrow numbers, by what Linux tells of them; what is said where one does not.

Not covered: how slow it is, which takes such a processor.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rar import config, device
from rar.engine.session import Session

PLAIN = "processor\t: 0\nmodel name\t: Some bf16less\nflags\t\t: fpu sse2 avx2 avx512f fma\n"


@pytest.mark.parametrize(
    ("line", "bf16", "fp16"),
    [
        ("", False, False),
        ("flags : avx512_bf16 avx512_vnni\n", True, False),
        ("flags : amx_bf16 amx_tile\n", True, False),
        ("flags : amx_bf16 avx512_fp16\n", True, True),
        ("Features : fp asimd fphp asimdhp bf16\n", True, True),
    ],
)
def test_a_processor_multiplies_what_its_flags_say(tmp_path: Path, line: str, bf16: bool, fp16: bool) -> None:
    (tmp_path / "cpuinfo").write_text(PLAIN + line)
    found = [device.multiplies(precision, tmp_path / "cpuinfo") for precision in ("fp32", "bf16", "fp16")]
    assert found == [True, bf16, fp16]


def test_where_nothing_is_told_nothing_is_said(tmp_path: Path) -> None:
    assert device.multiplies("bf16", tmp_path / "nothing")


@pytest.mark.parametrize(("precision", "fast", "said"), [("bf16", False, True), ("bf16", True, False), ("fp32", False, False)])
def test_numbers_that_the_processor_is_slow_with_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], precision: str, fast: bool, said: bool
) -> None:
    monkeypatch.setattr("rar.engine.session.multiplies", lambda one: fast or one == "fp32")
    model = config.validated(config.Ranker, {"device": "cpu", "precision": precision, "num_gpus": 0})
    Session(None, threads=2).options(model)
    assert ("ranker.precision bf16" in capsys.readouterr().err) == said


def test_torch_is_imported_late() -> None:
    code = "import sys, rar.device; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
