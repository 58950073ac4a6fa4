"""The page in headless Chromium, over the real app with a small backend: choose, drop, type, press, read.

Looks are not tested; `RAR_SCREENSHOTS=folder` keeps pictures of it at two widths, light and dark, for a person to see.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from PIL import Image

from rar.miniature.world import render, rng_of, vocabulary
from tests.browser import browser, needs_chromium, wait_until
from tests.gateway.test_api import NAMES, TOKEN, app_of

__all__ = ["browser"]  # a fixture

pytestmark = [needs_chromium, pytest.mark.long]


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """The app with a token on a real HTTP server."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app_of(TOKEN), port=port, log_level="warning"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join()


@pytest.fixture
def page(browser: Any, site: str) -> Iterator[Any]:
    """The opened page; anything the browser complains about, a blocked script or a failed request, fails the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on(
        "request", lambda request: None if request.url.startswith((site, "blob:", "data:")) else complaints.append(request.url)
    )
    page.goto(site)
    wait_until(page, "document.getElementById('about').textContent.includes('Ranker')")
    yield page
    context.close()
    assert [text for text in complaints if "401" not in text and "422" not in text] == []


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "photo.png"
    Image.fromarray(render(vocabulary("novel", 0)[0], 192, rng_of("page"))).save(path)
    return path


def ask(page: Any, photo: Path, names: list[str], token: str = TOKEN) -> None:
    page.set_input_files("#file", photo)
    page.fill("#candidates", "\n".join(names))
    page.fill("#token", token)
    page.click("#go")


def rows(page: Any) -> list[list[str]]:
    page.wait_for_selector("#rows tr")
    return [[cell.inner_text() for cell in row.query_selector_all("td")][:4] for row in page.query_selector_all("#rows tr")]


def test_ranking_by_mouse(page: Any, photo: Path) -> None:
    assert page.is_disabled("#go")
    ask(page, photo, NAMES)
    assert rows(page) == [
        ["1", "green cross", "2.000", "66.5 %"],
        ["2", "blue star", "1.000", "24.5 %"],
        ["3", "red ring", "0.000", "9.0 %"],
    ]
    assert page.inner_text("#best") == "green cross" and "ranked; 1 call(s), 10 + 1 tokens" in page.inner_text("#facts")


def test_recognizing_by_keyboard_alone(page: Any, photo: Path) -> None:
    page.set_input_files("#file", photo)  # what the operating system's dialog does after Enter on the field
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    for name in ("candidates", "token"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == name
    page.keyboard.type(TOKEN)
    assert page.inner_text("#go") == "Recognize"
    page.keyboard.press("Enter")
    assert rows(page) == [["1", "blue star", "0.800", "75.0 %"], ["2", "red ring", "0.900", "25.0 %"]]


def test_a_dropped_picture_is_shown(page: Any, photo: Path) -> None:
    page.evaluate(
        """async bytes => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "photo.png", {type: "image/png"}));
            document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true}));
        }""",
        list(photo.read_bytes()),
    )
    wait_until(page, "document.getElementById('shown').naturalWidth === 192")
    assert page.is_enabled("#go")


def test_several_pictures_are_asked_at_once_and_looked_through(page: Any, photo: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(photo.read_bytes()[:200])
    other = tmp_path / "other.png"
    Image.new("RGB", (40, 30), "blue").save(other)
    page.set_input_files("#file", [photo, broken, other])
    page.fill("#token", TOKEN)
    page.click("#go")
    page.wait_for_selector("#answers button >> nth=1")
    assert page.locator("#answers button").all_inner_texts() == ["blue star"] * 2
    assert page.inner_text("#error").startswith("broken.png: image: ") and page.is_visible("#result")
    page.locator("#answers button").nth(1).press("Enter")
    wait_until(page, "document.getElementById('shown').naturalWidth === 40")
    pressed = "all => all.map(button => button.getAttribute('aria-pressed'))"
    assert page.eval_on_selector_all("#pictures button", pressed) == ["false", "false", "true"]
    assert page.eval_on_selector_all("#answers button", pressed) == ["false", "true"]


def test_boxes_are_drawn_or_written_and_named(page: Any, photo: Path) -> None:
    """A wide box is a star to the backend, a high one a ring. The drawing is read as a line, which may be edited."""
    page.set_input_files("#file", photo)
    wait_until(page, "document.getElementById('shown').naturalWidth === 192")
    page.fill("#token", TOKEN)
    area = page.locator("#shown").bounding_box()
    page.mouse.move(area["x"] + area["width"] * 0.75, area["y"] + area["height"] * 0.5)
    page.mouse.down()
    page.mouse.move(area["x"] + area["width"] * 0.25, area["y"] + area["height"] * 0.25, steps=3)
    page.mouse.up()
    drawn = [int(value) for value in page.input_value("#boxes").split(",")]
    assert drawn == pytest.approx([48, 48, 144, 96], abs=1)
    page.fill("#boxes", page.input_value("#boxes") + "\n10 20 30 90\n")
    assert page.locator("#overlay rect").count() == 2 and page.inner_text("#go") == "Name the boxes"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#answers button >> nth=1")
    assert page.locator("#answers button").all_inner_texts() == ["1: blue star", "2: red ring"]
    page.locator("#answers button").nth(1).click()
    assert page.inner_text("#best") == "Box 2: red ring"
    keep(page, "boxes")


def test_pictures_of_the_memory_stand_beside_the_names(page: Any, photo: Path) -> None:
    page.set_input_files("#file", photo)
    page.fill("#token", TOKEN)
    page.click("#go")
    page.wait_for_selector("#rows img >> nth=3")
    decoded = "images => Promise.all(images.map(image => image.decode().then(() => image.naturalWidth)))"
    assert page.eval_on_selector_all("#rows img", decoded) == [8] * 4
    assert page.get_attribute("#rows img", "alt") == "blue star in the memory"


def test_a_pasted_picture_is_shown_and_pasted_text_is_not(page: Any, photo: Path) -> None:
    paste = """bytes => {
        const data = new DataTransfer();
        if (bytes.length) data.items.add(new File([new Uint8Array(bytes)], "pasted.png", {type: "image/png"}));
        else data.setData("text/plain", "red ring");
        document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data}));
    }"""
    page.evaluate(paste, [])
    assert page.is_hidden("#stage")
    page.evaluate(paste, list(photo.read_bytes()))
    wait_until(page, "document.getElementById('shown').naturalWidth === 192")


def keep(page: Any, name: str) -> None:
    """Screenshots for a person to see, where RAR_SCREENSHOTS names a folder."""
    if folder := os.environ.get("RAR_SCREENSHOTS"):
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            for width in (1200, 400):
                page.set_viewport_size({"width": width, "height": 800})
                page.screenshot(path=f"{folder}/{name}-{scheme}-{width}.png", full_page=True)


@pytest.mark.parametrize(("names", "token", "told"), [(NAMES, "wrong", "token"), (["a", "a"], TOKEN, "candidates[1]")])
def test_errors_are_shown(page: Any, photo: Path, names: list[str], token: str, told: str) -> None:
    ask(page, photo, names, token)
    page.wait_for_selector("#error:not([hidden])")
    assert told in page.inner_text("#error") and page.is_hidden("#result") and page.is_enabled("#go")


def test_names_are_shown_as_text(page: Any, photo: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    ask(page, photo, [hostile, "b"])
    assert [row[1] for row in rows(page)] == ["b", hostile] and page.query_selector("#rows img") is None


def test_nothing_is_wider_than_a_phone(page: Any, photo: Path) -> None:
    page.set_viewport_size({"width": 400, "height": 800})
    ask(page, photo, [*NAMES, "a-very-long-name-without-any-place-to-break-it-" * 3])
    rows(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    keep(page, "page")
