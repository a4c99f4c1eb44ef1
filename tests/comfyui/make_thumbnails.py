"""Draws `workflows/NAME.jpg`, what the template browser shows: the pictures that the workflow makes here.

    python tests/comfyui/make_thumbnails.py http://127.0.0.1:8188

The server needs an `example.png` in its input folder. A workflow that wants files which do not come with the pack
is shown as its graph.
"""

import io
import json
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

HERE = Path(__file__).parent
WORKFLOWS = HERE.parents[1] / "workflows"
SIZE, GAP, PAPER = (400, 400), 8, "#e9e4d8"  # the template browser shows a square


def ask(url: str, value: Any = None) -> bytes:
    """GET, or POST of JSON."""
    data = None if value is None else json.dumps(value).encode()
    with urllib.request.urlopen(
        urllib.request.Request(url, data, {"Content-Type": "application/json"})
    ) as answer:
        return answer.read()


def outputs(server: str, prompt: dict) -> dict[str, Any]:
    """Runs a prompt to its end."""
    number = json.loads(ask(f"{server}/prompt", {"prompt": prompt}))["prompt_id"]
    while not (history := json.loads(ask(f"{server}/history/{number}"))):
        time.sleep(0.5)
    return history[number]["outputs"]


def pictures(server: str, prompt: dict) -> list[Image.Image]:
    """What the view node or, where there is none, the plots and preview nodes show."""
    shown = outputs(server, prompt)
    wanted = [node for node in prompt if prompt[node]["class_type"] == "MiniGPT5ViewStory"]
    wanted = wanted or [
        node for node in prompt if prompt[node]["class_type"] in ("LossGraphNode", "PreviewImage")
    ]
    files = [file for node in wanted for file in shown[node]["images"]]
    contents = (ask(f"{server}/view?{urllib.parse.urlencode(file)}") for file in files)
    return [Image.open(io.BytesIO(content)).convert("RGB") for content in contents]


def tiled(images: list[Image.Image]) -> Image.Image:
    """All pictures, as large as they fit beside one another in two rows at most."""
    rows = 1 if len(images) < 3 else 2
    columns = -(-len(images) // rows)
    side = min((SIZE[0] - GAP) // columns, (SIZE[1] - GAP) // rows) - GAP
    canvas = Image.new("RGB", SIZE, PAPER)
    left = (SIZE[0] - columns * (side + GAP) + GAP) // 2
    top = (SIZE[1] - rows * (side + GAP) + GAP) // 2
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        image = image.resize((side, side), Image.Resampling.LANCZOS)
        canvas.paste(image, (left + column * (side + GAP), top + row * (side + GAP)))
    return canvas


def graph(workflow: dict) -> Image.Image:
    """The workflow's boxes and links, without its note."""
    nodes = {node["id"]: node for node in workflow["nodes"] if "Note" not in node["type"]}
    right = max(node["pos"][0] + node["size"][0] for node in nodes.values())
    bottom = max(node["pos"][1] + node["size"][1] for node in nodes.values())
    scale = min((SIZE[0] - 40) / right, (SIZE[1] - 40) / bottom)
    top = (SIZE[1] - scale * bottom) / 2
    canvas = Image.new("RGB", SIZE, PAPER)
    draw = ImageDraw.Draw(canvas)

    def place(x: float, y: float) -> tuple[float, float]:
        return 20 + scale * x, top + scale * y

    for _, source, _, target, _, _ in workflow["links"]:
        (x, y), (width, _) = nodes[source]["pos"], nodes[source]["size"]
        end = nodes[target]["pos"]
        draw.line([place(x + width, y + 40), place(end[0], end[1] + 40)], "#8a6d3b", 2)
    for node in nodes.values():
        (x, y), (width, height) = node["pos"], node["size"]
        draw.rounded_rectangle([*place(x, y), *place(x + width, y + height)], 4, "#3d3a36")
        name = node["type"].removeprefix("MiniGPT5")
        draw.text(place(x + 12, y + 10), name, "#f2efe8", font_size=11)
    return canvas


def main() -> None:
    server = sys.argv[1]
    for path in sorted(WORKFLOWS.glob("*.json")):
        prompt = json.loads((HERE / "workflows" / f"{path.stem}.api.json").read_text(encoding="utf-8"))
        needs_files = any(node["class_type"] == "CheckpointLoaderSimple" for node in prompt.values())
        workflow = json.loads(path.read_text(encoding="utf-8"))
        thumbnail = graph(workflow) if needs_files else tiled(pictures(server, prompt))
        thumbnail.save(path.with_suffix(".jpg"), quality=88)


if __name__ == "__main__":
    main()
