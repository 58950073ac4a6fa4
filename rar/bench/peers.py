"""`rar embed` beside what people use instead: whole commands, from a folder of JPEGs to files of vectors, in turns.

Ours is `rar embed`, not `rar memory`: its parquet of ids and vectors is what the peers leave behind too (npy or parquet), where
a memory would be written into Milvus besides. It runs twice a round, in fp32 and, where the processor multiplies it, in bf16;
every peer runs once, in fp32, as all of them do on a CPU unless told. The peers are `clip-retrieval` (its `inference` command),
`open_clip` (a script with torch's DataLoader) and `ray_data` (Ray Data's own recipe for batch inference); see peer_scripts.

All get the same pictures (500 x 375) and one file of random weights of ViT-B/32. That they do the same work is told by vectors:
`cosine` is the least between ours in fp32 and the peer's (`cosine_bf16`: ours in bf16), `own` the share of pictures whose
nearest of ours is their own, as random weights leave any two pictures much alike.

Whole commands: starts count, and so does clip-retrieval's warming up, two batches of pictures and of texts; that is why it gets
batches of 64 as the others do, not its 256, and a process a core to decode. The more pictures, the less of both is seen.

clip-retrieval has an environment of its own, made once by `venv` and pip under a folder that is kept, with the torch version
that ours has; the scripts need nothing but what rar itself pins, so that an environment of theirs would be the one of this
process, and run in that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image

from rar.bench import embed
from rar.bench.timing import compared, seconds_of, spread
from rar.hardware import multiplies
from rar.schema import Unavailable, UserError

SIZE = (500, 375)
BATCH = 64
ARCHITECTURE = "ViT-B-32"
WEIGHTS = "open_clip_pytorch_model.bin"  # the name under which open_clip looks for it in a folder
SCRIPTS = Path(__file__).parent / "peer_scripts"
PRECISIONS = ("fp32", "bf16")
CLIP_RETRIEVAL = ("clip-retrieval==2.45.0", "setuptools<80")  # the last with pkg_resources, which its packages import
PLAIN = {"RAY_ENABLE_AUTO_CONNECT": "1"}  # Ray as people have it: rar's own commands turn this off, and so does this bench

Row = dict[str, Any]
Vectors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Peer:
    """packages: pins of its own environment; none: it runs in this one. command: of (python, pictures, weights, out)."""

    packages: tuple[str, ...]
    command: Callable[[Path, Path, Path, Path], list[str]]
    vectors: Callable[[Path], Vectors]


def run(environments: Path, pictures: int = 500, repeats: int = 3, peers: Sequence[str] = (), coco: Path | None = None) -> Row:
    """{peer: {"fp32": and "bf16": of `timing.compared`, pictures/s, "cosine", "cosine_bf16", "own"}}, and `commands`: seconds.

    What cannot be installed or run is under "unavailable", with its reason. coco: a folder of photos to cut from; None:
    drawn ones. Raises Unavailable where no peer is left. Beforehand a round that is not counted fills the files' cache.
    """
    if strange := set(peers) - set(PEERS):
        raise UserError(f"--peer {sorted(strange)[0]}: one of {', '.join(PEERS)}")
    pythons, missing = installed(environments, peers or list(PEERS))
    with tempfile.TemporaryDirectory(prefix="rar_bench_") as temporary:
        folder = Path(temporary)
        write_pictures(folder / "pictures", pictures, coco)
        write_weights(folder / "clip")
        commands = {precision: partial(ours, folder, precision) for precision in PRECISIONS if multiplies(precision)}
        commands |= {name: partial(theirs, folder, name, python) for name, python in pythons.items()}
        found, failed = first_round(commands)
        missing |= failed
        left = {name: command for name, command in commands.items() if name in found}
        if left.keys() <= set(PRECISIONS):
            raise Unavailable("; ".join(f"{name}: {reason}" for name, reason in missing.items()))
        seconds = in_turns(left, repeats)
    result: Row = {"pictures": pictures, "photos": coco is not None, "repeats": repeats, **told(found, seconds, pictures)}
    return result | ({"unavailable": missing} if missing else {})


def told(found: dict[str, Vectors], seconds: dict[str, list[float]], pictures: int) -> Row:
    rates = {name: [pictures / one for one in taken] for name, taken in seconds.items()}
    rows: Row = {}
    ours_in = [precision for precision in PRECISIONS if precision in found]
    for name in found.keys() - set(PRECISIONS):
        rows[name] = {precision: compared(rates[precision], rates[name]) for precision in ours_in}
        rows[name] |= {"cosine": likeness(found["fp32"], found[name])[0], "own": likeness(found["fp32"], found[name])[1]}
        rows[name] |= {"cosine_bf16": likeness(found["bf16"], found[name])[0]} if "bf16" in found else {}
    named = {f"ours {name}" if name in PRECISIONS else name: taken for name, taken in seconds.items()}
    commands = {name: spread(taken) for name, taken in named.items()}
    return {**{name: rows[name] for name in PEERS if name in rows}, "commands": commands}


def likeness(ours: Vectors, theirs: Vectors) -> tuple[float, float]:
    """The least cosine of a picture's two vectors, and the share of theirs whose nearest of ours is of the same picture.

    Raises Unavailable where a picture has no vector.
    """
    if ours.keys() != theirs.keys():
        raise Unavailable(f"{len(theirs.keys() & ours.keys())} vectors of {len(ours)} pictures are there")
    mine, other = (_unit(np.stack([vectors[name] for name in sorted(ours)])) for vectors in (ours, theirs))
    cosines = other @ mine.T
    return float(cosines.diagonal().min()), float(np.mean(cosines.argmax(1) == np.arange(len(mine))))


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# What all are given


def write_pictures(folder: Path, count: int, coco: Path | None) -> None:
    """`count` JPEGs of 500 x 375 with numbers for names. coco: cut at random places from its photos, in turns."""
    folder.mkdir(parents=True)
    if coco is None:
        embed.draw(folder, count)
        return
    photos, random = sorted(coco.rglob("*.jpg")), np.random.default_rng(0)
    for number in range(count):
        with Image.open(photos[number % len(photos)]) as photo:
            share = min(photo.width / SIZE[0], photo.height / SIZE[1]) * random.uniform(0.7, 1)
            width, height = (share * side for side in SIZE)
            left, top = random.uniform(0, photo.width - width), random.uniform(0, photo.height - height)
            cut = photo.convert("RGB").resize(SIZE, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        cut.save(folder / f"{number:04}.jpg", quality=90)


def write_weights(folder: Path) -> None:
    """A local folder of open_clip with random weights; the file in it is what peers are given."""
    folder.mkdir()
    torch.manual_seed(0)
    model = open_clip.create_model(ARCHITECTURE, pretrained_text=False)
    torch.save(model.state_dict(), folder / WEIGHTS)
    known = {"model_cfg": open_clip.get_model_config(ARCHITECTURE), "preprocess_cfg": open_clip.get_model_preprocess_cfg(model)}
    (folder / "open_clip_config.json").write_text(json.dumps(known))


# Environments


def installed(environments: Path, names: Sequence[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """The python of each peer, and why others have none; that is said on stderr, too."""
    pythons, missing = {}, {}
    for name in names:
        try:
            pythons[name] = environment(environments / name, PEERS[name].packages)
        except Unavailable as error:
            missing[name] = _left_out(name, error)
    return pythons, missing


def environment(folder: Path, packages: Sequence[str]) -> Path:
    """The python of a virtual environment with these pins and our torch; made where it is not there or has other pins.

    No packages: this process's own. Raises Unavailable where it cannot be made.
    """
    if not packages:
        return Path(sys.executable)
    same = [f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "torchvision")]
    pins = "".join(f"{pin}\n" for pin in (*packages, *same))
    kept, python = folder / "requirements.txt", folder / "bin" / "python"
    if kept.is_file() and kept.read_text() == pins and python.exists():
        return python
    wanted = folder / "wanted.txt"
    _done([sys.executable, "-m", "venv", "--clear", str(folder)], folder.with_suffix(".log"))
    wanted.write_text(pins)
    _done([str(python), "-m", "pip", "install", "-r", str(wanted)], folder.with_suffix(".log"))
    wanted.rename(kept)  # last, so that half an environment is made anew
    return python


# Commands


def ours(folder: Path, precision: str, out: Path) -> Vectors:
    settings = {
        "corpus": {"uri": str(folder / "pictures")},
        "encoder": {"model": str(folder / "clip"), "precision": precision, "batch_size": BATCH},
    }
    file = out / "peers.yaml"
    file.write_text(yaml.safe_dump(settings))
    _done([sys.executable, "-m", "jobs.embed", str(file), "--out", str(out / "vectors")], out / "log")
    return _of_parquet(out / "vectors", "uri")


def theirs(folder: Path, name: str, python: Path, out: Path) -> Vectors:
    peer = PEERS[name]
    _done(peer.command(python, folder / "pictures", folder / "clip" / WEIGHTS, out), out / "log", **PLAIN)
    return peer.vectors(out)


def first_round(commands: Mapping[str, Callable[[Path], Vectors]]) -> tuple[dict[str, Vectors], dict[str, str]]:
    """Vectors of each, and why others have none. Raises Unavailable where ours fails."""
    found: dict[str, Vectors] = {}
    failed: dict[str, str] = {}
    for name, command in commands.items():
        try:
            with tempfile.TemporaryDirectory(prefix="rar_bench_") as out:
                vectors = command(Path(out))
            likeness(found.get("fp32", vectors), vectors)
        except Unavailable as error:
            if name in PRECISIONS:
                raise
            failed[name] = _left_out(name, error)
        else:
            found[name] = vectors
            _say(f"{name}: {len(vectors)} vectors, least cosine to ours {likeness(found['fp32'], vectors)[0]:.5f}")
    return found, failed


def in_turns(commands: Mapping[str, Callable[[Path], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, a number a round; every other round goes backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for repeat in range(repeats):
        for name in list(commands)[:: -1 if repeat % 2 else 1]:
            with tempfile.TemporaryDirectory(prefix="rar_bench_") as out:
                seconds[name].append(seconds_of(partial(commands[name], Path(out))))
            _say(f"round {repeat + 1} of {repeats}, {name}: {seconds[name][-1]:.1f} s")
    return seconds


def _left_out(name: str, error: Unavailable) -> str:
    reason = " ".join(str(error).split())
    _say(f"{name} is left out: {reason}")
    return reason


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _done(command: list[str], log: Path, **added: str) -> None:
    """added: to its environment. Raises Unavailable, with the end of what it said, where the command fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as said:
        code = subprocess.run(command, stdout=said, stderr=subprocess.STDOUT, env=os.environ | added).returncode
    if code:
        raise Unavailable(f"{Path(command[0]).name} {' '.join(command[1:4])} ended with {code}: {log.read_text()[-400:]}")


def _script(name: str) -> Callable[[Path, Path, Path, Path], list[str]]:
    def command(python: Path, pictures: Path, weights: Path, out: Path) -> list[str]:
        return [str(python), str(SCRIPTS / name), str(pictures), str(weights), str(out)]

    return command


def _clip_retrieval(python: Path, pictures: Path, weights: Path, out: Path) -> list[str]:
    options = {
        "input_dataset": pictures,
        "output_folder": out,
        "clip_model": f"open_clip:{ARCHITECTURE}/{weights}",  # an absolute path, hence the // of its documentation
        "batch_size": BATCH,
        "num_prepro_workers": os.cpu_count(),
        "enable_text": False,
        "enable_wandb": False,
    }
    program = python.parent / "clip-retrieval"
    return [str(program), "inference", *(f"--{name}={value}" for name, value in options.items())]


# What they leave


def _of_parquet(folder: Path, key: str) -> Vectors:
    table = pq.read_table([str(file) for file in sorted(folder.glob("*.parquet"))], columns=[key, "vector"])
    return _by_name(table[key].to_pylist(), np.stack(table["vector"].to_numpy()))


def _of_clip_retrieval(out: Path) -> Vectors:
    vectors = np.concatenate([np.load(file) for file in sorted((out / "img_emb").glob("*.npy"))])
    tables = [pq.read_table(file) for file in sorted((out / "metadata").glob("*.parquet"))]
    return _by_name([path for table in tables for path in table["image_path"].to_pylist()], vectors)


def _of_loader(out: Path) -> Vectors:
    return _by_name((out / "names.txt").read_text().split("\n"), np.load(out / "vectors.npy"))


def _by_name(paths: Sequence[str], vectors: np.ndarray) -> Vectors:
    """Raises Unavailable for vectors without a name of their own."""
    found = {Path(path).name: vector for path, vector in zip(paths, vectors, strict=False)}
    if not len(found) == len(paths) == len(vectors):
        raise Unavailable(f"{len(vectors)} vectors are there for {len(paths)} pictures")
    return found


PEERS = {
    "clip-retrieval": Peer(CLIP_RETRIEVAL, _clip_retrieval, _of_clip_retrieval),
    "open_clip": Peer((), _script("open_clip_loader.py"), _of_loader),
    "ray_data": Peer((), _script("ray_data_recipe.py"), partial(_of_parquet, key="path")),
}
