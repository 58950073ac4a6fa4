"""Fuzzes what reads other people's bytes: `uv run --with atheris python tests/fuzz.py TARGET --seconds 600`.

A target is a function of bytes that returns, or raises one of the errors that its subject promises; all else is a fault. A
fault is printed with its traceback, once a place, its input is kept in `--faults`, and the run goes on; libFuzzer counts the
runs at the end. An input that takes longer than SLOW seconds is a fault, too. Atheris is no dependency: it has wheels for few
Pythons.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
with atheris.instrument_imports(include=["rar.corpus", "rar.evaluation.ap", "rar.ranker", "rar.gateway.body", "PIL"]):
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from fastapi import HTTPException, Request
    from fastapi.exceptions import RequestValidationError
    from PIL import Image

    from rar.config import Corpus, Detect
    from rar.corpus import coco, frame, listing, truth
    from rar.corpus.decode import FORMATS, decode
    from rar.evaluation import ap
    from rar.gateway import api, body
    from rar.ranker.reply import parse
    from rar.schema import RowError, UserError

CASES = Path(__file__).resolve().parents[2] / "shared" / "cases"
SLOW = 5.0  # seconds
NAMES = (
    ["cat", "dog", "bird"],
    ["drake, male duck", "C", "C++", "737-200", "737-300", "ring_(jewelry)"],
    ["猫", "犬", "개", "แมว", "★", "no helmet", "helmet"],
    [str(number) for number in range(10)],
)
BODIES = (
    b"image/png",
    b"application/json",
    b"multipart/form-data; boundary=x",
    b"application/x-www-form-urlencoded",
    b"",
    b"multipart/form-data",
)
Folder = Path


def target_decode(data: bytes, folder: Folder) -> None:
    try:
        image = decode(data, 64 if len(data) % 2 else None)
        assert image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8 and image.size
        frame.frame_of((7, 9), (image.shape[1], image.shape[0]), data)
    except RowError:
        pass


def target_coco(data: bytes, folder: Folder) -> None:
    """Reader, boxes of `detect`, and evaluation on one file; annotations are all accounted for."""
    file = folder / "truth.json"
    file.write_bytes(data)
    corpus = Corpus(uri=str(file), format="coco")
    try:
        known = truth.read(str(file))
        annotations = json.loads(data).get("annotations") or []
        assert len(known.boxes.id) + sum(fault.annotations for fault in known.faults) == len(annotations)
        listing.list_images(corpus)
        coco.read_boxes(corpus, Detect())
    except UserError:
        pass
    for style in ("coco", "lvis", "v3det"):
        with contextlib.suppress(UserError):
            ap.evaluate([], str(file), style)  # type: ignore[arg-type]
    try:
        coco.read_boxes(Corpus(uri=str(folder / "good.json"), format="coco"), Detect(proposals=str(file)))
        listing.class_names(str(file))
    except UserError:
        pass


def target_table(data: bytes, folder: Folder) -> None:
    for suffix in (".parquet",) if data.startswith(b"PAR1") else (".csv", ".tsv"):
        file = folder / f"table{suffix}"
        file.write_bytes(data)
        try:
            table = listing.list_images(Corpus(uri=str(file)))
            assert table.num_rows
        except UserError as error:
            assert "\n" not in str(error)


def target_tar(data: bytes, folder: Folder) -> None:
    file = folder / "shard.tar"
    file.write_bytes(data)
    try:
        table = listing.list_images(Corpus(uri=str(file)))
    except UserError as error:
        assert "\n" not in str(error)
        return
    columns = [table[name].to_pylist() for name in ("uri", "offset", "size")]
    for found, size in zip(listing.read_many(*columns), columns[2], strict=True):
        assert isinstance(found, RowError) or len(found) == size


def target_reply(data: bytes, folder: Folder) -> None:
    names = NAMES[data[0] % len(NAMES)] if data else NAMES[0]
    order, _ = parse(data[1:].decode(errors="replace"), names)
    assert sorted(order) == list(range(len(names)))


def target_body(data: bytes, folder: Folder) -> None:
    """A request of any type, split in two; the first byte chooses the type."""
    kind, data = BODIES[data[0] % len(BODIES)] if data else b"", data[1:]
    parts = [data[: len(data) // 2], data[len(data) // 2 :]]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    headers = [(b"content-type", kind)] if kind else []
    scope = {"type": "http", "method": "POST", "path": "/rank", "query_string": data[:40], "headers": headers}
    try:
        asyncio.run(body.read(Request(scope, receive), api.RankRequest))
    except HTTPException as refused:
        assert 400 <= refused.status_code < 500 and refused.detail and "\n" not in refused.detail
    except RequestValidationError:
        pass


TARGETS: dict[str, Callable[[bytes, Folder], None]] = {
    name.removeprefix("target_"): one for name, one in sorted(globals().items()) if name.startswith("target_")
}


# Sound inputs to begin with: drawn ones, and the handed-out cases


def seeds_decode() -> list[bytes]:
    image, exif = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)), Image.Exif()
    exif[0x0112] = 6
    modes = [image.convert(mode) for mode in ("RGB", "L", "P", "RGBA", "1", "LA")]
    return [blob for kind in FORMATS for one in modes if (blob := saved(one, kind, exif))]


def seeds_coco() -> list[bytes]:
    return [GOOD, b'[{"image_id":1,"category_id":1,"bbox":[0,0,4,4],"score":.5}]', *of_cases("*.json")]


def seeds_table() -> list[bytes]:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"uri": ["a.jpg", None], "label": ["cat", "dog"]}), buffer)
    text = 'uri,label,note\r\n"a,b.jpg",cat,"x\r\ny"\r\n'
    encoded = [text.encode(one) for one in ("utf-8", "utf-8-sig", "utf-16")]
    return [buffer.getvalue(), *encoded, b"sep=;\nuri;label\na;b\n", *of_cases("*.csv"), *of_cases("*.parquet")]


def seeds_tar() -> list[bytes]:
    return [tarball(style) for style in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)] + of_cases("*.tar")


def seeds_reply() -> list[bytes]:
    said = ["cat > dog", '{"ranking": ["dog", "cat"]}', "<think>no</think>\\boxed{cat}", "| 1 | dog |\n| 2 | cat |", "B. 猫"]
    told = json.loads((CASES / "replies.json").read_text()) if CASES.exists() else []
    return [bytes([number % 4]) + one.encode() for number, one in enumerate(said + [one["reply"] for one in told])]


def seeds_body() -> list[bytes]:
    form = b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    whole = form % (b"image", b'; filename="a"', b"GIF89a") + form % (b"candidates", b"", b'["a", "b"]') + b"--x--\r\n"
    json_body = b'{"image": "R0lG", "candidates": ["a"]}'
    return [b"\2" + whole, b"\1" + json_body, b"\3image=R0lG&candidates=a", b"\0candidates=a&x=GIF89a"]


GOOD = (
    b'{"images":[{"id":1,"file_name":"a.jpg","width":8,"height":8,"neg_category_ids":[1],"not_exhaustive_category_ids":[]}],'
    b'"categories":[{"id":1,"name":"cat","frequency":"r"}],'
    b'"annotations":[{"id":1,"image_id":1,"category_id":1,"bbox":[0,0,4,4],"area":16,"iscrowd":0,"ignore":0}]}'
)


def of_cases(pattern: str) -> list[bytes]:
    return [file.read_bytes() for file in sorted(CASES.rglob(pattern)) if file.name != "replies.json"]


def saved(image: Image.Image, kind: str, exif: Image.Exif) -> bytes:
    buffer = io.BytesIO()
    try:
        image.save(buffer, kind, exif=exif) if kind in ("JPEG", "PNG", "WEBP", "TIFF") else image.save(buffer, kind)
    except (OSError, KeyError, ValueError):  # a mode that the format lacks
        return b""
    return buffer.getvalue()


def tarball(style: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=style) as tar:
        for name, data in (
            ("a.jpg", b"\xff\xd8\xff\xd9"),
            ("a.cls", b"cat"),
            ("b" * 90 + "/" + "c" * 60, b"GIF89a"),
            ("c.json", b'{"label": 1}'),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


class Watched:
    """A target whose faults are kept and told instead of ending the run."""

    def __init__(self, name: str, folder: Folder, faults: Folder) -> None:
        self.name, self.folder, self.faults = name, folder, faults
        self.known: set[str] = set()

    def __call__(self, data: bytes) -> None:
        began = time.process_time()
        try:
            TARGETS[self.name](data, self.folder)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = [one for one in frames if "/rar/" in one.filename] or frames
            self.tell(f"{type(error).__name__} at {own[-1].filename}:{own[-1].lineno}", data, traceback.format_exc())
        if (took := time.process_time() - began) > SLOW:
            self.tell("slow", data, f"{took:.1f} s for {len(data)} bytes")

    def tell(self, place: str, data: bytes, text: str) -> None:
        if place in self.known:
            return
        self.known.add(place)
        self.faults.mkdir(parents=True, exist_ok=True)
        file = self.faults / f"{self.name}-{len(self.known)}"
        file.write_bytes(data)
        print(f"FAULT {len(self.known)} of {self.name}: {place}, input in {file}\n{text}", flush=True)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("target", choices=list(TARGETS))
    asked.add_argument("--seconds", type=int, default=60)
    asked.add_argument("--faults", type=Path, default=Path(tempfile.gettempdir()) / "rar-fuzz")
    settings = asked.parse_args()
    warnings.simplefilter("ignore")  # Pillow has one for every damaged tag
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        folder = Path(name)
        (folder / "good.json").write_bytes(GOOD)
        (folder / "seeds").mkdir()
        sound: list[bytes] = globals()[f"seeds_{settings.target}"]()
        for number, data in enumerate(sound):
            (folder / "seeds" / str(number)).write_bytes(data)
        TARGETS[settings.target](sound[0], folder)  # the first call imports, which is slow
        watched = Watched(settings.target, folder, settings.faults)
        options = [f"-max_total_time={settings.seconds}", "-max_len=8192", "-timeout=60", "-rss_limit_mb=6000"]
        atheris.Setup([sys.argv[0], *options, "-print_final_stats=1", str(folder / "seeds")], watched)
        atheris.Fuzz()  # ends the process


if __name__ == "__main__":
    main()
