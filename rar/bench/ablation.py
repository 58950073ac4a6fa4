"""What each part of detection is worth, on miniature scenes (`rar bench ablation`): given boxes, noisy proposals, and a grid.

The grid crosses the window's growth (by object size, or tight), the surroundings (blurred, or left), the views (one, or tight
and context averaged) and the ranker (none, or letters). Every arm is an ordinary `rar detect` run over the same scenes; arms
that differ in the ranker alone share their embeddings. AP is in COCO style with the frequency groups of LVIS. A run is left in
the folder, so that its report shows the crops.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rar import config
from rar.engine import session
from rar.engine.session import Session
from rar.miniature.data import noisy_proposals, write_scene_support, write_world
from rar.run import build, recognise, steps
from rar.run.work import detect_work
from rar.runfolder import RunFolder

KEYS = ("ap", "ap50", "ap_rare", "ap_common", "ap_frequent", "ap_small", "ap_medium", "ap_large", "top1", "ranked_fraction")
ARMS: dict[str, dict[str, Any]] = {
    "clip": {"retriever": {"mode": "text"}, "ranker": {"method": "none"}},
    "retriever": {"ranker": {"method": "none"}},
    "rar": {},
}
WINDOW = {"size": 96, "outside": "blur"}  # what the parts are held against, for retriever and ranker alike
PARTS = {"scale": ["adaptive", "tight"], "outside": ["blur", "none"], "views": ["one", "with context"]}


def run(out: Path, seed: int = 0, scenes: int = 450, shots: int = 4) -> dict[str, Any]:
    """Draw the scenes, run all arms, and return {"boxes", "given": {arm: AP...}, "proposals": ..., "grid": [row, ...]}."""
    write_world(out / "world", seed, shots=shots, tests=1, scenes=scenes)
    write_scene_support(out / "world", seed)
    truth = json.loads((out / "world" / "scenes.json").read_text())
    (out / "proposals.json").write_text(json.dumps(noisy_proposals(truth, seed)))
    with session.opened(_settings(out, seed, {}).memory, create=True) as opened:
        build.build_memory(opened, _settings(out, seed, {}), fresh=False)
        given = dict(_arms(opened, out, seed, "given", {}, ARMS))
        proposed = dict(_arms(opened, out, seed, "proposals", {"proposals": str(out / "proposals.json")}, ARMS))
        grid = list(_grid(opened, out, seed))
    return {"boxes": len(truth["annotations"]), "images": scenes, "given": given, "proposals": proposed, "grid": grid}


def _settings(out: Path, seed: int, detect: Mapping[str, Any], **sections: Any) -> config.Config:
    world = out / "world"
    memory = {"name": "scenes", "uri": str(out / "memory.milvus"), "support": {"uri": str(world / "scenes_support.csv")}}
    data: dict[str, Any] = {
        "corpus": {"uri": str(world / "scenes.json")},
        "memory": {**memory, "classes": str(world / "scenes.json")},
        "detect": {"crop": WINDOW, "shown": WINDOW} | dict(detect),
        "run": {"seed": seed},
        **sections,
    }
    return config.validated(config.Config, data)


def _grid(opened: Session, out: Path, seed: int) -> Iterator[dict[str, Any]]:
    for names in itertools.product(*PARTS.values()):
        scale, outside, views = names
        window = WINDOW | {"outside": outside}
        seen = [scale] if views == "one" else [scale, "context"]
        title = "-".join(names).replace(" ", "_")
        both = {"crop": window | {"views": seen}, "shown": window | {"view": scale}}
        for arm, values in _arms(opened, out, seed, title, both, {"retriever": ARMS["retriever"], "rar": ARMS["rar"]}):
            yield {**dict(zip(PARTS, names, strict=True)), "ranker": "letters" if arm == "rar" else "none", **values}


def _arms(
    opened: Session, out: Path, seed: int, title: str, detect: Mapping[str, Any], arms: Mapping[str, dict[str, Any]]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Embed the boxes once, then run every arm over them."""
    base = _settings(out, seed, detect)
    work = detect_work(base)
    facts = opened.encoder(base.encoder).facts
    vectors = steps.vectors(opened, base, work, facts).materialize()
    for arm, sections in arms.items():
        settings = _settings(out, seed, detect, **sections)
        folder = RunFolder.open(out / "runs" / f"{title}-{arm}", "detect", settings, fresh=True, name=arm, group=title)
        vocabulary = recognise.prepare(opened, settings)
        values = recognise.run(opened, settings, vocabulary, work, folder, steps.shared(vocabulary, vectors))
        yield arm, {key: values[key] for key in KEYS if key in values}
