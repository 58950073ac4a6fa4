"""`rar sweep --search`: settings chosen on the memory alone, each support picture judged by heads that have not seen it.

No test picture is read. A trial draws a value for each key of the grid's `search`, builds (or finds) the memory of its shots,
and is worth the leave-one-out accuracy there: the retriever's, or with a ranker the cross-validated accuracy of fusing its
answers (`fusion.fit`). More shots are judged on more pictures, each with one of its class less: what is compared is what a user
with that memory would have. Optuna proposes (TPE, seeded); trials are kept in out/search.log, so that a killed search goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rar import config, storage
from rar.config import Config
from rar.memory.store import open_store
from rar.schema import UserError
from rar.sweep.grid import Cell, Grid, merged, settings_of
from rar.sweep.sources import prepare

if TYPE_CHECKING:
    import optuna

    from rar.engine.session import Session

Drawn = dict[str, Any]  # dotted key -> value


def run(grid: Grid, dataset: str, out: Path, trials: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Search one data set's settings; returns {"best": {key: value}, "leave_one_out", "trials"} and writes it to search.json.

    Raises UserError where the grid names nothing to search, or Optuna is not there.
    """
    if not grid.search:
        raise UserError("the grid has no `search`: name keys and their values, e.g. search: {retriever.mode: [fused, lda]}")
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise UserError("--search needs Optuna: pip install 'rar[search]'") from None
    from rar.engine import session

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    source = prepare(dataset, grid.datasets[dataset], out / "data", grid.seeds[:1])(grid.seeds[0])
    journal = JournalFileBackend(str(out / "search.log"))
    study = optuna.create_study(
        study_name=dataset,
        storage=optuna.storages.JournalStorage(journal),
        sampler=optuna.samplers.TPESampler(seed=grid.seeds[0]),
        direction="maximize",
        load_if_exists=True,
    )
    with session.opened() as opened:

        def objective(trial: optuna.Trial) -> float:
            drawn = {key: trial.suggest_categorical(key, values) for key, values in grid.search.items()}
            value = _known(study, drawn)
            try:
                value = worth(opened, grid, dataset, source, out, drawn) if value is None else value
            except UserError as error:  # settings that do not fit together, or no settings at all
                say(f"trial {trial.number}: refused: {error}")
                raise optuna.TrialPruned from None
            say(f"trial {trial.number}: {value:.4f} {json.dumps(drawn)}")
            return value

        study.optimize(objective, n_trials=max(0, trials - len(_ended(study))))
    ended = _ended(study)
    if not ended:
        raise UserError("no trial could be judged: every combination was refused; see the lines above")
    best = max(ended, key=lambda one: one.value or 0.0)
    found = {"best": best.params, "leave_one_out": best.value, "trials": len(ended)}
    storage.write(out / "search.json", json.dumps(found, indent=1).encode())
    return found


def _ended(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return [one for one in study.trials if one.value is not None]


def _known(study: optuna.Study, drawn: Drawn) -> float | None:
    """What equal settings were worth before."""
    return next((one.value for one in _ended(study) if one.params == drawn), None)


def settings_for(grid: Grid, dataset: str, source: dict[str, Any], drawn: Drawn) -> Config:
    """`base` and the data set with the drawn values; memory.shots is the grid's largest where it is not drawn."""
    pieces = merged({**grid.base}, {})
    for key, value in drawn.items():
        section: Any = pieces
        *path, last = key.split(".")
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    shots = int(drawn.get("memory.shots", max(grid.shots)))
    top_k = int(drawn.get("retriever.top_k", grid.top_k[0]))
    made = grid.model_copy(update={"base": {}})
    name = next(iter(grid.encoders))
    cell = Cell(dataset, shots, grid.seeds[0], name, "drawn", top_k)
    arms = {"drawn": next(iter(grid.arms.values())).model_copy(update={"config": pieces, "per_shots": True})}
    return settings_of(made.model_copy(update={"arms": arms}), cell, source)


def worth(opened: Session, grid: Grid, dataset: str, source: dict[str, Any], out: Path, drawn: Drawn) -> float:
    """Leave-one-out accuracy on the memory. Raises UserError for settings that do not fit together."""
    from rar.run import build, recognise, shared
    from rar.run.calibrate import judged

    settings = settings_for(grid, dataset, source, drawn)
    if settings.memory.shots == 1 or settings.memory.support is None:
        raise UserError("one picture a class leaves none to judge by; search two shots or more")
    plain = settings.model_dump(mode="json", include={"memory", "encoder"}) | {"seed": settings.run.seed}
    name = shared.key(settings, plain)
    uri = str(out / "shared" / "memories" / f"search-{name}.milvus")
    settings = config.validated(config.Config, merged(settings.model_dump(mode="json"), {"memory": {"uri": uri}}))
    with open_store(uri) as address:
        there = replace(opened, memory=address)
        build.build_memory(there, settings, fresh=False)
        vocabulary = recognise.prepare(there, settings)
        return judged(there, settings, vocabulary)
