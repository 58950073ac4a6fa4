"""What keeps the rooms readable: few files at the top, and no function longer than a screen."""

from __future__ import annotations

import ast

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
