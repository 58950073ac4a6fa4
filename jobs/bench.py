"""rar bench NAME: benchmarks; a table, then one JSON object as the last line of stdout (design 4.4).

Throughputs are ratios of two ways to do the same work, measured in turns in one process; nothing here is asserted.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.common import guarded, quiet, say
from rar.schema import UserError

SHARED = Path("../shared/data")
REPLIES = Path("../shared/cases/replies.json")

Data = Annotated[Path | None, typer.Option("--data", help="Folder of recorded data; default: those under ../shared/data.")]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="Random splits or draws.")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Timed runs of each side; medians are reported.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=8, help="World seed.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder that keeps what was drawn and run; default: a temporary one.")]

bench = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@bench.command()
def adapters(data: Data = None, seeds: Seeds = 5) -> None:
    """Accuracy of every retrieval mode on recorded embeddings, and (without --data) on the miniature world."""

    def work() -> dict[str, Any]:
        from rar.bench import adapters as module

        if data is not None:
            return module.run(_existing(data), seeds)
        found = [module.run(_existing(SHARED / name), seeds)["sets"] for name in ("clip_b16_memories", "grocery")]
        return {"sets": {**found[0], **found[1], **module.miniature(seeds)["sets"]}}

    _run(work)


@bench.command()
def replay(data: Data = None, seeds: Seeds = 5) -> None:
    """Fusion and routing on recorded CLIP candidates and GPT-4V answers, no model needed."""

    def work() -> dict[str, Any]:
        from rar.bench import replay as module

        return module.run(_existing(data or SHARED), seeds)

    _run(work)


@bench.command()
def replies(data: Annotated[Path, typer.Option("--data", help="JSON list of {kind, reply, names, best}.")] = REPLIES) -> None:
    """How many replies of models are read as the name that they state, and how many as another without a doubt."""

    def work() -> dict[str, Any]:
        from rar.bench import replies as module

        return module.run(data)

    _run(work)


@bench.command()
def photos(data: Data = None, out: Out = None, seeds: Seeds = 3) -> None:
    """Real weights on real photos: few-shot groceries by every mode, COCO boxes by what is shown of them."""

    def work() -> dict[str, Any]:
        from rar.bench import photos as module

        return module.run(_existing(data or SHARED), out, seeds)

    _run(work)


@bench.command("vocabulary-free")
def vocabulary_free(
    data: Data = None,
    encoder: Annotated[str | None, typer.Option("--encoder", help="CLIP whose text tower judges sACC.")] = None,
    sentence_encoder: Annotated[
        str | None, typer.Option("--sentence-encoder", help="Or a local folder of a sentence encoder that does.")
    ] = None,
) -> None:
    """Names guessed by a language model instead of a vocabulary: cACC, and sACC by an encoder, with and without ranking."""

    def work() -> dict[str, Any]:
        from rar.bench import vocabulary_free as module

        return module.run(_existing(data or SHARED / "clip_b16_memories"), encoder, sentence_encoder)

    _run(work)


@bench.command()
def ablation(out: Out = None, seed: Seed = 0, scenes: int = 450) -> None:
    """AP of detection with given boxes, with noisy proposals, and of every part of it, on miniature scenes."""

    def work() -> dict[str, Any]:
        from rar.bench import ablation as module

        if out is not None:
            return module.run(out, seed, scenes)
        with tempfile.TemporaryDirectory() as folder:
            return module.run(Path(folder), seed, scenes)

    _run(work)


@bench.command()
def retrieve(
    data: Data = None,
    rows: int = 20_000,
    repeats: Repeats = 5,
    server: bool = False,
    crossover: bool = False,
    kinds: Annotated[list[str] | None, typer.Option("--kind", help="FLAT, HNSW, ... Repeatable. Default: all.")] = None,
) -> None:
    """Recall, queries/s, build rows/s, bytes and memory of every index, against raw pymilvus and raw faiss."""

    def work() -> dict[str, Any]:
        from rar.bench import retrieve as module

        if strange := set(kinds or ()) - set(module.KINDS):
            raise UserError(f"--kind {sorted(strange)[0]}: one of {', '.join(module.KINDS)}")
        recorded = data or (SHARED if SHARED.is_dir() else None)
        found = module.run(rows, repeats=repeats, data=recorded, server=server, kinds=kinds or module.KINDS)
        return {**found, "crossover": module.crossover(repeats=repeats)} if crossover else found

    _run(work)


@bench.command()
def fit(
    classes: Annotated[list[int] | None, typer.Option("--classes", help="Repeatable. Default: 120, 1,203, 13,204.")] = None,
    shots: int = 4,
    repeats: Repeats = 3,
) -> None:
    """Seconds and memory of fitting a head, by mode and number of classes."""

    def work() -> dict[str, Any]:
        from rar.bench import fit as module

        return module.run(sorted(classes or module.CLASSES), shots, repeats=repeats)

    _run(work)


@bench.command()
def scale(
    rows: Annotated[list[int] | None, typer.Option("--rows", help="A size; repeatable. Default: 10,000 to 100,000.")] = None,
    server: bool = False,
    mode: str = "fused",
    pictures: Annotated[bool, typer.Option("--pictures", help="Drawn pictures, embedded, not brought vectors.")] = False,
    model: Annotated[bool, typer.Option("--model", help="Work out what limits a billion pictures on 64 GPUs instead.")] = False,
    assume: Annotated[list[str] | None, typer.Option("--assume", help="Of --model: pictures=1e8, gpus=8, ...")] = None,
) -> None:
    """How seconds and memory of `rar memory` and `rar classify` grow with rows; writes against raw pymilvus."""

    def work() -> dict[str, Any]:
        if model:
            from rar.bench import limits

            return limits.run(assume or ())
        from rar.bench import scale as module

        return module.run(sorted(rows or module.SIZES), server=server, mode=mode, pictures=pictures)

    _run(work)


@bench.command()
def boxes(
    boxes: Annotated[
        list[int] | None, typer.Option("--boxes", help="A size; repeatable. Default: 100,000 to 1,000,000.")
    ] = None,
) -> None:
    """How seconds and memory of a detection run's metrics grow with boxes: a simulated run, 300 proposals a picture."""

    def work() -> dict[str, Any]:
        from rar.bench import boxes as module

        return module.run(sorted(boxes or module.SIZES))

    _run(work)


@bench.command()
def faults(
    only: Annotated[list[str] | None, typer.Option("--only", help="A fault by name; repeatable. Default: all.")] = None,
    runs: Annotated[
        int | None, typer.Option("--runs", min=1, help="Strikes in all, the faults in turns; default: one each.")
    ] = None,
    seed: int = 0,
) -> None:
    """Commands struck at a random moment (a process or node killed, a full disk, a store away), against ones left alone."""

    def work() -> dict[str, Any]:
        from rar.bench import faults as module

        return module.run(only or (), runs, seed)

    _run(work)


@bench.command()
def rank(
    images: int = 960,
    repeats: Repeats = 5,
    random_7b: Annotated[
        bool, typer.Option("--random-7b", help="LLaVA-1.5-7B's architecture with random weights, on a GPU.")
    ] = False,
) -> None:
    """The ranker's images/s: letters through Ray Serve and bare, against the paper's loop and the bare forward pass."""

    def work() -> dict[str, Any]:
        from rar.bench import rank as module

        if random_7b:
            return module.random_weights(images, repeats)
        bare = module.run(images, repeats)
        return {**bare, "rows": {**bare["rows"], **module.through_serve(images, repeats)}}

    _run(work)


@bench.command()
def embed(pictures: int = 1024, repeats: Repeats = 5, model: str = "ViT-B-32/random") -> None:
    """Pictures/s from JPEG files to vectors, against the bare forward pass and a loop; channels last against planes."""

    def work() -> dict[str, Any]:
        from rar.bench import embed as module

        return module.run(pictures, repeats, model)

    _run(work)


@bench.command()
def tuning(
    out: Annotated[Path, typer.Option("--out", help="Folder that keeps worlds and runs; what is there is not run again.")],
    only: Annotated[list[str] | None, typer.Option("--only", help="describer, parts, long or shifted; repeatable.")] = None,
    arm: Annotated[list[str] | None, typer.Option("--arm", help="Of these; repeatable. Default: all.")] = None,
    seed: Annotated[list[int] | None, typer.Option("--seed", min=0, max=8, help="Repeatable. Default: 0, 1, 2.")] = None,
    describer: Annotated[Path | None, typer.Option("--describer", help="Folder of one that is trained already.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Of every training, not each experiment's own.")] = None,
) -> None:
    """What `rar tune` teaches: from a describer and part by part, on long lists, on a shifted world."""

    def work() -> dict[str, Any]:
        from rar.bench import tuning as module

        chosen = only or list(module.ARMS)
        known = [name for one in chosen for name in module.ARMS.get(one, ())]
        for option, given, there in (("--only", chosen, module.ARMS), ("--arm", arm, known)):
            if strange := set(given or ()) - set(there):
                raise UserError(f"{option} {sorted(strange)[0]}: one of {', '.join(there)}")
        out.mkdir(parents=True, exist_ok=True)
        return module.run(out, seed or [0, 1, 2], chosen, arm, describer, steps)

    _run(work)


@bench.command()
def peers(
    environments: Annotated[Path, typer.Option("--environments", help="Folder that keeps what is installed for the peers.")],
    pictures: Annotated[int, typer.Option("--pictures", min=2)] = 500,
    repeats: Repeats = 3,
    names: Annotated[list[str] | None, typer.Option("--peer", help="clip-retrieval, ... Repeatable. Default: all.")] = None,
) -> None:
    """`rar embed`, fp32 and bf16, against clip-retrieval, open_clip with a DataLoader, Ray Data's recipe: whole commands."""

    def work() -> dict[str, Any]:
        from rar.bench import peers as module

        coco = SHARED / "coco" / "images"
        return module.run(environments.resolve(), pictures, repeats, names or (), coco if coco.is_dir() else None)

    _run(work)


@bench.command("end-to-end")
def end_to_end(rows: Annotated[int, typer.Option("--rows", min=50)] = 20_000, repeats: Repeats = 3) -> None:
    """Pictures/s of whole `rar classify` commands past their start, against their slowest stage alone; MLLM seconds."""

    def work() -> dict[str, Any]:
        from rar.bench import end_to_end as module

        return module.run(rows, repeats)

    _run(work)


@bench.command("start-up")
def start_up(repeats: Repeats = 3) -> None:
    """Seconds of commands that have next to nothing to do, from a cold process, and where their driver's time goes."""

    def work() -> dict[str, Any]:
        from rar.bench import start_up as module

        return module.run(repeats)

    _run(work)


@bench.command()
def consistency(images: int = 200, seed: Seed = 0) -> None:
    """How often the order of the candidates decides the answer, by method and debiasing, on miniature photos."""

    def work() -> dict[str, Any]:
        from rar.bench import consistency as module

        return module.run(images, seed)

    _run(work)


@bench.command()
def detect(data: Data = None, repeats: Repeats = 5) -> None:
    """The crop stage's boxes/s against a plain Pillow loop, and the whole pipeline's against the bare encoder."""

    def work() -> dict[str, Any]:
        from rar.bench import detect as module

        coco = data or (SHARED / "coco" if (SHARED / "coco").is_dir() else None)
        return {"crops": module.crops_bench(repeats, coco), "pipeline": module.pipeline_bench(repeats, coco)}

    _run(work)


@bench.command()
def load(seconds: float = 60.0, clients: int = 200) -> None:
    """Many HTTP clients at once: what was answered, refused, lost or wrong; replicas and memory over time."""

    def work() -> dict[str, Any]:
        from rar.bench import load as module

        return module.run(seconds, clients)

    _run(work)


@bench.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def keep(context: typer.Context, name: Annotated[str, typer.Argument(show_default=False)]) -> None:
    """Run a bench with its options and keep its line for the README.

    Example: rar bench keep rank --repeats 3
    """

    def job() -> int:
        from rar.bench import figures

        process = subprocess.Popen([sys.executable, "-m", "jobs.bench", name, *context.args], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        last = ""
        for last in process.stdout:
            print(last, end="", flush=True)
        if process.wait() == 0:
            say(f"kept in {figures.keep(name, shlex.join(['rar', 'bench', name, *context.args]), json.loads(last))}")
        return process.returncode

    guarded(job)


@bench.command()
def readme() -> None:
    """Write the README's table of figures from those that are kept."""

    def job() -> None:
        from rar.bench import figures

        if not figures.README.is_file():
            raise UserError(f"there is no {figures.README}: this rar is no checkout")
        figures.README.write_text(figures.written(figures.README.read_text(), figures.kept()))

    guarded(job)


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the recorded data with --data DIR")
    return folder


def _run(work: Callable[[], dict[str, Any]]) -> None:
    def job() -> int:
        quiet()
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the commands' models; before torch comes
        from rar.bench.figures import measured_on

        where = measured_on()  # before there is any load of ours
        found = work()
        result = found | where | found
        print(table(result))
        print(json.dumps(result))
        return 0

    guarded(job)


def table(result: dict[str, Any]) -> str:
    """Every group of numbers in a nested result as one line: its path, then its numbers by name."""
    rows = list(_rows(result, ()))
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {values}" for name, values in rows)


def _rows(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    items = list(enumerate(value)) if isinstance(value, list) else list(value.items())
    numbers = [(key, one) for key, one in items if not isinstance(one, dict | list)]
    if numbers:
        shown = (f"{key} {one:.4g}" if isinstance(one, float) else f"{key} {one}" for key, one in numbers)
        yield ".".join(path), "  ".join(shown)
    for key, one in items:
        if isinstance(one, dict | list):
            yield from _rows(one, (*path, str(key)))


if __name__ == "__main__":
    bench()
