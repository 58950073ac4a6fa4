"""The console command `rar`: one sub-command a verb, each also runnable as `python -m jobs.<verb>`.

A verb's module is loaded when the verb is called: all of them together take longer than `rar --help` may. What the list of
verbs says of each is read from its source, so it is written once.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

VERBS = (
    *("demo", "memory", "classify", "detect", "embed", "tune", "sweep", "evaluate"),
    *("serve", "ask", "report", "submit", "config", "bench", "data"),
)
OPTIONS: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False}


class Verbs(TyperGroup):
    """Knows the verbs by name and help; the one that is called is loaded."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        verb = getattr(importlib.import_module(f"jobs.{name}"), str(name))
        if not isinstance(verb, typer.Typer):
            alone = typer.Typer(**OPTIONS)
            alone.command()(verb)
            verb = alone
        return name, typer.main.get_command(verb), rest


def said(verb: str) -> str | None:
    """What a verb says of itself: the docstring of its function, or, of one with verbs of its own, that of its module."""
    module = ast.parse((Path(__file__).parent / f"{verb}.py").read_text())
    own = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == verb]
    return ast.get_docstring(own[0] if own else module)


app = typer.Typer(
    cls=Verbs,
    help="Retrieve-and-rank visual recognition: CLIP and Milvus propose classes, an MLLM on Ray Serve ranks them.",
    no_args_is_help=True,
    **OPTIONS,
)
for verb in VERBS:
    app.command(verb, help=said(verb))(lambda: None)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
