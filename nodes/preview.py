"""What the browser is shown of a story: files for its pictures, ComfyUI's own widgets, pages for our story reader."""

from __future__ import annotations

import hashlib
import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

import folder_paths

from .sockets import StorySoFar

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

File = dict[str, str]


def as_picture(picture: Tensor | None) -> Image.Image | None:
    """(H, W, 3) in [0, 1] as a picture."""
    from PIL import Image

    if picture is None:
        return None
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().numpy())


def previews(story: StorySoFar) -> list[File | None]:
    """A file in ComfyUI's temporary folder for every page with a picture."""
    pictures = (as_picture(page.picture) for page in story.pages)
    return [None if picture is None else _preview(picture) for picture in pictures]


def _preview(picture: Image.Image) -> File:
    """Named by what it shows: a story that grows page by page writes every picture once."""
    digest = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()
    folder, name = Path(folder_paths.get_temp_directory()), f"minigpt5_{digest[:24]}.png"
    if not (folder / name).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / name, compress_level=1)
    return {"filename": name, "subfolder": "", "type": "temp"}


def shown(story: StorySoFar, files: list[File | None]) -> dict[str, Any]:
    """Texts and pictures under ComfyUI's names, and the pages for web/story_reader.js."""
    pages = [
        {"text": page.text, "picture": file} | ({"note": page.note} if page.note else {})
        for page, file in zip(story.pages, files, strict=True)
    ]
    return {
        "text": [whole_text(story)],
        "images": [file for file in files if file],
        "minigpt5_pages": pages,
    }


def told_so_far(story: StorySoFar) -> dict[str, Any]:
    """For the story reader alone, while the graph still runs; the node itself shows its newest picture."""
    files = previews(story)
    newest = files[-1:] if files and files[-1] else []
    return shown(story, files) | {"images": newest}


def whole_text(story: StorySoFar) -> str:
    """A paragraph a page."""
    return "\n\n".join(page.text for page in story.pages)


def show_text(story: StorySoFar, node_id: str | None) -> None:
    """The story's text in the node by ComfyUI's own widget, for a browser that does not run our JavaScript."""
    tell_user(whole_text(story), node_id)


def show_notes(story: StorySoFar, node_id: str | None) -> None:
    """What is to be said of the pages, in the node; web/story_reader.js takes it away when the next run begins."""
    notes = [f"Page {number}: {page.note}" for number, page in enumerate(story.pages, 1) if page.note]
    if notes:
        tell_user("\n".join(notes), node_id)


def tell_user(text: str, node_id: str | None) -> None:
    """A text in the node, by ComfyUI's own widget; for a node that another one expanded into, in that one.

    The widget takes HTML and runs what is in it: a story may say `<script>`.
    """
    from server import PromptServer

    if node_id is not None:
        server = PromptServer.instance
        server.send_progress_text(html.escape(text, quote=False), node_id.split(".")[0], server.client_id)
