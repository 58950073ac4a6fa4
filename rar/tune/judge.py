"""How well the ranker ranks, before and after: the served application is asked, so what is judged is what will serve.

The truth is in every list (whether it was retrieved is not the ranker's doing), and lists are shuffled. `consistency` asks
about the same list turned by a third and by two thirds: the share of pictures whose first name stays the same all three times.
`rejection_auroc` asks with "none of these" shown, once with the truth and once without it, in lists of equal length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rar.config import Config, Ranker
from rar.engine import client
from rar.engine.session import Session
from rar.evaluation.intervals import accuracy, paired_difference
from rar.schema import Ranking, RankStatus
from rar.tune import draw
from rar.tune.draw import Lesson
from rar.tune.pictures import Pictures

# One row a list about a picture: `set`, `size` of the list, `row` of the data; whether the first name is right, and the same in
# every turn; none_with, none_without: probability of "none of these" with the truth listed and without.
JUDGED = pa.schema(
    [
        ("set", pa.string()),
        ("size", pa.int64()),
        ("row", pa.int64()),
        ("label", pa.string()),
        ("pick", pa.string()),
        ("right", pa.bool_()),
        ("same", pa.bool_()),
        ("mass", pa.float64()),
        ("status", pa.string()),
        ("none_with", pa.float64()),
        ("none_without", pa.float64()),
    ]
)


def sets_of(settings: Config, rows: pa.Table) -> list[str]:
    """What is judged: seen, novel where classes were kept out, and the other data sets."""
    present = set(rows["split"].to_pylist())
    return [name for name in ("seen", "novel", *settings.tune.others) if name in present]


def judge(session: Session, settings: Config, rows: pa.Table) -> pa.Table:
    """Ask the ranker that `settings` names about every set; returns JUDGED. Its application ends before this returns."""
    seed, most = settings.run.seed, settings.tune.judged
    main = settings.retriever.top_k
    lists = {
        (name, size): draw.judged(rows, name, size, seed, most)
        for name in sets_of(settings, rows)
        for size in dict.fromkeys([main, *settings.tune.lengths])
    }
    every = [(name, size, lesson) for (name, size), found in lists.items() for lesson in found]
    turned = [lesson for _, size, lesson in every if size == main]
    plain = settings.ranker.model_copy(update={"debias": "none", "exemplars": 0})
    pictures = Pictures(rows)
    asked = [lesson for *_, lesson in every]
    again = [_turned(lesson, part) for part in (1, 2) for lesson in turned]
    answers = ranked(session, plain, pictures, [*asked, *again])
    firsts = [lesson.names[ranking.order[0]] for lesson, ranking in zip([*asked, *again], answers, strict=True)]
    picks, picked_again = firsts[: len(asked)], firsts[len(asked) :]
    chances = _chances(session, plain, pictures, turned) if plain.method == "letters" else [(None, None)] * len(turned)
    labels = rows["label"].to_pylist()
    records, place = [], 0
    for (name, size, lesson), pick, ranking in zip(every, picks, answers[: len(asked)], strict=True):
        record = {"set": name, "size": size, "row": lesson.row, "label": labels[lesson.row], "pick": pick}
        record |= {"right": pick == labels[lesson.row], "mass": ranking.label_mass, "status": ranking.status.value}
        if size == main:
            others = (picked_again[place], picked_again[place + len(turned)])
            record |= {"same": all(other == pick for other in others)}
            record |= dict(zip(("none_with", "none_without"), chances[place], strict=True))
            place += 1
        records.append(record)
    return pa.Table.from_pylist(records, JUDGED)


def ranked(session: Session, ranker: Ranker, pictures: Pictures, lessons: Sequence[Lesson]) -> list[Ranking]:
    """The served ranker's answers."""
    client.deploy(session, ranker)
    ask = client.ask(session, ranker)
    assert ask is not None
    batches = []
    for start in range(0, len(lessons), ranker.batch_size):
        part = lessons[start : start + ranker.batch_size]
        batches.append((pictures.encoded([lesson.row for lesson in part]), [lesson.names for lesson in part]))
    with ThreadPoolExecutor(ranker.in_flight) as pool:
        answers = list(pool.map(ask, *zip(*batches, strict=True)))
    client.undeploy(ranker)
    return [ranking for batch in answers for ranking in batch]


def _turned(lesson: Lesson, part: int) -> Lesson:
    shift = max(1, part * len(lesson.names) // 3) % len(lesson.names)
    return replace(lesson, names=lesson.names[shift:] + lesson.names[:shift])


def _chances(
    session: Session, plain: Ranker, pictures: Pictures, lessons: Sequence[Lesson]
) -> list[tuple[float | None, float | None]]:
    """Probability of "none of these" with the truth (one wrong name less) and without it; None for lists of two names."""
    refusing = plain.model_copy(update={"none_of_these": True})
    long = [place for place, lesson in enumerate(lessons) if len(lesson.names) > 2]
    shorter = []
    for place in long:
        names, truth = lessons[place].names, lessons[place].answer
        last = max(one for one in range(len(names)) if one != truth)
        shorter.append([name for one, name in enumerate(names) if one != last])
    bare = [[name for one, name in enumerate(lessons[p].names) if one != lessons[p].answer] for p in long]
    asked = [replace(lessons[p], names=names) for listed in (shorter, bare) for p, names in zip(long, listed, strict=True)]
    told = [_none_of(ranking) for ranking in ranked(session, refusing, pictures, asked)]
    found: list[tuple[float | None, float | None]] = [(None, None)] * len(lessons)
    for number, place in enumerate(long):
        found[place] = (told[number], told[number + len(long)])
    return found


def _none_of(ranking: Ranking) -> float | None:
    value = ranking.response.rpartition(": ")[2]
    return None if ranking.status == RankStatus.FALLBACK and not value else float(value)


def metrics(judged: pa.Table, main: int) -> dict[str, float]:
    """`<set>.<metric>` of what was asked; intervals over classes."""
    values: dict[str, float] = {}
    for name in dict.fromkeys(judged["set"].to_pylist()):
        for size in dict.fromkeys(judged["size"].to_pylist()):
            part = judged.filter(pc.and_(pc.equal(judged["set"], name), pc.equal(judged["size"], size)))
            if not part.num_rows:
                continue
            key = f"{name}.conditional_rank_accuracy" + ("" if size == main else f"_at_{size}")
            right, low, high = accuracy(part["right"].to_numpy(zero_copy_only=False), part["label"].to_pylist(), seed=0)
            values |= {key: right, f"{key}.ci_low": low, f"{key}.ci_high": high}
            if size == main:
                values |= {f"{name}.{metric}": value for metric, value in _beside(part).items()}
    return values


def _beside(part: pa.Table) -> dict[str, float]:
    mass, with_truth, without = (part[column].drop_null().to_numpy() for column in ("mass", "none_with", "none_without"))
    return {
        "consistency": float(np.mean(part["same"].to_numpy(zero_copy_only=False))),
        "label_mass": float(mass.mean()) if len(mass) else float("nan"),
        "rejection_auroc": auroc(without, with_truth),
        "parse_failures": float(pc.sum(pc.equal(part["status"], RankStatus.FALLBACK.value)).as_py()),
        "lists": float(part.num_rows),
    }


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Chance that a positive scores above a negative, ties half (Mann-Whitney); NaN where either is missing."""
    if not len(positive) or not len(negative):
        return float("nan")
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([positive, negative]))[: len(positive)]
    return float((ranks.sum() - len(positive) * (len(positive) + 1) / 2) / (len(positive) * len(negative)))


def compared(before: pa.Table, after: pa.Table, main: int) -> dict[str, float]:
    """Everything of metrics.json: before.*, after.*, and gain.* with paired intervals over classes."""
    values = {f"before.{key}": value for key, value in metrics(before, main).items()}
    values |= {f"after.{key}": value for key, value in metrics(after, main).items()}
    for name in dict.fromkeys(before["set"].to_pylist()):
        for size in dict.fromkeys(before["size"].to_pylist()):
            chosen = [
                table.filter(pc.and_(pc.equal(table["set"], name), pc.equal(table["size"], size))) for table in (after, before)
            ]
            if chosen[0].num_rows:
                now, then = (part["right"].to_numpy(zero_copy_only=False) for part in chosen)
                gain, low, high = paired_difference(now, then, chosen[0]["label"].to_pylist(), seed=0)
                key = f"gain.{name}.conditional_rank_accuracy" + ("" if size == main else f"_at_{size}")
                values |= {key: gain, f"{key}.ci_low": low, f"{key}.ci_high": high}
    return values


def told(values: Mapping[str, Any]) -> str:
    """The comparison in a few lines."""
    lines = []
    for key in (key for key in values if key.startswith("gain.") and not key.endswith(("ci_low", "ci_high"))):
        name = key.removeprefix("gain.")
        what = name.replace(".conditional_rank_accuracy_at_", ", lists of ").replace(".conditional_rank_accuracy", "")
        low, high = values[f"{key}.ci_low"], values[f"{key}.ci_high"]
        before, after = values[f"before.{name}"], values[f"after.{name}"]
        lines.append(f"  {what}: {before:.3f} before, {after:.3f} after ({values[key]:+.3f} [{low:+.3f}, {high:+.3f}])")
    return "\n".join(lines)
