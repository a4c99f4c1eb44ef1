"""Studies, their server and its answers, for the tests."""

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from trainer.ab.serve import StudyServer
from trainer.ab.study import Pair, Study

ROOT = Path(__file__).resolve().parents[2]
SECRETS = ("redsystem", "bluesystem")
EVIL = "<script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"


def write_system(folder: Path, name: str, stories: int = 6, size: int = 24, texts: str = "") -> Path:
    """A system whose name is in its paths, its pictures' metadata and the keys that are not shown."""
    (folder / name).mkdir(parents=True)
    info = PngInfo()
    info.add_text("software", name)
    lines = []
    for story in range(stories):
        items = []
        for scene in range(2):
            color = (40 * story % 256, 90 * scene, 200 if name == SECRETS[0] else 60)
            file = f"{name}/{story}_{scene}.{'png' if name == SECRETS[0] else 'webp'}"
            exif = Image.Exif()
            exif[0x0131] = name
            Image.new("RGB", (size, size), color).save(folder / file, pnginfo=info, exif=exif, lossless=True)
            items.append({"text": f"{texts}Scene {scene} of story {story}.", "speaker": name})
            items.append({"picture": file, "caption": name})
        lines.append(json.dumps({"id": f"story_{story:03}", "items": items, "system": name}))
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def serving(folder: Path) -> Iterator[StudyServer]:
    with StudyServer(folder, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(port: int, method: str, path: str, body: object = None, **headers: str) -> tuple[int, bytes, dict]:
    """A request with the headers that the study's own page would send, but for those in `headers`."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    sent = {"Host": f"127.0.0.1:{port}"}
    if method == "POST":
        sent |= {"Origin": f"http://127.0.0.1:{port}", "Content-Type": "application/json"}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request(method, path, content, {name: value for name, value in sent.items() if value})
    reply = connection.getresponse()
    found = reply.status, reply.read(), dict(reply.headers)
    connection.close()
    return found


def answer_of(server: StudyServer, **changes: str) -> dict[str, str]:
    values = {
        "study": server.fingerprint,
        "rater": "Ann",
        "pair": "0001",
        "question": "image",
        "answer": "tie",
    }
    return values | changes


class RealServer:
    """`ab serve` in a process of its own."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        code = f"from trainer.ab.cli import run; raise SystemExit(run({['serve', str(folder), '--port', str(port)]!r}))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert found, self.process.communicate()[1]
        self.port, self.url = int(found[1]), found[0]

    def end(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        self.process.communicate(timeout=20)
        return self.process.returncode


def make_study(pairs: int) -> Study:
    """Without pictures; system a is left in the pairs with an odd number."""
    return Study(
        {"a": "Red <b>", "b": "Blue"},
        0,
        [Pair(f"{number:04}", f"s{number}", "ba"[number % 2], [{"text": "x"}], [{"text": "y"}])
         for number in range(1, pairs + 1)],
    )  # fmt: skip


def choice_for(pair: Pair, winner: str) -> str:
    return next(choice for choice in ("left", "tie", "right") if pair.winner(choice) == winner)
