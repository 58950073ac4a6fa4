"""What `rar tune` teaches, and what each part of it is worth: whole commands on miniature worlds, judged before and after.

A seed is a world (classes and photos) and a training. Learned from: 16 support photos of each of 120 classes, less what `rar
tune` keeps out to judge by as `seen`; judged by as `novel`: test photos of 120 classes whose families no weight has seen. Three
questions, an experiment each:

- `describer`: from an MLLM that was taught to name pictures and never shown a list (`python -m rar.miniature.train
  --describer`, trained here unless --describer names one). PARTS are what is left out of `rar`, and RAR's own lists, all for as
  many steps. An arm is asked as it was trained: letters, or (`paper_code`, `paper_text`) the sorted list as text.
- `long`: from the shipped miniature, which was trained on lists of at most six names, on lists of up to 20; all weights, as an
  adapter of the same steps learns less of it.
- `shifted`: from the shipped miniature, on photos of the novel classes in poorer light, noisy and small, SHOTS a class.
  `plain` is its accuracy on the same classes' ordinary photos; `regained` the share of what was lost that came back.

Accuracy is that on shuffled lists that hold the truth (judge). A gain's interval is over the classes of its own seed; `mean`
is over seeds. What was run is kept in --out, and not run again.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from rar.miniature import train as miniature_train
from rar.miniature.data import DRAWN, two_processes, write_world
from rar.miniature.world import Spec, render, rng_of, vocabulary
from rar.schema import Unavailable

EXPERIMENTS = ("describer", "long", "shifted")
PHOTOS, TESTS, SHOTS, JUDGED = 16, 3, 4, 300
STEPS = {"describer": 400, "long": 1200, "shifted": 300}
RATE, FULL_RATE = 0.002, 0.001  # of adapters, of whole models
PARTS: dict[str, dict[str, Any]] = {
    "rar": {},
    "paper_code": {"preset": "paper-code"},
    "paper_text": {"preset": "paper-text"},
    "loss_of_text": {"loss": "text"},
    "unshuffled": {"shuffle": False},
    "no_rejections": {"rejections": 0.0},
}
LIGHT, TINT, NOISE, SMALL = (0.35, 0.6), 0.25, 0.09, 0.7  # of a shifted photo

Row = dict[str, Any]


def run(
    out: Path,
    seeds: Sequence[int],
    only: Sequence[str] = EXPERIMENTS,
    parts: Sequence[str] = tuple(PARTS),
    describer: Path | None = None,
    steps: int | None = None,
) -> Row:
    """{experiment: {arm: {"seeds": {seed: accuracies and gains}, "mean": ...}}}. steps: of every training, else STEPS."""
    found: Row = {"seeds": list(seeds), "steps": {name: steps or STEPS[name] for name in only}}
    for name in only:
        arms = {part: PARTS[part] for part in parts} if name == "describer" else {name: {}}
        model = _describer(out, describer) if name == "describer" else "miniature"
        taught = {
            arm: {str(seed): _taught(out, name, arm, move, model, seed, steps or STEPS[name]) for seed in seeds}
            for arm, move in arms.items()
        }
        rows = {arm: {"seeds": by, "mean": _mean(list(by.values()))} for arm, by in taught.items()}
        found[name] = rows if name == "describer" else rows[name]
    return found


def _taught(out: Path, experiment: str, arm: str, move: Mapping[str, Any], model: str, seed: int, steps: int) -> Row:
    """One `rar tune`: what it says of accuracy, and minutes."""
    folder = out / f"seed-{seed}"
    write_world(folder / "world", seed, shots=PHOTOS, tests=TESTS, scenes=1)
    novel = _memory(folder, "novel", folder / "world" / "novel" / "support", folder / "world" / "novel" / "test")
    if experiment == "shifted":
        shifted(folder / "shifted", seed)
        learned = _memory(folder, "shifted", folder / "shifted" / "support", folder / "shifted" / "test")
        # a class has SHOTS photos: of each, one in four is kept out to stop by, none to judge by as seen
        tune: Row = {"others": {"shifted": str(learned), "plain": str(novel)}, "held_out": 0.25}
    else:
        learned = _memory(folder, "seen", folder / "world" / "seen" / "support", folder / "world" / "seen" / "test")
        tune = {"others": {"novel": str(novel)}}
    if experiment == "long":
        tune |= {"max_list": 20, "lengths": [10, 20], "weights": "full"}
    rate = FULL_RATE if tune.get("weights") == "full" else RATE
    tune |= {"max_steps": steps, "learning_rate": rate, "novel_classes": 0, "judged": JUDGED, "check_every": 100, **move}
    ranker = {"model": model, "method": "generate" if "preset" in move else "letters"}
    config = yaml.safe_load(learned.read_text()) | {"ranker": ranker, "tune": tune, "run": {"seed": seed}}
    file = folder / f"{experiment}-{arm}-{steps}.yaml"
    file.write_text(yaml.safe_dump(config))
    ended = _command("tune", file, file.with_suffix(""))
    values = json.loads((ended / "metrics.json").read_text())
    found = _told(values) | {"minutes": json.loads((ended / "run.json").read_text())["seconds"] / 60}
    if experiment == "shifted":
        lost = found["before"]["plain"] - found["before"]["shifted"]
        found |= {"lost": lost, "regained": found["gain"]["shifted"] / lost}
    return found


def _told(values: Mapping[str, float]) -> Row:
    """before, after and gain of each set and length of list; ends of gains' intervals; what stands beside accuracy."""
    key = ".conditional_rank_accuracy"
    found: Row = {}
    for name, value in values.items():
        when, _, rest = name.partition(".")
        if key in rest and (when == "gain" or not rest.endswith(("ci_low", "ci_high"))):
            found.setdefault(when, {})[rest.replace(key, "").replace(".ci_", "_")] = value
        elif when == "after" and rest.endswith(("rejection_auroc", "consistency", "label_mass", "parse_failures")):
            found.setdefault("beside", {})[rest] = value
    return found


def _mean(rows: Sequence[Mapping[str, Any]]) -> Row:
    """Means over seeds of everything that all seeds have."""
    return {
        key: _mean([row[key] for row in rows]) if isinstance(value, Mapping) else statistics.fmean(row[key] for row in rows)
        for key, value in rows[0].items()
        if all(key in row for row in rows)
    }


def _memory(folder: Path, name: str, support: Path, corpus: Path) -> Path:
    """The config of a memory, which is built."""
    file = folder / f"{name}.yaml"
    memory = {"uri": str(folder / f"{name}.milvus"), "support": {"uri": str(support)}}
    file.write_text(yaml.safe_dump({"corpus": {"uri": str(corpus)}, "memory": memory}))
    if not (folder / f"{name}-memory" / "metrics.json").exists():
        _command("memory", file, folder / f"{name}-memory")
    return file


def _command(verb: str, config: Path, out: Path) -> Path:
    """The run folder of `rar VERB`, which is over. Raises Unavailable where it fails."""
    with out.with_suffix(".log").open("w") as told:
        arguments = [sys.executable, "-m", f"jobs.{verb}", str(config), "--out", str(out)]
        code = subprocess.run(arguments, stdout=told, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise Unavailable(f"rar {verb} {config} ended with {code}: {out.with_suffix('.log').read_text()[-800:]}")
    return out


def _describer(out: Path, given: Path | None) -> str:
    """The folder of an MLLM that never saw a list; trained where it is not there yet."""
    folder = given or out / "describer"
    if not (folder / "mllm" / "config.json").exists():
        (out / "photos").mkdir(parents=True, exist_ok=True)
        miniature_train.describer(folder, out / "photos", miniature_train.STEPS | {"mllm": miniature_train.CAPTIONS}, 0)
    return str((folder / "mllm").resolve())


def shifted(folder: Path, seed: int) -> None:
    """folder/{support,test}/<class>/*.png: novel classes of a world as `darkened` shows them; once."""
    if (folder / "whole").exists():
        return
    with two_processes() as pool:
        list(pool.map(partial(_write, folder, seed), vocabulary("novel", seed), chunksize=8))
    (folder / "whole").touch()


def _write(folder: Path, seed: int, spec: Spec) -> None:
    for part, count in (("support", SHOTS), ("test", TESTS)):
        (folder / part / spec.name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            rng = rng_of(seed, f"shifted {part}", spec.name, number)
            pixels = darkened(render(spec, DRAWN, rng), rng)
            Image.fromarray(pixels).save(folder / part / spec.name / f"{number}.png")


def darkened(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(S, S, 3) uint8: smaller in its frame, in poor coloured light, with a sensor's noise."""
    side = len(pixels)
    small = round(side * SMALL)
    inner = np.asarray(Image.fromarray(pixels).resize((small, small), Image.Resampling.BILINEAR), np.float32) / 255
    before = (side - small) // 2
    framed = np.pad(inner, [(before, side - small - before)] * 2 + [(0, 0)], mode="reflect")
    light = rng.uniform(*LIGHT) * (1 + TINT * rng.uniform(-1, 1, 3))
    noisy = framed * light + NOISE * rng.standard_normal(framed.shape)
    return (np.clip(noisy, 0, 1) * 255 + 0.5).astype(np.uint8)
