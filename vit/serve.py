"""A page on this machine to drop images on: `vit_predict.py --serve`.

It is bound to 127.0.0.1, so that no other machine reaches it. Pages of other sites in the user's browser do
not either: a request must name this host, also in its Origin. Nothing is written to the disk.
"""

from __future__ import annotations

import io
import json
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from vit.classify import Classifier, Found, one_line
from vit.data.image_files import NOT_DECODED, register_plugins
from vit.pages import render

ADDRESS = "127.0.0.1"
HOSTS = {"127.0.0.1", "localhost"}  # with any port: it may be forwarded, as by ssh -L
MOST_BYTES = 32 * 2**20  # of an image file
MOST_PIXELS = 100_000_000  # of an image: 300 MB as RGB
TOP = 5  # classes shown
SECONDS = 30  # until a client that sends nothing is dropped


class Refused(Exception):
    """A request that is not answered, and its HTTP status."""

    def __init__(self, status: int, problem: str):
        super().__init__(problem)
        self.status = status


class Server(ThreadingHTTPServer):
    """Answers `GET /` with the page, and `POST /classify` of an image file with its classes.

    Args:
        port: 0: a free one, see ``server_port``.

    Raises:
        OSError: the port is taken.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, classifier: Classifier, name: str, port: int):
        self.classifier, self.lock = classifier, threading.Lock()
        self.nonce = secrets.token_urlsafe()
        self.page = render(
            "serve.html",
            title=name,
            classes=len(classifier.labels),
            temperature=classifier.temperature,
            most_bytes=MOST_BYTES,
            nonce=self.nonce,
        )
        super().__init__((ADDRESS, port), Handler)

    def handle_error(self, request, client_address) -> None:
        """Of a connection that broke: there is nobody to tell it to."""

    def classify(self, encoded: bytes) -> dict:
        """The classes of an image file, or the problem with it."""
        try:
            check_size(encoded)
        except UnidentifiedImageError:  # whose text names an object of Python
            return {"problem": "cannot be read: is no image, or of an unknown format"}
        except Exception as error:  # Pillow raises many types for a damaged file
            return {"problem": f"cannot be read: {one_line(error)}"}
        with self.lock:  # one at a time: torch uses all cores for one
            (result,) = self.classifier.predict([Found(Path("image"), encoded=encoded)], TOP, 1)
        if result.problem:
            return {"problem": result.problem}
        return {"predictions": [{"label": label, "probability": value} for label, value in result.best]}


def check_size(encoded: bytes) -> None:
    """Read the header alone: a file of a few bytes can hold an image that no memory has room for.

    Raises:
        ValueError: it has too many pixels, or a format that needs another program.
    """
    register_plugins()
    with Image.open(io.BytesIO(encoded)) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"has {image.width} x {image.height} pixels, more than {MOST_PIXELS // 10**6} M")
        if image.format in NOT_DECODED:
            raise ValueError(f"is of format {image.format}, which is not read")


class Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = SECONDS
    server_version, sys_version = "vit_predict", ""

    def do_GET(self) -> None:
        self.respond(self.get_page)

    def do_POST(self) -> None:
        self.respond(self.post_image)

    def respond(self, make) -> None:
        """Answer with what ``make`` returns: (content type, text)."""
        try:
            self.check_sender()
            status, (kind, text) = 200, make()
        except Refused as refused:
            status, kind, text = refused.status, "application/json", json.dumps({"problem": str(refused)})
        except OSError:  # the client is gone
            raise
        except Exception as error:
            problem = f"cannot be classified: {one_line(error)}"
            status, kind, text = 500, "application/json", json.dumps({"problem": problem})
        body = text.encode()
        self.send_response(status)
        for name, value in (
            ("Content-Type", f"{kind}; charset=utf-8"),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("Content-Security-Policy", self.policy()),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def policy(self) -> str:
        """What the page may load: its own script, and images that the user gave it."""
        script, style = f"script-src 'nonce-{self.server.nonce}'", "style-src 'unsafe-inline'"
        return f"default-src 'none'; {script}; {style}; img-src blob:; connect-src 'self'"

    def check_sender(self) -> None:
        """Refuse pages of other sites, also those whose name was made to point to this machine."""
        for name in ("Host", "Origin"):
            value = self.headers.get(name)
            if value is None and name == "Origin":  # not sent with a GET, nor by other programs than browsers
                continue
            host = (value or "").removeprefix("http://").partition(":")[0]
            if host not in HOSTS:
                raise Refused(403, f"{name} {value!r}: this page is for {ADDRESS} only")

    def get_page(self) -> tuple[str, str]:
        if self.path != "/":
            raise Refused(404, "no such page")
        return "text/html", self.server.page

    def post_image(self) -> tuple[str, str]:
        if self.path != "/classify":
            raise Refused(404, "no such page")
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            raise Refused(411, "the request does not say how long it is") from None
        if not 0 < length <= MOST_BYTES:
            raise Refused(413, f"the file has {length} bytes, allowed are 1 to {MOST_BYTES}")
        encoded = self.rfile.read(length)
        if len(encoded) < length:
            raise Refused(400, "the request ended early")
        return "application/json", json.dumps(self.server.classify(encoded))

    def log_message(self, format: str, *args) -> None:
        """Nothing: the page shows what happened."""


def serve(server: Server) -> None:
    """Until Ctrl-C."""
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
