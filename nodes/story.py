"""Begin a story, read one that was saved, and put pictures into it."""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import folder_paths
from comfy_api.latest import io

from .compat import schema
from .folders import fingerprint, spellings
from .preview import told_so_far
from .sockets import STORY, Page, StorySoFar

if TYPE_CHECKING:
    from torch import Tensor

NEXT = ""  # an empty request: the turn asks for what happens next


class StartStory(io.ComfyNode):
    """The opening of a story, or a page told by the user."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MiniGPT5Story",
            display_name="Story (MiniGPT-5)",
            category="MiniGPT-5",
            description=(
                "Begins a story with an opening to be told. With a picture, or with an earlier story, the text is a "
                "page of its own."
            ),
            search_aliases=["prompt", "comic", "picture book"],
            inputs=[
                io.String.Input(
                    "text",
                    multiline=True,
                    default="Mia the fox wakes up in a snowy forest.",
                    tooltip="How the story begins, or, with a picture or an earlier story, what this page says.",
                ),
                io.Image.Input("image", optional=True, tooltip="A picture of yours for this page."),
                STORY.Input("earlier", optional=True, tooltip="A story that this page is added to."),
            ],
            outputs=[STORY.Output("story", display_name="story")],
        )

    @classmethod
    def execute(
        cls, text: str, image: Tensor | None = None, earlier: StorySoFar | None = None
    ) -> io.NodeOutput:
        if not text.strip() and image is None:
            raise ValueError(
                "The story has no opening: the text is empty. Write how it begins, or what this page says."
            )
        if earlier is None and image is None:
            return io.NodeOutput(StorySoFar(text.strip()))
        story = earlier or StorySoFar(text.strip())
        pictures = [None] if image is None or not len(image) else list(_rgb(image))
        for index, picture in enumerate(pictures):  # a batch of images is a page each, the text on the first
            story = story.with_page(Page(NEXT, text.strip() if index == 0 else "", picture))
        return io.NodeOutput(story)


class AddPicture(io.ComfyNode):
    """A picture for the story's last page."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MiniGPT5AddPicture",
            display_name="Add Picture to Story (MiniGPT-5)",
            category="MiniGPT-5",
            description="Puts a picture onto the story's last page, so that the next turn goes on from it.",
            inputs=[STORY.Input("story"), io.Image.Input("image", tooltip="Of a batch, the first.")],
            outputs=[STORY.Output("illustrated", display_name="story")],
        )

    @classmethod
    def execute(cls, story: StorySoFar, image: Tensor) -> io.NodeOutput:
        if not story.pages:
            raise ValueError(
                "The story has no page yet. Add pictures after a Story Turn, or give them to Story."
            )
        more = f"{len(image)} pictures were drawn; the page has the first." if len(image) > 1 else ""
        first = image[:1].clone() if more else image  # by itself, or the story would hold the whole batch
        illustrated = story.with_picture(_rgb(first)[0], more)
        return io.NodeOutput(illustrated, ui=told_so_far(illustrated))


class LoadStory(io.ComfyNode):
    """A story that Save Story wrote, from the output or the input folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MiniGPT5LoadStory",
            display_name="Load Story (MiniGPT-5)",
            category="MiniGPT-5/loaders",
            description="Reads a saved story (story.json and its pictures), to look at or to go on with.",
            inputs=[
                io.Combo.Input(
                    "story_name",
                    options=saved_stories(),
                    display_name="saved story",
                    tooltip="A folder with a story.json, in ComfyUI's output or input folder.",
                )
            ],
            outputs=[STORY.Output("story", display_name="story")],
        )

    @classmethod
    def validate_inputs(cls, story_name: str | None = None) -> bool | str:
        linked = story_name is None  # a name that comes over a link is not known before the graph runs
        return True if linked or _find_story(story_name) else _no_story(story_name)

    @classmethod
    def fingerprint_inputs(cls, story_name: str | None = None) -> str:
        # without a mark of all stories where the name comes over a link: what the graph saves would run it again
        return fingerprint(_find_story(story_name))

    @classmethod
    def execute(cls, story_name: str) -> io.NodeOutput:
        from ..minigpt5_core.story import load_story
        from ..minigpt5_core.story.pages import read_pictures
        from ..minigpt5_core.vision import picture_tensor

        folder = _find_story(story_name)
        if folder is None:
            raise ValueError(_no_story(story_name))
        saved = load_story(folder)
        pictures = [
            None if picture is None else picture_tensor(picture) for picture in read_pictures(saved, folder)
        ]
        pages = [
            Page(NEXT, scene.text, picture, told=True)
            for scene, picture in zip(saved.scenes, pictures, strict=True)
        ]
        return io.NodeOutput(StorySoFar(saved.prompt, tuple(pages), saved.seed))


def _roots() -> list[Path]:
    return [Path(folder_paths.get_output_directory()), Path(folder_paths.get_input_directory())]


def saved_stories() -> list[str]:
    """Folders with a story.json, the newest first, named from the output or the input folder on.

    They are at most three levels down; of two of one name the one that is read counts.
    """
    found: dict[str, float] = {}
    for root in _roots():
        for pattern in ("*/story.json", "*/*/story.json", "*/*/*/story.json"):
            for path in filter(Path.is_file, root.glob(pattern)):
                name = path.parent.relative_to(root).as_posix()
                if not any(part.startswith(".") for part in name.split("/")):
                    found.setdefault(name, path.stat().st_mtime)
    return sorted(found, key=lambda name: (-found[name], name))


def _find_story(name: object) -> Path | None:
    if not isinstance(name, str):  # over a link anything may come
        return None
    for root, spelling in product(_roots(), spellings(name)):
        folder = Path(os.path.normpath(root / spelling))  # links inside may lead anywhere, a name may not
        if folder.is_relative_to(os.path.normpath(root)) and os.path.isfile(folder / "story.json"):
            return folder
    return None


def _no_story(name: object) -> str:
    searched = " or ".join(str(root) for root in _roots())
    return f"There is no saved story {name!r} in {searched}. Save one with Save Story, or choose another."


def _rgb(image: Tensor) -> Tensor:
    """An IMAGE (B, H, W, 1 to 4) as (B, H, W, 3) in float32, white behind its alpha, where it can be kept and saved."""
    image = image.float().cpu()
    colours = image.shape[-1] - (image.shape[-1] in (2, 4))
    alpha = image[..., colours : colours + 1]  # none for 1 and 3 channels
    image = image[..., :colours]
    if alpha.shape[-1]:
        image = image * alpha + (1 - alpha)
    return image.expand(*image.shape[:-1], 3)
