"""An instruct LLM writes stories with a caption a scene, so that its vokens can learn what it would say in captions.

    python -m trainer write --llm FOLDER --stories 500 --out stories.jsonl

A story is written line by line (`form.py`): each line's label is given, the LLM goes on to the line's end, and a line
that does not hold the form is drawn again, a few times; then the story is dropped. Stories are numbered, dropped ones
too, and each follows from its number, the seed and the LLM. So the same command goes on after what is in the file, and
ends with the same file as without an interruption.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from minigpt5_core.errors import BadInputError, CancelledError
from minigpt5_core.generate import Prompt, Sampling, StoryCache, generate
from minigpt5_core.llm import FrozenLLM

from ..common.progress import TrainingError, interrupts
from .export import captioned_line
from .form import Draft, LineTrouble, draw_subject, request_text, requests_of

BEGINS = b'{"id": "'  # a line, half of which may be all that there is
TRIES = 4  # of a line, before its story is dropped
TRIED_FIRST, LEAST_SHARE = 20, 0.1  # give up where a smaller share of stories holds the form, after so many
TOKENS_A_LINE = 60


@dataclass(frozen=True)
class WriteSettings:
    """How many `stories` the file should hold, each of how many `scenes`; `seed` and LLM decide what they are."""

    stories: int = 500
    scenes: int = 4
    seed: int = 0
    temperature: float = 0.7
    top_p: float = 0.95

    def __post_init__(self) -> None:
        for name, least in (("stories", 1), ("scenes", 2)):
            if getattr(self, name) < least:
                raise BadInputError(f"{name} is {getattr(self, name)}; it must be {least} or more.")
        if self.temperature <= 0:
            raise BadInputError(f"temperature is {self.temperature:g}; above 0 stories differ, such as 0.7.")


@dataclass
class Written:
    """What there is: stories in the file, the number of the next one; and what this run tried, and dropped.

    `why` is what was wrong with the last line that had to be drawn again.
    """

    stories: int = 0
    following: int = 0
    tried: int = 0
    dropped: int = 0
    lines: int = 0
    redrawn: int = 0
    why: str = ""

    def __str__(self) -> str:
        return (
            f"{self.stories} stories; of {self.tried} tried {self.dropped} dropped, of {self.lines} lines "
            f"{self.redrawn} did not hold the form"
        )


class Writer:
    """Writes stories with one LLM. What all requests have in common is read once and kept.

    `stop` is asked at every token; a true answer raises CancelledError.
    """

    def __init__(
        self, llm: FrozenLLM, settings: WriteSettings, written: Written, stop: Callable[[int], bool]
    ) -> None:
        self.llm, self.settings, self.written, self.stop = llm, settings, written, stop
        self.cache = StoryCache()
        two = [
            llm.encode(request_text(llm, self.draft(number).subject, settings.scenes)) for number in (0, 1)
        ]
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(*two, strict=False))
        self.common = [token for token, _ in alike]

    def draft(self, number: int) -> Draft:
        """A story of this number, not yet begun."""
        return Draft(draw_subject(self._rng(number, "subject")))

    def write(self, number: int) -> Draft | None:
        """The story of this number; None where a line does not hold the form however often it is drawn."""
        draft, rng = self.draft(number), self._rng(number, "lines")
        request = request_text(self.llm, draft.subject, self.settings.scenes)
        self._forget_last()
        while len(draft.scenes) < self.settings.scenes:
            if not self._add_line(draft, request, rng):
                return None
        return draft

    def _add_line(self, draft: Draft, request: str, rng: random.Random) -> bool:
        """Whether one of a few draws of the next line held the form; the draft then has it."""
        for _ in range(TRIES):
            line = self._line(f"{request}{draft}", rng.getrandbits(63))
            self.written.lines += 1
            try:
                draft.add(line)
                return True
            except LineTrouble as trouble:
                self.written.redrawn, self.written.why = self.written.redrawn + 1, str(trouble)
        return False

    def _line(self, text: str, seed: int) -> str:
        settings = self.settings
        sampling = Sampling(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_new_tokens=TOKENS_A_LINE,
            pictures="none",
            stop_strings=("\n",),
        )
        prompt = Prompt(self.llm.encode(text))
        reply = generate(self.llm, [prompt], sampling, [seed], self.cache, self.stop)[0]
        if reply.stopped == "cancelled":
            raise CancelledError
        return reply.text if reply.stopped != "length" else f"{reply.text} <it does not end>"

    def _forget_last(self) -> None:
        """Keeps of the cache what is common to all requests, read in one go: so nothing depends on the last story."""
        if self.cache.reuse([*self.common, -1]) < len(self.common):
            self.cache = StoryCache()
            once = Sampling(pictures="none", max_new_tokens=1)
            generate(self.llm, [Prompt(self.common)], once, [0], self.cache)
            self.cache.reuse([*self.common, -1])

    def _rng(self, number: int, what: str) -> random.Random:
        return random.Random(f"write/{self.settings.seed}/{number}/{what}")


def write_with_llm(llm: FrozenLLM, settings: WriteSettings, out: Path) -> Written:
    """Adds stories to `out` until it holds as many as the settings say, each as soon as it is written.

    Ctrl-C and SIGTERM end it with the file whole. BadInputError for a file of something else; TrainingError when hardly
    any story holds the form.
    """
    written = read_written(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        opened = out.open("a", encoding="utf-8")
    except OSError as error:
        raise BadInputError(f"{out} cannot be written: {error.strerror}. Name another file.") from error
    with interrupts() as caught, opened as file:
        writer = Writer(llm, settings, written, lambda row: bool(caught))
        while written.stories < settings.stories:
            try:
                draft = writer.write(written.following)
            except CancelledError:
                print(f"{written.stories} stories are kept in {out}; the same command goes on.")
                raise caught[0] from None
            if draft is not None:
                file.write(_story_line(written.following, draft) + "\n")
                file.flush()
            count(written, draft is not None)
    return written


def _story_line(number: int, draft: Draft) -> str:
    asked = requests_of(draft.subject, len(draft.scenes))
    told = [(request, *scene) for request, scene in zip(asked, draft.scenes, strict=True)]
    return captioned_line(f"{number:06}", told)


def count(written: Written, kept: bool) -> None:
    """Counts a story that was kept or dropped; TrainingError when hardly any was kept."""
    written.following += 1
    written.tried += 1
    written.stories += kept
    written.dropped += not kept
    if written.tried % 10 == 0:
        print(written, flush=True)
    if written.tried >= TRIED_FIRST and written.tried - written.dropped < LEAST_SHARE * written.tried:
        raise TrainingError(
            f"of {written.tried} stories that this LLM tried {written.tried - written.dropped} hold the form; the last "
            f"line that does not: {written.why}. Take a larger instruct LLM (--llm). What was written is kept."
        )


def read_written(out: Path) -> Written:
    """What an earlier run left in `out`; a line that was not finished is cut off. BadInputError for another file."""
    if not out.exists():
        return Written()
    content = out.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    numbers = [_number(line, f"{out}:{index}") for index, line in enumerate(whole.splitlines(), 1)]
    if content and not numbers and not content.startswith(BEGINS):
        _number(content, f"{out}:1")
    if len(whole) < len(content):
        with out.open("r+b") as file:
            file.truncate(len(whole))
    return Written(stories=len(numbers), following=numbers[-1] + 1 if numbers else 0)


def _number(line: bytes, where: str) -> int:
    """A story's number."""
    try:
        return int(json.loads(line)["id"])
    except (ValueError, TypeError, KeyError) as error:
        raise BadInputError(
            f"{where} was not written by `trainer write` (a story's id is a number there). Name a new file."
        ) from error
