"""What a client sends, in whatever form: JSON, a form, or the picture itself with the rest in the query.

The content type is believed where it names a form; else the bytes tell: what begins with `{` is JSON, anything else a picture.
`curl -d @query.json` says that it sends a form, so a form's type does not make JSON one. Forms are read by Starlette, which
needs python-multipart for them: writing a second multipart parser would be worse than the dependency.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import json
import re
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.formparsers import MultiPartException

FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
ASKED = {
    "image": "the picture's bytes in base64, or the file itself in a form",
    "images": "a list of pictures in base64, or in a form one file a picture",
    "candidates": 'a list of class names, ["cat", "dog"], or in a form one field a name',
    "boxes_xyxy": "a list of boxes, [[x0, y0, x1, y1], ...], or in a form one field x0,y0,x1,y1 a box",
}
WAYS = "send JSON {image: base64, ...}, a form with the file `image`, or the picture's bytes with the rest in the query"
LISTS = ("candidates", "boxes_xyxy", "images")
MAX_FILES = 1000  # of a form; how many pictures a server takes is told when they are counted
Query = TypeVar("Query", bound=BaseModel)


async def read(request: Request, model: type[Query]) -> Query:
    """The request as a `model`. Raises HTTPException or RequestValidationError, each one line that says what to send."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    data = b"" if kind == FORMS[0] else await request.body()
    if kind == FORMS[0] or (kind == FORMS[1] and not data.lstrip().startswith(b"{")):
        values = await _form(request, MAX_FILES if "images" in model.model_fields else 1)
    elif kind.endswith("json") or data.removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"{", b"["):
        values = _json(data)
    elif not data.strip():
        raise HTTPException(400, f"the body is empty; {WAYS}")
    else:
        picture = {"images": [data]} if "images" in model.model_fields else {"image": data}
        values = {**_fields(request.query_params.multi_items()), **picture}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]
        raise RequestValidationError(faults) from None


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise HTTPException(400, f"the body is not valid JSON; {WAYS}") from None


async def _form(request: Request, max_files: int) -> dict[str, Any]:
    try:
        form = await request.form(max_files=max_files, max_fields=1000)
    except (MultiPartException, StarletteHTTPException, ValueError, KeyError) as error:
        if getattr(error, "status_code", 400) != 400:  # too large
            raise
        reason = getattr(error, "detail", None) or getattr(error, "message", None) or type(error).__name__
        raise HTTPException(400, f"the form cannot be read ({reason}); {WAYS}") from None
    items = [(key, await value.read() if isinstance(value, UploadFile) else value) for key, value in form.multi_items()]
    return _fields(items)


def _fields(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Fields of a form or a query: `candidates` once a name, `boxes_xyxy` once a box, `images` once a picture, or any once as a
    JSON list."""
    values: dict[str, Any] = {}
    for key, value in items:
        if key not in LISTS:
            values[key] = value
        elif isinstance(value, str) and value.lstrip().startswith("["):
            values.setdefault(key, []).extend(_json(value.encode(errors="replace")))
        elif key == "boxes_xyxy" and isinstance(value, str):
            values.setdefault(key, []).append(value.split(","))
        else:
            values.setdefault(key, []).append(value)
    return values


def picture_bytes(value: Any) -> Any:
    """Base64 as people write it (data: URI, URL-safe letters, line ends, no padding) decoded. Raises ValueError."""
    if not isinstance(value, str):
        return value
    with suppress(ValueError):  # as most send it: large strings are not looked through twice
        return base64.b64decode(value, validate=True)
    text, quoted = value.strip(), False
    if text[:5].lower() == "data:":
        head, comma, text = text[5:].partition(",")
        if not comma:
            raise ValueError("a data: URI needs a comma before its data: data:image/png;base64,...")
        quoted = not head.lower().endswith(";base64")
    if quoted:
        return unquote_to_bytes(text)
    text = re.sub(r"\s+", "", text.replace("%2B", "+").replace("%2F", "/").replace("%3D", "=")).rstrip("=")
    try:
        return base64.b64decode(text.replace("-", "+").replace("_", "/") + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("not base64") from None
