"""What `rar tune` teaches, and what each part of it is worth: whole commands on miniature worlds, judged before and after.

A seed is a world (classes and photos) and a training. Learned from: 16 support photos of each of 120 classes, less what `rar
tune` keeps out to judge by as `seen`; judged by as `novel`: test photos of 120 classes whose families no weight has seen. Four
questions, an experiment each:

- `describer`: from an MLLM that was taught to name pictures and never shown a list (`python -m rar.miniature.train
  --describer`, trained here unless --describer names one), asked for the sorted list: our lists, names as labels and an anchor,
  and without these, read as they are trained (`ranker.method: first`), against RAR's own (presets paper-code and paper-text,
  read as the paper does, `generate`, and by `first`), for as many steps; and asked for letters instead.
- `parts`: from the shipped miniature, which was trained on lists of at most six names, asked for letters about lists of up to
  ten: what is trained on label tokens (`labels`) and with each part of it left out.
- `long`: from the same, on lists of up to 20: read by `first`, and by letters (all weights are trained).
- `shifted`: from the same, on photos of the novel classes in poorer light, noisy and small, SHOTS a class: what sees or all of
  the model. `plain` is its accuracy on the same classes' ordinary photos, `regained` the share of what was lost that came back.

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

PHOTOS, TESTS, SHOTS, JUDGED = 16, 3, 4, 300
STEPS = {"describer": 300, "parts": 200, "long": 300, "shifted": 300}
RATE = 0.002
WRITTEN, FIRST = {"ranker": {"method": "generate", "max_new_tokens": 64}}, {"ranker": {"method": "first"}}
TEN, TWENTY = {"max_list": 10, "lengths": [10]}, {"max_list": 20, "lengths": [10, 20]}
ARMS: dict[str, dict[str, dict[str, Any]]] = {  # experiment -> arm -> what it has of its own: `ranker`, and else of `tune`
    "describer": {
        "rar": FIRST | {"anchor": 1.0},
        "no_anchor": FIRST,
        "loss_of_text": FIRST | {"loss": "text"},
        "paper_code": WRITTEN | {"preset": "paper-code"},
        "paper_code_first": FIRST | {"preset": "paper-code"},
        "paper_text": WRITTEN | {"preset": "paper-text"},
        "letters": {},
    },
    "parts": {
        "labels": TEN,
        "loss_of_text": TEN | {"loss": "text"},
        "unshuffled": TEN | {"shuffle": False},
        "no_rejections": TEN | {"rejections": 0.0},
    },
    "long": {
        "first": FIRST | TWENTY | {"anchor": 1.0},
        "letters": TWENTY | {"weights": "full", "learning_rate": 0.001},
    },
    "shifted": {
        "sight_alone": {
            **{"vision": "only", "lora_rank": 8, "lora_alpha": 16, "learning_rate": 0.0005},
            **{"held_out": 0.05, "rejections": 0.0, "easy": 0.5},  # four pictures a class: to learn from, nearly all
        },
        "all": {"vision": True},
    },
}
BESIDE = ("rejection_auroc", "consistency", "label_mass", "parse_failures")  # metrics of judge that a method may not have
LIGHT, TINT, NOISE, SMALL = (0.45, 0.7), 0.25, 0.05, 0.8  # of a shifted photo

Row = dict[str, Any]


def run(
    out: Path,
    seeds: Sequence[int],
    only: Sequence[str] = tuple(ARMS),
    arms: Sequence[str] | None = None,
    describer: Path | None = None,
    steps: int | None = None,
) -> Row:
    """{experiment: {arm: {"seeds": {seed: accuracies and gains}, "mean": ...}}}.

    only: experiments. arms: of these, by name; default: all. steps: of every training, else STEPS.
    """
    found: Row = {"seeds": list(seeds), "steps": {name: steps or STEPS[name] for name in only}}
    for name in only:
        model = _describer(out, describer) if name == "describer" else "miniature"
        found[name] = {}
        for arm in (arm for arm in ARMS[name] if arms is None or arm in arms):
            by = {str(seed): _taught(out, name, arm, model, seed, steps or STEPS[name]) for seed in seeds}
            found[name][arm] = {"seeds": by, "mean": _mean(list(by.values()))}
    return found


def _taught(out: Path, experiment: str, arm: str, model: str, seed: int, steps: int) -> Row:
    """One `rar tune`: what it says of accuracy, and minutes."""
    folder = out / f"seed-{seed}"
    write_world(folder / "world", seed, shots=PHOTOS, tests=TESTS, scenes=1)
    novel = _memory(folder, "novel", folder / "world" / "novel" / "support", folder / "world" / "novel" / "test")
    if experiment == "shifted":
        shifted(folder / "shifted", seed)
        learned = _memory(folder, "shifted", folder / "shifted" / "support", folder / "shifted" / "test")
        others = {"shifted": str(learned), "plain": str(novel)}
    else:
        learned = _memory(folder, "seen", folder / "world" / "seen" / "support", folder / "world" / "seen" / "test")
        others = {"novel": str(novel)}
    own = dict(ARMS[experiment][arm])
    ranker = {"model": model, **own.pop("ranker", {})}
    tune = {"max_steps": steps, "learning_rate": RATE, "novel_classes": 0, "judged": JUDGED, "check_every": 100, **own}
    config = {"ranker": ranker, "tune": tune | {"others": others}, "run": {"seed": seed}}
    file = folder / f"{experiment}-{arm}-{steps}.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(learned.read_text()) | config))
    ended = _command("tune", file, file.with_suffix(""))
    values = json.loads((ended / "metrics.json").read_text())
    found = _told(values) | {"minutes": json.loads((ended / "run.json").read_text())["seconds"] / 60}
    if experiment == "shifted":
        lost = found["before"]["plain"] - found["before"]["shifted"]
        found |= {"lost": lost, "regained": found["gain"]["shifted"] / lost}
    return found


def _told(values: Mapping[str, float | None]) -> Row:
    """before, after and gain of each set and length of list; ends of gains' intervals; what stands beside accuracy."""
    key = ".conditional_rank_accuracy"
    found: Row = {}
    for name, value in values.items():
        when, _, rest = name.partition(".")
        if key in rest and (when == "gain" or not rest.endswith(("ci_low", "ci_high"))):
            found.setdefault(when, {})[rest.replace(key, "").replace(".ci_", "_")] = value
        elif when == "after" and value is not None and rest.endswith(BESIDE):
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
