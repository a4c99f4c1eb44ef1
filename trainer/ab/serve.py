"""ab serve: the raters' page on this machine's own address, and the answers into the study's folder.

Other machines cannot reach it, and other web pages that are open in the rater's browser can neither read nor answer.
"""

import json
import os
import re
import socketserver
import sqlite3
import sys
import unicodedata
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from minigpt5_core.errors import BadInputError
from minigpt5_core.inside import lies_inside

from .answers import Answer, Answers
from .study import ANSWERS, CHOICES, PICTURES, QUESTIONS, SIDES, Study, load_study

HOST = "127.0.0.1"
LONGEST_NAME, LONGEST_BODY = 80, 4096
HEADERS = {
    "Cache-Control": "no-store",  # another study's pictures have the same names
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
PAGE = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/saving.js": ("saving.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}

Content = tuple[str, bytes]  # its type and its bytes


def serve(folder: Path, port: int) -> None:
    """Serves the study in `folder` until interrupted. Raises BadInputError for a port that cannot be had."""
    with StudyServer(folder, port) as server:
        print(f"The study is at http://{HOST}:{server.server_port} (Ctrl-C ends it).")
        print(f"Answers go to {folder / ANSWERS}.", flush=True)
        server.serve_forever()


class StudyServer(ThreadingHTTPServer):
    """A study with its answers, a thread for each request."""

    daemon_threads = True  # an open request does not hold up the end
    allow_reuse_address = os.name != "nt"  # there it would let two servers share a port
    allow_reuse_port = False

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.study = folder, load_study(folder)
        self.fingerprint = self.study.fingerprint()
        self.pictures = _pictures(self.study, folder)
        self.pairs = {pair.name for pair in self.study.pairs}
        self.answers = Answers(folder)
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            self.answers.close()
            raise BadInputError(
                f"Port {port} cannot be had: {getattr(error, 'strerror', None) or error}. Is another study being "
                "served? End it, or name another port from 1024 to 65535, such as --port 8766."
            ) from error

    def server_bind(self) -> None:
        """Without the look-up of this machine's name, which can take long where there is no network."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    def server_close(self) -> None:
        """Lets go of the port and of the answers."""
        super().server_close()
        self.answers.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page that was closed in the middle of a request is nothing to report."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    def hosts(self) -> list[str]:
        """What a browser on this machine calls us; anything else is another site's name for this address."""
        port = "" if self.server_port == 80 else f":{self.server_port}"
        return [f"{HOST}{port}", f"localhost{port}"]

    def for_rater(self, rater: str) -> dict[str, Any]:
        """All that a rater's page needs: the questions, the pairs in this rater's order, the answers so far."""
        return {
            "study": self.fingerprint,
            "rater": rater,
            "questions": [
                {"id": key, "title": title, "text": text} for key, (title, text) in QUESTIONS.items()
            ],
            "pairs": [pair.shown() for pair in self.study.order_for(rater)],
            "answers": self.answers.of(rater),
        }


class _RefusedError(Exception):
    """A request that gets a status and a reason instead of what it asked for."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: StudyServer
    server_version, sys_version = "ab", ""
    timeout = 30

    def do_GET(self) -> None:
        self._respond(self._get)

    def do_POST(self) -> None:
        self._respond(self._post)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: who answers when is not written down."""

    def _respond(self, find: Callable[[], Content]) -> None:
        try:
            self._check_host()
            status, (kind, content) = 200, find()
        except _RefusedError as error:
            status, (kind, content) = error.status, _text(str(error))
        except sqlite3.Error as error:
            status, (kind, content) = 503, _text(f"Not saved: {error}.")
        except OSError as error:
            status, (kind, content) = 500, _text(f"A file of the study cannot be read: {error.strerror}.")
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _check_host(self) -> None:
        """Stops DNS rebinding: a site whose name is made to lead here still sends its own name."""
        found = self.headers.get_all("Host", [])
        if len(found) != 1 or found[0].lower() not in self.server.hosts():
            hosts = " or ".join(self.server.hosts())
            raise _RefusedError(403, f"This page answers only to http://{hosts}; forward that very port.")

    def _get(self) -> Content:
        place = urlsplit(self.path)
        if place.path in PAGE:
            name, kind = PAGE[place.path]
            return kind, (Path(__file__).parent / name).read_bytes()
        if place.path == "/study":
            rater = _rater(parse_qs(place.query).get("rater", [""])[0])
            return _json(self.server.for_rater(rater))
        name = place.path.removeprefix("/")
        if name in self.server.pictures:
            return "image/png", (self.server.folder / name).read_bytes()
        raise _RefusedError(404, "There is nothing at this address.")

    def _post(self) -> Content:
        """Keeps one answer; the reply goes out only after it is on the disk."""
        if self.headers.get("Origin") not in [f"http://{host}" for host in self.server.hosts()]:
            raise _RefusedError(403, "Answers are taken from the study's own page only.")
        if urlsplit(self.path).path != "/answer":
            raise _RefusedError(404, "There is nothing at this address.")
        self.server.answers.save(self._answer())
        return _json({"saved": True})

    def _answer(self) -> Answer:
        values = self._body()
        if values.get("study") != self.server.fingerprint:
            raise _RefusedError(409, "Another study is at this address now. Reload the page.")
        rater, pair, question, answer = (values.get(key) for key in ("rater", "pair", "question", "answer"))
        if not (pair in self.server.pairs and question in QUESTIONS and answer in CHOICES):
            raise _RefusedError(400, "Expected a pair and a question of this study, and left, tie or right.")
        return Answer(_rater(rater), str(pair), str(question), str(answer))

    def _body(self) -> dict[str, Any]:
        if self.headers.get_content_type() != "application/json":
            raise _RefusedError(415, "Expected application/json.")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and len(length) < 10 and int(length) <= LONGEST_BODY):
            raise _RefusedError(413, f"Expected a Content-Length of at most {LONGEST_BODY}.")
        try:
            values = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise _RefusedError(400, "Expected JSON.") from error
        if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
            raise _RefusedError(400, "Expected an object of texts.")
        return values


def _rater(name: Any) -> str:
    """A rater's name as it is kept: however it was typed, the same letters are the same rater."""
    name = " ".join(unicodedata.normalize("NFC", str(name or "")).split())
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise _RefusedError(400, f"Expected a name of 1 to {LONGEST_NAME} letters.")
    return name


def _pictures(study: Study, folder: Path) -> set[str]:
    """The paths that may be asked for. Nothing outside the folder, whatever a study from elsewhere says."""
    sides = [getattr(pair, side) for pair in study.pairs for side in SIDES]
    named = {item["picture"] for items in sides for item in items if "picture" in item}
    inside = {name for name in named if re.fullmatch(rf"{PICTURES}/\w+\.png", name)}
    return {name for name in inside if lies_inside(folder / name, folder)}


def _json(value: Any) -> Content:
    return "application/json", json.dumps(value).encode()


def _text(text: str) -> Content:
    return "text/plain; charset=utf-8", text.encode()
