"""A drawn world, its memory in an open store, and runs over it: what tests of runs share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rar import config
from rar.engine.session import Session
from rar.run import recognise
from rar.run.work import classify_work, detect_work
from rar.runfolder import RunFolder


@dataclass
class Lab:
    """A drawn world, an open store and what a run needs."""

    world: Path
    store: Path
    session: Session

    def settings(self, **sections: Any) -> config.Config:
        data: dict[str, Any] = {
            "corpus": {"uri": str(self.world / "novel" / "test")},
            "memory": {"name": "novel", "uri": str(self.store), "support": {"uri": str(self.world / "novel" / "support")}},
            "ranker": {"batch_size": 16},
            "run": {"shard_size": 25},
        }
        for name, section in sections.items():
            data[name] = {**data.get(name, {}), **section}
        return config.validated(config.Config, data)

    def run(self, settings: config.Config, path: Path, verb: str = "classify") -> tuple[RunFolder, dict[str, float]]:
        work = detect_work(settings) if verb == "detect" else classify_work(settings)
        vocabulary = recognise.prepare(self.session, settings)
        folder = RunFolder.open(path, verb, settings, fresh=False, name="test", group=verb)
        return folder, recognise.run(self.session, settings, vocabulary, work, folder)
