"""Figures that are kept: the line of a bench as a committed file, and the README's table written from these files.

A line says where it was measured: `hardware` (the processor, its cores, and how many processes wanted it before the bench
began), `versions` and `threads`. A figure of a machine that others used is kept as it is, and its load stands beside it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rar.runfolder import git_commit
from rar.schema import UserError

FOLDER = Path(__file__).parent / "figures"
README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- `rar bench readme` writes what stands here -->", "<!-- up to here -->"
PACKAGES = ("torch", "ray", "pymilvus")


def measured_on() -> dict[str, Any]:
    """hardware, versions and threads, as of now. load: processes that wanted a core in the last minute."""
    known = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").is_file() else None
    cpu = known[1].strip() if known else platform.processor() or platform.machine()
    cores = os.cpu_count() or 1
    versions = {"python": sys.version.split()[0], **{name: version(name) for name in PACKAGES}, "rar": git_commit()}
    hardware = {"cpu": cpu, "cores": cores, "load": round(os.getloadavg()[0], 2)}
    return {"hardware": hardware, "versions": versions, "threads": int(os.environ.get("OMP_NUM_THREADS", cores))}


def keep(name: str, command: str, line: Mapping[str, Any]) -> Path:
    file = FOLDER / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"command": command, **line}, indent=1) + "\n")
    return file


def kept() -> dict[str, dict[str, Any]]:
    return {file.stem: json.loads(file.read_text()) for file in sorted(FOLDER.glob("*.json"))}


def table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row a comparison, and a row a command that was timed alone; then how and where each bench was run."""
    lines = ["| bench | of | ours | reference | ratio (least to greatest) | repeats |", "|---|---|---|---|---|---|"]
    for name, line in figures.items():
        lines += [f"| `{name}` | {of} | {told} |" for of, told in _rows(line, ())]
    lines.append("")
    for name, line in figures.items():
        hardware, versions = line["hardware"], line["versions"]
        said = [f"`{line['command']}`", f"{hardware['cores']} cores of {hardware['cpu']}", f"load before {hardware['load']:g}"]
        said += [f"{package} {versions[package]}" for package in ("python", *PACKAGES)]
        lines.append(f"- `{name}`: {', '.join(said)}, rar {str(versions['rar'])[:7]}")
    return "\n".join(lines)


def _rows(value: Any, path: tuple[str, ...], repeats: Any = "") -> Iterator[tuple[str, str]]:
    """(what, its cells) of everything in a line that was compared or timed."""
    if not isinstance(value, Mapping):
        return
    repeats = value.get("repeats", repeats)
    if {"ours", "reference", "ratio"} <= value.keys():
        spread = f" ({_short(value['ratio_low'])} to {_short(value['ratio_high'])})" if "ratio_low" in value else ""
        cells = [f"{_short(value['ours'])}/s", f"{_short(value['reference'])}/s", f"{_short(value['ratio'])}{spread}"]
        yield " ".join(path), " | ".join([*cells, str(repeats)])
    elif {"seconds", "low", "high"} <= value.keys():
        spread = f"{_short(value['low'])} to {_short(value['high'])}"
        yield " ".join(path), f"{_short(value['seconds'])} s ({spread}) | - | - | {repeats}"
    else:
        for key, one in value.items():
            yield from _rows(one, path if key in ("rows", "commands") else (*path, key), repeats)


def _short(value: float) -> str:
    """Three digits, as the README writes numbers: 1,234, 19.4, .81."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}".removeprefix("0") or "0"


def written(text: str, figures: Mapping[str, Mapping[str, Any]]) -> str:
    """A README with the table between its markers. Raises UserError where it has none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"the README has no place for figures: a line {BEGIN} and a line {END}")
    return f"{before}{BEGIN}\n\n{table(figures)}\n\n{END}{after}"
