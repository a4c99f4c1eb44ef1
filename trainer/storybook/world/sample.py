"""Writes stories of the storybook's world with their pictures, and the list of words the world knows."""

import json
import random
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from minigpt5_core.errors import BadInputError

from ...common.images import grid
from .render import render
from .state import BY_TIME, COMPANIONS, HEROES, PLACES, PROPS
from .stories import stories

# Words that draw nothing but that people write; without them every prompt would get a warning for its grammar.
PLAIN_WORDS = (
    "a about after again all along also an and another are around as asks at away back be because becomes been before "
    "begin begins big bright but by called came can cold come comes could day decides did do does down each every "
    "feels find finding finds first for friend from get gets girl go goes going good had happily happy has have having "
    "he hello help her here hers him his how i in inside into is it its just keeps kind laughs learns likes little "
    "lives long looks lost loves made makes many me meet meets more morning most my named near new next nice night no "
    "not now of off old on once one only or other our out outside over plays playing please rests runs sad says sees "
    "she sits small so some someone soon starts stories story sunny takes tale tell tells than that the their them "
    "then there they this time to today together too tries under up very visit visits wakes walk walking walks want "
    "wants warm was way we went were what when where who why will wish wishes with wonderful would you your boy"
).split()


@dataclass(frozen=True)
class SampleRecipe:
    """How many stories, of which split ("train" or "test")."""

    stories: int = 8
    seed: int = 0
    split: str = "train"


def world_words() -> list[str]:
    """Every word of the world's sentences and captions."""
    scenes = [scene for story in islice(stories(0), 3000) for scene in story]
    text = " ".join(f"{scene.text} {scene.caption} {scene.request}" for scene in scenes)
    return sorted(set(re.findall(r"[^\W\d_]+", text.lower())))


def write_world(path: Path) -> None:
    """`world.json`: what there is, and the words by which the pipeline knows what it cannot draw."""
    world = {
        "heroes": list(HEROES),
        "props": {name: phrase for name, (phrase, _) in PROPS.items()},
        "places": list(PLACES),
        "times": list(BY_TIME),
        "companions": list(COMPANIONS),
        "words": world_words(),
        "plain_words": PLAIN_WORDS,
    }
    path.write_text(json.dumps(world, indent=1) + "\n", encoding="utf-8")


def write_sample(recipe: SampleRecipe, out: Path) -> None:
    """Writes `stories.jsonl`, a picture a scene, a contact sheet and `world.json` into `out`."""
    if recipe.split not in ("train", "test"):
        raise BadInputError(f"split is {recipe.split!r}; it can be train or test.")
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"sample/{recipe.seed}")
    lines, pictures = [], []
    for number, story in enumerate(islice(stories(recipe.seed, recipe.split), recipe.stories)):
        items = []
        for index, scene in enumerate(story):
            name = f"pictures/{number:05d}_{index}.png"
            picture = render(scene.state, rng)
            picture.save(out / name)
            pictures.append(picture)
            items.append(
                {"request": scene.request, "text": scene.text, "picture": name, "caption": scene.caption}
            )
        lines.append(json.dumps({"scenes": items}, ensure_ascii=False))
    (out / "stories.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    grid(pictures[:48], 8).save(out / "contact_sheet.png")
    write_world(out / "world.json")
    print(f"{len(pictures)} scenes of {len(lines)} stories in {out}")
