"""rar ask PICTURE --url URL: what a running `rar serve` says of pictures."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common import guarded
from rar.schema import UserError

if TYPE_CHECKING:
    from rar.gateway.api import DetectResponse, RankResponse, RecognizeResponse

Pictures = Annotated[list[Path], typer.Argument(help="Image files.", show_default=False)]
Url = Annotated[str, typer.Option("--url", help="Address of a `rar serve`; its token is the environment's RAR_API_TOKEN.")]
Candidate = Annotated[
    list[str] | None, typer.Option("--candidate", help="A name to rank; repeatable. Default: the server's memory proposes.")
]
Adapter = Annotated[str, typer.Option("--adapter", help="A LoRA adapter that the server knows.")]
Boxes = Annotated[
    list[str] | None, typer.Option("--box", help="x0,y0,x1,y1 in pixels: name what it holds; repeatable, for each picture.")
]
AsJson = Annotated[bool, typer.Option("--json", help="The server's whole answer, one JSON line a picture.")]


def ask(
    pictures: Pictures,
    url: Url = "http://127.0.0.1:8000",
    candidate: Candidate = None,
    adapter: Adapter = "",
    box: Boxes = None,
    as_json: AsJson = False,
) -> None:
    """Name what pictures show, by a server that runs.

    Example: rar ask heron.jpg --url http://127.0.0.1:8000
    """
    guarded(lambda: asyncio.run(run(pictures, url, candidate or [], adapter, box or [], as_json)))


async def run(pictures: list[Path], url: str, candidates: list[str], adapter: str, boxes: list[str], as_json: bool) -> int:
    from rar.gateway.client import AsyncClient

    places = [corners(box) for box in boxes]
    if places and candidates:
        raise UserError("the server's memory names boxes: give --box or --candidate, not both")

    async with AsyncClient(url) as client:
        for picture in pictures:
            answer: RankResponse | RecognizeResponse | DetectResponse
            if places:
                answer = await client.detect(picture, places, adapter)
                lines = [
                    f"{one.probability:7.1%}  {one.class_name} in {box}" for one, box in zip(answer.boxes, boxes, strict=True)
                ]
                status = f"{len(boxes)} box(es)"
            elif candidates:
                answer = await client.rank(picture, candidates, adapter)
                lines, status = ranked(answer, candidates), answer.status.value
            else:
                answer = await client.recognize(picture, adapter)
                best, status = [answer.candidates[place] for place in answer.ranking], answer.status.value
                lines = [f"{one.probability:7.1%}  {one.class_name}" for one in best]
            if as_json:
                print(answer.model_dump_json(), flush=True)
            else:
                print("\n".join([f"{picture} ({status})", *(f"  {line}" for line in lines)]), flush=True)
    return 0


def corners(box: str) -> tuple[float, float, float, float]:
    try:
        x0, y0, x1, y1 = map(float, box.split(","))
    except ValueError:
        raise UserError(f"--box {box!r} is not four numbers: x0,y0,x1,y1") from None
    return x0, y0, x1, y1


def ranked(answer: RankResponse, candidates: list[str]) -> list[str]:
    """Best first, with probabilities where the method has some."""
    from math import exp

    if not answer.scores:
        return [candidates[place] for place in answer.ranking]
    return [f"{exp(answer.scores[place]):7.1%}  {candidates[place]}" for place in answer.ranking]


if __name__ == "__main__":
    typer.run(ask)
