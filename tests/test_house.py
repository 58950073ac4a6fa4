"""What keeps the rooms readable: few files at the top, and no function longer than a screen."""

from __future__ import annotations

import ast
import re

from tests.conftest import ROOT


def test_the_top_is_small_and_functions_fit_a_screen() -> None:
    assert len(list((ROOT / "rar").glob("*.py"))) <= 12
    functions = [
        (node.end_lineno - node.lineno + 1, node.name)
        for folder in ("rar", "jobs")
        for file in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    ]
    assert len(functions) > 1000 and max(functions) <= (60, "~")


def test_the_readmes_table_is_of_this_tree() -> None:
    readme = (ROOT / "README.md").read_text()
    files, lines, longest = (
        int(found[0].replace(",", ""))
        for words in ("files at the top of `rar/`", "lines of `rar/` and `jobs/`", "longest function")
        if (found := re.findall(rf"\| {re.escape(words)} \| [\d,]+(?: lines)? \| ([\d,]+) \|", readme))
    )
    assert files == len(list((ROOT / "rar").glob("*.py")))
    counted = sum(len(file.read_text().splitlines()) for folder in ("rar", "jobs") for file in (ROOT / folder).rglob("*.py"))
    assert abs(lines - counted) <= 0.03 * counted and longest == 60
