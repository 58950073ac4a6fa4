"""rar ask PICTURE --url URL: what a running `rar serve` says of pictures."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common import guarded
from rar.schema import UserError

if TYPE_CHECKING:
    from rar.gateway.api import CandidateAnswer, DetectResponse, RankResponse, RecognizeResponse

IN_FLIGHT = 8  # pictures; the server ranks together what waits together
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
        gate = asyncio.Semaphore(IN_FLIGHT)

        async def said(picture: Path) -> str:
            answer: RankResponse | RecognizeResponse | DetectResponse
            async with gate:
                if places:
                    answer = await client.detect(picture, places, adapter)
                    named = zip(answer.boxes, boxes, strict=True)
                    lines, status = [f"{chance(one)} in {box}" for one, box in named], f"{len(boxes)} box(es)"
                elif candidates:
                    answer = await client.rank(picture, candidates, adapter)
                    lines, status = ranked(answer, candidates), answer.status.value
                else:
                    answer = await client.recognize(picture, adapter)
                    best, status = [answer.candidates[place] for place in answer.ranking], answer.status.value
                    lines = [chance(one) for one in best]
            return answer.model_dump_json() if as_json else "\n  ".join([f"{picture} ({status})", *lines])

        asking = [asyncio.create_task(said(picture)) for picture in pictures]
        try:
            for task in asking:
                print(await task, flush=True)
        finally:
            for task in asking:  # one that failed ends the others
                task.cancel()
    return 0


def chance(named: CandidateAnswer | RecognizeResponse) -> str:
    return f"{named.probability:7.1%}  {named.class_name}"


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
