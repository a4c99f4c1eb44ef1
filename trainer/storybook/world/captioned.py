"""Writes `storybook/captioned.txt.gz`: the stories and captions that the storybook's own mapper learned from last.

python -m trainer.storybook.world.captioned OUT.txt.gz

What ComfyUI's Train Voken Mapper reads where it is given no texts.
"""

import gzip
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from minigpt5_core.story.captioned import CaptionedScene, CaptionedStory, as_lines

from .source import caption_states
from .stories import stories

STORIES, CAPTIONS, SEED = 1400, 1000, 71  # as in storybook/README.md


def captioned_stories(
    count: int = STORIES, captions: int = CAPTIONS, seed: int = SEED
) -> Iterator[CaptionedStory]:
    """Stories of the world, and captions by themselves evenly among them, so that any first part is a sample of all."""
    alone = iter(caption_states(captions, seed))
    given = 0
    for number, scenes in enumerate(islice(stories(seed), count), 1):
        yield tuple(CaptionedScene(scene.request, scene.text, scene.caption) for scene in scenes)
        while given < number * captions // count:
            caption = next(alone)
            yield (CaptionedScene(caption, "", caption),)
            given += 1


def write_captioned(path: Path, count: int = STORIES, captions: int = CAPTIONS, seed: int = SEED) -> None:
    """The same bytes every time."""
    lines = (line for story in captioned_stories(count, captions, seed) for line in as_lines(story))
    text = "\n".join(lines) + "\n"
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


if __name__ == "__main__":
    write_captioned(Path(sys.argv[1]))
