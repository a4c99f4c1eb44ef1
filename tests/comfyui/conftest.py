"""A real ComfyUI in a process of its own, driven over HTTP and websocket; skipped where there is none.

COMFYUI_PATH (default ~/comfy/ComfyUI) names the checkout, COMFYUI_PYTHON its Python (default .venv or venv inside).
"""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PACK = Path(__file__).parents[2]
FOLDER = "comfyui-minigpt5"
LLM, LLM_FILES = "SmolLM2-135M-Instruct", "minigpt5"


def comfyui() -> Path:
    return Path(os.environ.get("COMFYUI_PATH", "~/comfy/ComfyUI")).expanduser()


def comfyui_python() -> Path | None:
    named = os.environ.get("COMFYUI_PYTHON")
    inside = [comfyui() / venv / "bin" / "python" for venv in (".venv", "venv")]
    return next((path for path in ([Path(named)] if named else inside) if path.is_file()), None)


def why_not() -> str | None:
    """Why these tests cannot run here, or None."""
    if not (comfyui() / "main.py").is_file():
        return f"no ComfyUI at {comfyui()}: set COMFYUI_PATH to a checkout"
    if comfyui_python() is None:
        return f"no Python environment in {comfyui()}: set COMFYUI_PYTHON to the one that runs ComfyUI"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_not()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.comfyui)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@dataclass
class Result:
    """What a prompt did: its end, outputs by node, and the nodes that ran, by class and in order."""

    status: str
    outputs: dict[str, Any]
    ran: list[str]
    error: str = ""
    seconds: float = 0.0
    progress: list[tuple[str, int, int]] = field(default_factory=list)


class Server:
    """A running ComfyUI with this pack in it."""

    def __init__(self, base: Path, arguments: tuple[str, ...] = ()) -> None:
        self.base, self.arguments = base, arguments
        self.log = base / "server.log"
        self.port = free_port()
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        log = open(self.log, "a", encoding="utf-8")  # noqa: SIM115  # the process keeps it
        command = [
            str(comfyui_python()), "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port),
            "--base-directory", str(self.base), "--database-url", "sqlite:///:memory:",
            "--disable-all-custom-nodes", "--whitelist-custom-nodes", FOLDER, *self.arguments,
        ]  # fmt: skip
        self.process = subprocess.Popen(command, cwd=comfyui(), stdout=log, stderr=log)
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            try:
                self.get("/system_stats")
                return
            except OSError:
                if self.process.poll() is not None:
                    break
                time.sleep(0.3)
        raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text(encoding='utf-8')[-3000:]}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=120) as answer:
            return json.load(answer)

    def post(self, path: str, value: Any) -> Any:
        request = urllib.request.Request(
            f"http://{self.address}{path}", json.dumps(value).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                content = answer.read()
        except urllib.error.HTTPError as error:
            content = error.read()
        return json.loads(content) if content else {}

    def run(self, prompt: dict[str, Any], timeout: float = 300, on_progress: Any = None) -> Result:
        """Queues a prompt and waits for its end; `on_progress(node, value, total)` hears every tick."""
        import websocket

        client = uuid.uuid4().hex
        ear = websocket.create_connection(f"ws://{self.address}/ws?clientId={client}", timeout=timeout)
        began = time.monotonic()
        try:
            answer = self.post("/prompt", {"prompt": prompt, "client_id": client})
            if "prompt_id" not in answer:
                return Result("refused", {}, [], json.dumps(answer, ensure_ascii=False))
            ran, progress = self._listen(ear, answer["prompt_id"], on_progress)
        finally:
            ear.close()
        seconds = time.monotonic() - began
        history = self._history(answer["prompt_id"])
        messages = dict(history["status"]["messages"])
        error = messages.get("execution_error", {}).get("exception_message", "")
        status = "interrupted" if "execution_interrupted" in messages else history["status"]["status_str"]
        return Result(status, history["outputs"], ran, error, seconds, progress)

    def _listen(self, ear: Any, prompt_id: str, on_progress: Any) -> tuple[list[str], list]:
        ran: list[str] = []
        progress = []
        while True:
            message = ear.recv()
            if isinstance(message, bytes):
                continue
            event = json.loads(message)
            kind, data = event["type"], event.get("data", {})
            if data.get("prompt_id") not in (None, prompt_id):
                continue
            if kind == "executing" and data.get("node") and data.get("prompt_id") == prompt_id:
                ran.append(data["node"])
            elif kind == "progress":
                progress.append((data.get("node"), data["value"], data["max"]))
                if on_progress:
                    on_progress(*progress[-1])
            elif kind in ("execution_success", "execution_error", "execution_interrupted"):
                return ran, progress

    def _history(self, prompt_id: str) -> dict[str, Any]:
        for _ in range(100):
            if history := self.get(f"/history/{prompt_id}"):
                return history[prompt_id]
            time.sleep(0.1)
        raise RuntimeError("the prompt is not in the history")

    def free(self, megabytes: int = 300) -> tuple[float, float]:
        """Has ComfyUI free its memory and waits until its worker has; resident megabytes before and after."""
        before = after = self.resident_megabytes()
        self.post("/free", {"unload_models": True, "free_memory": True})
        deadline = time.monotonic() + 30
        while after > before - megabytes and time.monotonic() < deadline:
            time.sleep(0.5)
            after = self.resident_megabytes()
        return before, after

    def resident_megabytes(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_base(base: Path) -> Path:
    """A base folder for ComfyUI with this pack linked in."""
    (base / "custom_nodes").mkdir(parents=True)
    (base / "custom_nodes" / FOLDER).symlink_to(PACK, target_is_directory=True)
    return base


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from minigpt5_core.llm.files import default_llm

    default_llm()  # unpacked by this environment: ComfyUI's own need not hold the package
    running = Server(make_base(tmp_path_factory.mktemp("comfyui") / "base"))
    yield running
    running.stop()
    kept = os.environ.get("COMFYUI_TEST_OUTPUT")
    if kept:
        shutil.copytree(running.base, kept, dirs_exist_ok=True, symlinks=True)


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Any]:
    """Starts further servers: start_server(*arguments)."""
    running: list[Server] = []

    def start(*arguments: str) -> Server:
        running.append(Server(make_base(tmp_path / f"base{len(running)}"), arguments))
        return running[-1]

    yield start
    for one in running:
        one.stop()


@pytest.fixture
def graph() -> Any:
    """The storybook quickstart as an API prompt, made short: graph(prompt, scenes=2, instructions="", ...).

    Its nodes go by names here: llm, adapter, mapper, diffusion, story, interleaver, view, save.
    """

    def build(prompt: str = "Mia the fox wakes up in a snowy forest.", **changes: Any) -> dict[str, Any]:
        file = Path(__file__).parent / "workflows" / "Storybook quickstart.api.json"
        numbered = json.loads(file.read_text(encoding="utf-8"))
        kinds = [node["class_type"] for node in numbered.values()]
        names = dict(zip(numbered, map(NAMES.__getitem__, kinds), strict=True))
        values = {
            names[number]: {
                "class_type": node["class_type"],
                "inputs": {
                    key: [names[value[0]], value[1]] if isinstance(value, list) else value
                    for key, value in node["inputs"].items()
                },
            }
            for number, node in numbered.items()
        }
        values["story"]["inputs"]["text"] = prompt
        changes = {"scenes": 2, "steps": 4, "max_new_tokens": 24, **changes}
        unknown = set(changes) - set(values["interleaver"]["inputs"])
        assert not unknown, unknown
        values["interleaver"]["inputs"] |= changes
        return values

    return build


NAMES = {
    "MiniGPT5LoadLLM": "llm", "MiniGPT5LoadAdapter": "adapter", "MiniGPT5LoadMapper": "mapper",
    "MiniGPT5LoadDiffusers": "diffusion", "MiniGPT5Story": "story", "MiniGPT5Interleaver": "interleaver",
    "MiniGPT5ViewStory": "view", "MiniGPT5SaveStory": "save",
}  # fmt: skip
