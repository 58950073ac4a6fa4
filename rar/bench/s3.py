"""An S3 server of this process (moto), with a door in front that refuses a share of the requests, as busy stores do."""

from __future__ import annotations

import logging
import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from rar.schema import UserError

BUCKET = "rar"
SLOW_DOWN = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>'


class S3:
    """refused: the share of requests that are answered 503 from now on. environment: how s3fs finds it."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self.app, self.refused, self.told = app, 0.0, 0
        self.environment: dict[str, str] = {}
        self.draw = random.Random(0)

    def __call__(self, request: dict[str, Any], answer: Callable[..., Any]) -> Iterable[bytes]:
        if self.draw.random() < self.refused:
            self.told += 1
            request["wsgi.input"].read(int(request.get("CONTENT_LENGTH") or 0))  # else the connection breaks
            answer("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(SLOW_DOWN)))])
            return [] if request["REQUEST_METHOD"] == "HEAD" else [SLOW_DOWN]
        return self.app(request, answer)

    def put(self, folder: Path, name: str) -> None:
        fsspec.filesystem("s3").put(str(folder), f"{BUCKET}/{name}", recursive=True)


@contextmanager
def s3_server() -> Iterator[S3]:
    """With a bucket BUCKET, which this process reaches, too. Raises UserError where moto or s3fs is not installed."""
    try:
        import s3fs  # noqa: F401
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server
    except ImportError:
        raise UserError("this needs an S3 server and its client: `pip install 'moto[server]' s3fs`") from None
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it tells of each request
    door = S3(DomainDispatcherApplication(create_backend_app))
    running = make_server("127.0.0.1", 0, door, threaded=True)
    door.environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{running.server_port}"}
    door.environment |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    before = {name: os.environ.get(name) for name in door.environment}
    os.environ.update(door.environment)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        fsspec.filesystem("s3").mkdir(BUCKET)
        yield door
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        running.shutdown()
