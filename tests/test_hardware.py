"""Which machines multiply narrow numbers, by what Linux and nvidia-smi tell of them; what a config makes of it.

Not covered: how slow narrow numbers are elsewhere, and a real GPU: nvidia-smi is a script here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rar import config, hardware
from rar.config import Encoder, Ranker
from rar.engine.session import Session
from rar.identity import differences, of_run
from tests.conftest import real_native

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
    found = [hardware.multiplies(precision, tmp_path / "cpuinfo") for precision in ("fp32", "bf16", "fp16")]
    assert found == [True, bf16, fp16]


def test_where_nothing_is_told_nothing_is_said(tmp_path: Path) -> None:
    assert hardware.multiplies("bf16", tmp_path / "nothing")


@pytest.mark.parametrize(("precision", "fast", "said"), [("bf16", False, True), ("bf16", True, False), ("fp32", False, False)])
def test_numbers_that_the_processor_is_slow_with_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], precision: str, fast: bool, said: bool
) -> None:
    monkeypatch.setattr("rar.engine.session.multiplies", lambda one: fast or one == "fp32")
    model = config.validated(config.Ranker, {"device": "cpu", "precision": precision, "num_gpus": 0})
    Session(None, threads=2).options(model)
    assert ("ranker.precision bf16" in capsys.readouterr().err) == said


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Alone on the PATH."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    monkeypatch.setenv("PATH", f"{tool.parent}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    hardware._capabilities.cache_clear()
    yield tool
    hardware._capabilities.cache_clear()


def says(tool: Path, script: str) -> None:
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)


@pytest.mark.parametrize(
    ("device", "flags", "script", "visible", "expected"),
    [
        ("auto", "amx_bf16", None, None, "bf16"),
        ("auto", "avx2", None, None, "fp32"),
        ("cpu", "avx2", "echo 9.0", None, "fp32"),
        ("auto", "avx2", "echo 9.0", None, "bf16"),
        ("cuda", "avx2", "echo 8.6; echo 9.0", None, "bf16"),
        ("auto", "amx_bf16", "echo 7.5; echo 9.0", None, "fp32"),  # a T4 among them
        ("auto", "amx_bf16", "echo 7.5", "", "bf16"),  # GPUs that may not be used
        ("auto", "avx2", "echo 9.0", "-1", "fp32"),
        ("auto", "avx2", "echo no driver; exit 9", None, "fp32"),
        ("auto", "avx2", "echo '[N/A]'", None, "fp32"),
        ("cuda", "amx_bf16", None, None, "fp32"),  # a GPU of which nothing is told
        ("mps", "amx_bf16", None, None, "fp32"),
    ],
)
def test_a_machine_has_narrow_numbers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    smi: Path,
    device: str,
    flags: str,
    script: str | None,
    visible: str | None,
    expected: str,
) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags : fpu {flags}\n")
    if script is not None:
        says(smi, script)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert real_native(device, tmp_path / "cpuinfo") == expected


def test_a_processor_of_which_nothing_is_told_is_taken_to_have_none(tmp_path: Path, smi: Path) -> None:
    assert real_native("auto", tmp_path / "nothing") == "fp32"


@pytest.mark.parametrize(
    ("model", "data", "expected"),
    [
        (Encoder, {"model": "ViT-B-32/random"}, "bf16"),
        (Encoder, {"model": "ViT-B-32/random", "precision": "auto"}, "bf16"),
        (Encoder, {"model": "ViT-B-32/random", "precision": "fp32"}, "fp32"),
        (Encoder, {}, "fp32"),
        (Encoder, {"model": "precomputed"}, "fp32"),
        (Ranker, {"model": "a/folder"}, "bf16"),
        (Ranker, {}, "fp32"),
        (Ranker, {"model": "a/name", "method": "endpoint"}, "fp32"),
    ],
)
def test_a_config_that_is_read_says_which_numbers(
    monkeypatch: pytest.MonkeyPatch, model: type[Any], data: dict[str, Any], expected: str
) -> None:
    monkeypatch.setattr("rar.hardware.native", lambda device: "bf16")
    read = config.validated(model, data)
    assert read.precision == expected
    monkeypatch.setattr("rar.hardware.native", lambda device: "fp32")  # sent to another machine it stays
    assert model.model_validate_json(read.model_dump_json()).precision == expected


@pytest.mark.parametrize(
    ("model", "data", "expected"),
    [
        (Encoder, {}, "auto"),
        (Encoder, {"num_gpus": 0}, "cpu"),
        (Encoder, {"num_gpus": 0.5}, "auto"),
        (Ranker, {}, "cpu"),  # which has no GPU unless it is given one
        (Ranker, {"num_gpus": 1}, "auto"),
        (Ranker, {"num_gpus": None}, "auto"),
        (Ranker, {"device": "cuda"}, "cuda"),
    ],
)
def test_the_numbers_are_those_of_where_the_model_runs(
    monkeypatch: pytest.MonkeyPatch, model: type[Any], data: dict[str, Any], expected: str
) -> None:
    monkeypatch.setattr("rar.hardware.native", lambda device: {expected: "bf16"}.get(device, "fp32"))
    assert config.validated(model, {"model": "a/name", **data}).precision == "bf16"


def test_a_run_that_goes_on_where_numbers_are_others_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for known in ("bf16", "fp32"):
        monkeypatch.setattr("rar.hardware.native", lambda device, known=known: known)
        found.append(of_run(config.validated(config.Config, {"corpus": {"uri": "x"}, "encoder": {"model": "ViT-B-32/random"}})))
    assert differences(*found) == ['encoder.precision was "bf16", is "fp32"']
