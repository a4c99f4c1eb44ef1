"""Look at a story, take it apart, and save it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import folder_paths
from comfy_api.latest import io

from .compat import schema
from .folders import spellings
from .preview import as_picture, previews, show_text, shown, whole_text
from .sockets import STORY, StorySoFar

if TYPE_CHECKING:
    from torch import Tensor


class ViewStory(io.ComfyNode):
    """Text and pictures of a story, in the graph."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MiniGPT5ViewStory",
            display_name="View Story (MiniGPT-5)",
            category="MiniGPT-5",
            description="Shows the story, text and pictures in order.",
            search_aliases=["preview", "show text", "read"],
            is_output_node=True,
            inputs=[STORY.Input("story")],
            outputs=[STORY.Output("same_story", display_name="story")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, story: StorySoFar) -> io.NodeOutput:
        show_text(story, cls.hidden.unique_id)
        return io.NodeOutput(story, ui=shown(story, previews(story)))


class StoryParts(io.ComfyNode):
    """A story's pictures and texts, for other nodes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MiniGPT5StoryParts",
            display_name="Story to Images and Text (MiniGPT-5)",
            category="MiniGPT-5",
            description="The pictures as one batch and the texts, a paragraph a scene and as a list.",
            search_aliases=["split story", "images", "captions"],
            inputs=[STORY.Input("story")],
            outputs=[
                STORY.Output("same_story", display_name="story"),
                io.Image.Output("images", display_name="images"),
                io.String.Output("text", display_name="text"),
                io.String.Output("texts", display_name="texts (list)", is_output_list=True),
            ],
        )

    @classmethod
    def execute(cls, story: StorySoFar) -> io.NodeOutput:
        texts = [page.text for page in story.pages]
        return io.NodeOutput(story, _batch(story), whole_text(story), texts)


class SaveStory(io.ComfyNode):
    """A story as a folder: story.json, PNGs, Markdown, a page that opens anywhere."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MiniGPT5SaveStory",
            display_name="Save Story (MiniGPT-5)",
            category="MiniGPT-5",
            description=(
                "Saves a folder under ComfyUI's output folder: story.json, a PNG a scene with the workflow inside, "
                "story.md, strip.png and story.html, one page that opens anywhere."
            ),
            search_aliases=["export", "html", "markdown"],
            is_output_node=True,
            inputs=[
                STORY.Input("story"),
                io.String.Input(
                    "filename_prefix",
                    default="stories/story",
                    tooltip="The folder's name, under ComfyUI's output folder; a number is added.",
                ),
            ],
            outputs=[STORY.Output("same_story", display_name="story")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, story: StorySoFar, filename_prefix: str) -> io.NodeOutput:
        from ..minigpt5_core.story import Scene, Story
        from ..minigpt5_core.story.pages import write_story

        folder, subfolder = _new_folder(filename_prefix)
        pictures = [as_picture(page.picture) for page in story.pages]
        plain = Story(story.prompt, story.seed, tuple(Scene(page.text) for page in story.pages))
        saved = write_story(folder, plain, pictures, metadata=_metadata(cls))
        files = [
            scene.picture and {"filename": scene.picture, "subfolder": subfolder, "type": "output"}
            for scene in saved.scenes
        ]
        show_text(story, cls.hidden.unique_id)
        return io.NodeOutput(story, ui=shown(story, files))


def _batch(story: StorySoFar) -> Tensor:
    """All pictures as one batch (N, H, W, 3), later ones scaled to the first one's size; black if there is none."""
    import comfy.model_management as management
    import comfy.utils
    import torch

    place = (
        management.intermediate_device()
    )  # where ComfyUI's own nodes expect them: on the GPU with --gpu-only
    pictures = [page.picture for page in story.pages if page.picture is not None]
    if not pictures:
        return torch.zeros(1, 64, 64, 3, device=place)
    height, width, _ = pictures[0].shape
    scaled = [
        picture[None]
        if picture.shape == pictures[0].shape
        else comfy.utils.common_upscale(
            picture[None].movedim(-1, 1), width, height, "bilinear", "center"
        ).movedim(1, -1)
        for picture in pictures
    ]
    return torch.cat(scaled).to(place)


def _new_folder(prefix: str) -> tuple[Path, str]:
    """A folder that does not exist yet, and its path in the output folder; ComfyUI refuses paths that leave it."""
    root = folder_paths.get_output_directory()
    try:
        parent, name, counter, subfolder, _ = folder_paths.get_save_image_path(spellings(prefix)[1], root)
    except Exception as error:  # ComfyUI raises the bare class
        raise ValueError(
            f"filename_prefix is {prefix!r}: {error} Give a name under the output folder."
        ) from error
    if not name.strip("."):
        raise ValueError(
            f"filename_prefix is {prefix!r}: give the story's folder a name, such as stories/story."
        )
    folder = f"{name}_{counter:05}_"
    return Path(parent) / folder, (Path(subfolder) / folder).as_posix()


def _metadata(node: type[io.ComfyNode]) -> Any:
    """The workflow, as SaveImage writes it into its PNGs."""
    import json

    from comfy.cli_args import args
    from PIL.PngImagePlugin import PngInfo

    if args.disable_metadata:
        return None
    info = PngInfo()
    if node.hidden.prompt:
        info.add_text("prompt", json.dumps(node.hidden.prompt))
    for name, value in (node.hidden.extra_pnginfo or {}).items():
        info.add_text(name, json.dumps(value))
    return info
