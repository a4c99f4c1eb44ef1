"""Where a quickstart run spends its time in a running ComfyUI, and what /free gives back.

    python benchmarks/comfyui.py http://127.0.0.1:8188 [--runs 3] [--pid PID_OF_COMFYUI]

Every run has another seed, so nothing but the loaders is kept from run to run; the first run includes loading.
"""

import argparse
import json
import statistics
import time
import urllib.request
import uuid
from collections import defaultdict
from pathlib import Path

import websocket

PROMPT = Path(__file__).parents[1] / "tests" / "comfyui" / "workflows" / "Storybook quickstart.api.json"


def post(url: str, value: dict) -> dict:
    """Sends JSON; the answer, if there is one."""
    request = urllib.request.Request(url, json.dumps(value).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        content = answer.read()
    return json.loads(content) if content else {}


def run(server: str, prompt: dict) -> dict[str, float]:
    """Seconds by node (the server says when each begins), and the whole under "all"."""
    client = uuid.uuid4().hex
    ear = websocket.create_connection(f"ws{server.removeprefix('http')}/ws?clientId={client}")
    began = now = time.monotonic()
    seconds: dict[str, float] = defaultdict(float)
    node = None
    prompt_id = post(f"{server}/prompt", {"prompt": prompt, "client_id": client})["prompt_id"]
    while True:
        message = ear.recv()
        if isinstance(message, bytes):
            continue
        event = json.loads(message)
        if event["type"] == "execution_error":
            raise SystemExit(event["data"]["exception_message"])
        if event["type"] != "executing" or event["data"].get("prompt_id") != prompt_id:
            continue
        now, before = time.monotonic(), now
        seconds[node or "queue"] += now - before
        node = event["data"]["node"]
        if node is None:
            ear.close()
            return seconds | {"all": now - began}


def kind(node: str, prompt: dict) -> str:
    """LLM, sampler, VAE, loading or ours, by the node's id: the Interleaver's children are named for what they do."""
    if node in prompt:
        return "loading" if "Load" in prompt[node]["class_type"] else "ours"
    parts = {"turn": "LLM", "sampler": "sampler", "decode": "VAE"}
    return parts.get(node.rsplit("_", 1)[-1], "ours" if node != "queue" else "queue")


def resident(pid: int) -> int:
    """Resident memory in MB."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("server")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--pid", type=int)
    asked = parser.parse_args()
    prompt = json.loads(PROMPT.read_text(encoding="utf-8"))
    interleaver = next(node for node in prompt.values() if node["class_type"] == "MiniGPT5Interleaver")
    walls, shares = [], []
    for number in range(asked.runs + 1):
        interleaver["inputs"]["seed"] = time.time_ns() % 2**32
        seconds = run(asked.server, prompt)
        whole = seconds.pop("all")
        kinds: dict[str, float] = defaultdict(float)
        for node, spent in seconds.items():
            kinds[kind(node, prompt)] += spent
        parts = ", ".join(f"{name} {spent / whole:.1%}" for name, spent in sorted(kinds.items()))
        print(f"{'with loading' if number == 0 else f'run {number}'}: {whole:.1f} s: {parts}", flush=True)
        if number:
            walls.append(whole)
            shares.append(kinds["ours"] / whole)
    print(f"median of {asked.runs}: {statistics.median(walls):.1f} s, ours {statistics.median(shares):.2%}")
    if asked.pid:
        before = resident(asked.pid)
        post(f"{asked.server}/free", {"unload_models": True, "free_memory": True})
        time.sleep(5)
        print(f"resident: {before} MB before /free, {resident(asked.pid)} MB after")


if __name__ == "__main__":
    main()
