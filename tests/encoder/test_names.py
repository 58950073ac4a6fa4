"""A mistyped encoder is refused by its name alone, without torch. Not covered: what a folder holds (test_towers)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rar.encoder.names import check_name
from rar.schema import UserError


@pytest.mark.parametrize("name", ["miniature", "precomputed", "timm/resnet50.a1_in1k", "ViT-B-16/openai", "ViT-B-32/random"])
def test_names_that_may_be_something_pass(name: str, tmp_path: Path) -> None:
    check_name(name)
    (tmp_path / "config.json").touch()
    check_name(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"neither open_clip_config\.json"):
        check_name(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./lite0", "there is no folder ./lite0"),
        ("/models/lite0", "there is no folder /models/lite0"),
        ("models/timm/lite0", "there is no folder models/timm/lite0"),
        ("models/lite0", "Nor is there a folder models/lite0"),
        ("ViT-B-61/openai", "did you mean 'ViT-B-16'"),
    ],
)
def test_a_mistyped_folder_is_called_a_folder(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        check_name(name)
    assert "\n" not in str(raised.value)


def test_no_torch_is_loaded_to_tell() -> None:
    code = (
        "import sys; from rar.encoder.names import check_name; check_name('ViT-B-16/openai'); assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
