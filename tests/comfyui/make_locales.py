"""Writes locales/en/nodeDefs.json, what the nodes' schemas say, as ComfyUI's frontend looks it up.

python tests/comfyui/make_locales.py http://127.0.0.1:8188
"""

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

ENGLISH = Path(__file__).parents[2] / "locales" / "en" / "nodeDefs.json"


def node_texts(about: dict[str, Any]) -> dict[str, Any]:
    """A node's entry from its /object_info."""
    inputs = {}
    for kind in ("required", "optional"):
        for name, spec in about["input"].get(kind, {}).items():
            options = spec[1] if len(spec) > 1 else {}
            inputs[name] = {"name": options.get("display_name") or name}
            if options.get("tooltip"):
                inputs[name]["tooltip"] = options["tooltip"]
    outputs = {str(index): {"name": name} for index, name in enumerate(about["output_name"])}
    texts = {"display_name": about["display_name"], "description": about["description"]}
    return texts | {"inputs": inputs, "outputs": outputs}


def english(info: dict[str, Any]) -> dict[str, Any]:
    """All our nodes' entries from a server's /object_info."""
    return {name: node_texts(about) for name, about in sorted(info.items()) if name.startswith("MiniGPT5")}


def main() -> None:
    with urllib.request.urlopen(f"{sys.argv[1]}/object_info", timeout=60) as answer:
        texts = english(json.load(answer))
    ENGLISH.parent.mkdir(parents=True, exist_ok=True)
    ENGLISH.write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
