"""A data set's stories as an evaluation reads them: the records that are whole, each cut into scenes to be told.

Each scene is told behind the true ones before it, as in the paper: an error does not carry over to later scenes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from minigpt5_core.errors import BadInputError
from minigpt5_core.pipeline import StoryTeller
from minigpt5_core.story.prompts import NEXT, Turn
from minigpt5_core.vision import picture_tensor

from ..common.images import center_crop
from ..data.formats import read
from ..data.records import BrokenPicture, Record, Scene


@dataclass(frozen=True)
class Chapter:
    """What a system is given for one scene, and the scene itself."""

    turns: list[Turn]
    request: str
    scene: Scene


def held_records(path: Path, layout: str, count: int) -> list[Record]:
    """The first `count` records that are whole, with a scene that has a picture, at hand or described; the others are
    counted and said."""
    found: list[Record] = []
    left_out = 0
    for row in read(path, layout):
        if isinstance(row, Record) and _usable(row):
            found.append(row)
        else:
            left_out += 1
        if len(found) == count:
            break
    if left_out:
        print(f"{left_out} rows of {path} are broken or without a picture, and left out")
    if not found:
        raise BadInputError(f"{path}: not one row can be evaluated. python -m trainer data check says why.")
    if not any(record.pictures for record in found):
        print(f"{path} describes its pictures: there are no scores that compare with true pictures")
    return found


def _usable(record: Record) -> bool:
    try:
        for picture in record.pictures:
            picture.open()
    except BrokenPicture:
        return False
    return any(scene.pictured and scene.speaker == "assistant" for scene in record.scenes)


def chapters(teller: StoryTeller, record: Record) -> list[Chapter]:
    """A chapter for each scene that is told: all before it as the LLM would have told it, pictures shown."""
    found: list[Chapter] = []
    turns: list[Turn] = []
    asked = ""
    for scene in record.scenes:
        if scene.speaker == "user":
            asked = scene.text
            continue
        request = asked or NEXT
        found.append(Chapter(list(turns), request, scene))
        shown = teller.llm.see(picture_tensor(scene.picture.open())) if scene.picture else None
        turns.append(Turn(request, scene.text, picture=scene.pictured, image_tokens=shown))
        asked = ""
    return found


def true_pictures(story: Sequence[Chapter], side: int) -> list[Image.Image]:
    """What each scene's picture should be, at the size that is drawn; white where there is none."""
    pictures = [chapter.scene.picture for chapter in story]
    images = [picture.open() if picture else Image.new("RGB", (side, side), "white") for picture in pictures]
    return [center_crop(image, side) for image in images]
