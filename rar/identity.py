"""What decides a prediction, and what does not: the one answer for run folders, the answer cache and Serve applications.

It decides: the settings but for SPEED and METRICS below; the words of the prompts; the weights of every model that is asked
(and of the adapter); the state of the memory (`rar.runfolder` adds it, as the store must be open to know it); and the code of
the rooms that a row passes, CODE. Devices, precisions and batch sizes count as settings, because they move last digits. It
does not: how many workers and replicas there are, patience, where answers are kept, and what is made of predictions
afterwards.

- Weights in a folder are known by content, wherever the folder lies. A file of up to WHOLE_BYTES is hashed whole; of a larger
  one its length and SAMPLES blocks spread over it are, 64 MiB in all, so that a model of any size costs well under a second
  from a disk's cache. Cost: a large file that was edited by hand in a few bytes between two blocks goes unnoticed; training
  does not do that. Digests are kept by path, size and time stamp for as long as the process lives.
- Weights by hub name are known by the commit in this machine's cache, without any request; a name that is not there yet is
  unknown (None), which equals anything and is filled in by the next command. open_clip's `architecture/pretrained` is a table
  of that package, so its version stands for it; what it holds is also in the memory's state, by the encoder's fingerprint.
- The code is hashed as it is written, without asking what changed: a run that was begun before an upgrade (or an edited
  comment) in one of these rooms is refused, and goes on with the old version or starts afresh. That is the price of never
  mixing two.
- Versions of torch and the like are noted in run.json, but decide nothing. Pictures that are replaced under the same name, in
  a folder or behind an endpoint's name, are not seen: no run reads its corpus twice to find out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rar import config, miniature
from rar.config import Config
from rar.ranker.wording import load_wording

SPEED = (
    "encoder.workers",
    "encoder.max_workers",
    "encoder.num_gpus",
    "encoder.num_cpus",
    "encoder.resources",
    "detect.detector.workers",
    "detect.detector.max_workers",
    "detect.detector.num_gpus",
    "detect.detector.num_cpus",
    "detect.detector.resources",
    "ranker.min_replicas",
    "ranker.max_replicas",
    "ranker.num_gpus",
    "ranker.num_cpus",
    "ranker.resources",
    "ranker.keep",
    "ranker.in_flight",
    "ranker.concurrency",
    "ranker.max_calls",
    "ranker.token_budget",
    "ranker.timeout_s",
    "ranker.attempts",
    "ranker.cache",
    "memory.token",
    "run.patience_s",
    "serve",
    "tune",
)
TUNE_SPEED = ("tune.workers", "tune.num_gpus", "tune.accumulate", "tune.gradient_checkpointing", "tune.merged", "tune.others")
METRICS = ("detect.score", "detect.style", "detect.classes_per_box", "run.max_failed_fraction", "run.sentence_encoder")
ANSWERING = (
    *("ranker", "checkpoint.py", "device.py", "corpus/decode.py"),
    *("engine/client.py", "engine/direct.py", "engine/exemplars.py", "engine/isolate.py", "engine/replica.py"),
)
CODE = (
    *ANSWERING,
    *("boxes.py", "columns.py", "fusion.py", "crops", "encoder", "memory", "retriever"),
    *("engine/stages.py", "engine/reading.py", "engine/models.py", "engine/entering.py", "engine/choosing.py"),
    *("corpus/frame.py", "corpus/listing.py", "corpus/tars.py", "corpus/vectors.py"),
    *("run/calibrate.py", "run/fitting.py", "run/recognise.py", "run/steps.py"),
)
MEASURING = ("evaluation", "run/measure.py", "fusion.py", "encoder/sentences.py")
WHOLE_BYTES = 64 << 20
SAMPLES, SAMPLE_BYTES = 256, 256 << 10
ABSENT = "(absent)"

Identity = dict[str, Any]  # part -> {name: value} or a digest; JSON


def of_run(settings: Config) -> Identity:
    """The identity of a run: JSON of settings, prompts, weights and code. Raises UserError for faulty prompts."""
    ranker, detector = settings.ranker, settings.detect.detector
    weights = {"encoder": _encoder_weights(settings.encoder.model)}
    if detector is not None:
        weights["detector"] = _weights(detector.model)
    return {
        "settings": {key: value for key, value in _decisive(settings) if key != "ranker.prompts"},
        "prompts": load_wording(ranker.prompts).fingerprint(),
        "weights": weights | _ranker_weights(ranker),
        "code": _code(CODE),
    }


def of_tuning(settings: Config) -> Identity:
    """That of a run with what decides an adapter: how it is trained and judged. Raises UserError for an unreadable config."""
    whole, given = of_run(settings), dict(_flat(settings.model_dump(mode="json", include={"tune"})))
    own = {key: value for key, value in given.items() if not key.startswith(TUNE_SPEED)}
    others = {f"tune.others.{name}": fingerprint(config.read(path)) for name, path in settings.tune.others.items()}
    return {**whole, "settings": {**whole["settings"], **own, **others}, "code": _code((*CODE, "tune"))}


def of_verb(verb: str, settings: Config) -> Identity:
    """What a folder of a verb is of."""
    return of_tuning(settings) if verb == "tune" else of_run(settings)


def of_answers(settings: config.Ranker, *extras: str) -> Identity:
    """What decides a ranker's answer besides the picture and the names.

    extras: what else the caller shows or does, such as the label prior, or the pictures of exemplars.
    """
    own = dict(_decisive(settings, "ranker."))
    del own["ranker.prompts"]
    return {
        "settings": own,
        "prompts": load_wording(settings.prompts).fingerprint(),
        "weights": _ranker_weights(settings),
        "code": _code(ANSWERING),
        "extras": list(extras),
    }


def of_metrics(settings: Config) -> Identity:
    """What decides metrics and detections once there are predictions."""
    every, judge = dict(_flat(settings.model_dump(mode="json"))), settings.run.sentence_encoder
    made = {"settings": {key: every[key] for key in METRICS if key.startswith("detect.")}, "code": _code(MEASURING)}
    return {**made, "sentences": folder_digest(Path(judge))} if judge is not None and settings.run.vocabulary_free else made


def fingerprint(identity: Any) -> str:
    """16 hex digits of anything that is JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def differences(known: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What changed between two identities, each in a few words for the user; what one of them does not know is not compared."""
    found = []
    before, after = known.get("settings", {}), now.get("settings", {})
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key, ABSENT), after.get(key, ABSENT)
        if old != new:
            found.append(f"{key} was {_short(old)}, is {_short(new)}")
    if known.get("prompts") != now.get("prompts"):
        found.append("the words of the prompts have changed")
    held, seen = known.get("weights", {}), now.get("weights", {})
    found += [
        f"the weights of the {name} have changed"
        for name in held.keys() & seen.keys()
        if None not in (held[name], seen[name]) and held[name] != seen[name]
    ]
    rooms = sorted(name for name, digest in now.get("code", {}).items() if known.get("code", {}).get(name) != digest)
    if rooms:
        found.append(f"rar itself has changed ({', '.join(rooms)})")
    if None not in (known.get("memory"), now.get("memory")) and known["memory"] != now["memory"]:
        found.append(f"the memory has changed ({known['memory']}, now {now['memory']})")
    return found


def completed(known: Identity, now: Mapping[str, Any]) -> Identity:
    """An identity with what it did not know yet (weights that were fetched since, the memory's state) taken from another."""
    weights = {name: known["weights"].get(name) or digest for name, digest in now.get("weights", {}).items()}
    return {**now, **known, "weights": {**known["weights"], **weights}}


def _decisive(settings: config.Strict, section: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of the settings that count. section: the dotted name of `settings` within Config."""
    for key, value in _flat(settings.model_dump(mode="json"), section):
        if not any(key == one or key.startswith(f"{one}.") for one in (*SPEED, *METRICS)):
            yield key, value


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _short(value: Any) -> str:
    text = value if value == ABSENT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _ranker_weights(settings: config.Ranker) -> dict[str, str | None]:
    if not settings.starts_models:  # an endpoint's weights are its own affair
        return {}
    found = {"ranker": folder_digest(miniature.MLLM) if settings.model == "miniature" else _weights(settings.model)}
    return found if settings.adapter is None else {**found, "adapter": _weights(settings.adapter)}


def _encoder_weights(model: str) -> str | None:
    if model == "precomputed":
        return model
    if model == "miniature":
        return folder_digest(miniature.CLIP)
    if Path(model).is_dir():
        return folder_digest(Path(model))
    package = "timm" if model.startswith("timm/") else "open_clip_torch"
    return f"{model} of {package} {version(package)}"


def _weights(name: str) -> str | None:
    """Of a local folder or a hub name."""
    return folder_digest(Path(name)) if Path(name).is_dir() else _hub_commit(name)


@cache
def _hub_commit(name: str) -> str | None:
    """As it is when first asked for: a command whose ranker fetches its weights must find it again by the same name."""
    from huggingface_hub import constants  # imports in milliseconds, and knows the environment's HF_HOME and HF_HUB_CACHE

    file = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "refs" / "main"
    return file.read_text().strip() if file.is_file() else None


def folder_digest(folder: Path) -> str:
    """32 hex digits of the names and contents of a folder's files, hidden ones and .md left out. Equal for all copies."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix != ".md"):
        name = file.relative_to(folder).as_posix()
        if not any(part.startswith(".") for part in name.split("/")):
            stat = file.stat()
            digest.update(f"{name}\n{_file_digest(str(file), stat.st_size, stat.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


@lru_cache(maxsize=4096)
def _file_digest(path: str, size: int, mtime_ns: int) -> str:
    """Of the whole file up to WHOLE_BYTES, else of evenly spread blocks, the first and the last among them."""
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with open(path, "rb") as stream:
        if size <= WHOLE_BYTES:
            while block := stream.read(1 << 20):
                digest.update(block)
        else:
            for number in range(SAMPLES):
                stream.seek(number * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


@cache
def _code(rooms: Sequence[str]) -> dict[str, str]:
    """Room or file of rar/ -> 16 hex digits of its source."""
    root, found = Path(__file__).parent, {}
    for room in rooms:
        digest = hashlib.blake2b(digest_size=8)
        for file in sorted([root / room] if room.endswith(".py") else (root / room).glob("*.py")):
            digest.update(f"{file.name}\n".encode() + file.read_bytes())
        found[room.removesuffix(".py")] = digest.hexdigest()
    return found
