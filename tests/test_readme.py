"""The README names files that exist, and its newcomer's page stays a page."""

from __future__ import annotations

import re

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_every_file_named_exists() -> None:
    named = set(re.findall(r"`((?:rar|jobs|tests|cluster)/[\w/.-]+\.\w+)`", README))
    assert len(named) > 20 and [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_newcomers_page_is_a_page() -> None:
    (page,) = re.findall(r"## How one picture goes through\n(.*?)\n## ", README, flags=re.DOTALL)
    assert len(page.strip().splitlines()) <= 40
