"""The README names files that exist, and its newcomer's page stays a page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from rar.config import Config, validated
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_every_file_named_exists() -> None:
    named = set(re.findall(r"`((?:rar|jobs|tests|cluster)/[\w/.-]+\.\w+)`", README))
    assert len(named) > 20 and [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_newcomers_page_is_a_page() -> None:
    (page,) = re.findall(r"## How one picture goes through\n(.*?)\n## ", README, flags=re.DOTALL)
    assert len(page.strip().splitlines()) <= 40


def test_ten_settings_are_shown_and_are_valid() -> None:
    (text,) = re.findall(r"```yaml\n(# birds.yaml\n.*?)```", README, flags=re.DOTALL)
    shown = yaml.safe_load(text)
    validated(Config, shown)

    def count(part: Any) -> int:
        return sum(map(count, part.values())) if isinstance(part, Mapping) else 1

    assert count(shown) == 10
