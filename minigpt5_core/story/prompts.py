"""A story as the LLM reads it, in its own chat template: every scene is a request and the reply to it.

A reply ends with its voken block. The published checkpoints' wordings are in `published_prompts`.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import BadInputError
from ..generate.prompt import Prompt
from ..llm.chat import PLAIN_TEMPLATE as PLAIN_TEMPLATE
from ..llm.frozen import FrozenLLM
from ..vokens import PICTURE, plain

SYSTEM = "You tell a picture book story, scene by scene."
NEXT = "What happens next?"
LOOK = "Look at this picture."  # the request of a scene that is a picture without text
DESCRIBE = "What does the picture show?"


@dataclass(frozen=True)
class Turn:
    """One scene: what was requested, and what was told; `text` is None for the scene still to be told.

    `picture`: whether a voken block, with which the LLM asks for a picture, ends the reply. `image_tokens` (K, W) are
    those of a picture that the LLM sees: one that was given to it, or, behind a voken block, the one drawn from it.
    """

    request: str
    text: str | None = None
    picture: bool = True
    image_tokens: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Wording:
    """How a story is worded for the LLM.

    `prompt` makes a prompt of the turns, the last of which is still to be told. `illustrates` says whether the request
    of that last turn is the scene itself, so that only its picture is wanted. A reply ends at one of the `stops`.
    """

    prompt: Callable[[FrozenLLM, Sequence[Turn]], Prompt]
    illustrates: Callable[[Sequence[Turn]], bool] = lambda turns: False
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class FittedPrompt:
    """A prompt that fits the LLM's context, and which turns (counted from 0) were left out for that."""

    prompt: Prompt
    dropped: tuple[int, ...]


def chat_text(llm: FrozenLLM, turns: Sequence[Turn]) -> str:
    """The turns in the LLM's chat template, or a plain one; a last turn still to be told leaves its reply open."""
    block = "".join(llm.tokenizer.convert_ids_to_tokens(llm.voken_ids))
    return llm.chat.text(SYSTEM, [(plain(turn.request), _reply(llm, turn, block)) for turn in turns])


def _reply(llm: FrozenLLM, turn: Turn, block: str) -> str | None:
    if turn.text is None:
        return None
    slot = f"{llm.family.before}{PICTURE}{llm.family.after}" if turn.image_tokens is not None else ""
    return plain(turn.text) + (block if turn.picture else "") + slot


def chat_prompt(llm: FrozenLLM, turns: Sequence[Turn]) -> Prompt:
    """The text of `chat_text` as token ids, with the turns' image tokens in their slots."""
    images = [turn.image_tokens for turn in turns if turn.text is not None and turn.image_tokens is not None]
    return Prompt(llm.encode(chat_text(llm, turns)), images, llm.picture_id if images else None)


CHAT = Wording(chat_prompt)


def fit_prompt(llm: FrozenLLM, turns: Sequence[Turn], room: int, wording: Wording = CHAT) -> FittedPrompt:
    """The prompt for a story whose last turn is still to be told, leaving `room` tokens for the reply.

    A story longer than the context keeps its first scene and its latest ones; which scenes were left out is returned.
    Room for more than half of the context is none that was promised: a reply may be as long as what the prompt leaves.
    Raises BadInputError when the first scene and the request do not fit.
    """
    limit = llm.context - min(room, llm.context // 2)

    def prompt_without(count: int) -> Prompt:
        return wording.prompt(llm, [*turns[:1], *turns[1 + count :]])

    most = max(0, len(turns) - 2)
    fits = [count for count in (0, most) if prompt_without(count).length <= limit]
    if not fits:
        raise BadInputError(
            f"The prompt is {prompt_without(most).length} tokens long; with {llm.context - limit} kept for the reply "
            f"this LLM reads at most {limit}. Shorten the prompt."
        )
    if fits[0]:  # fewer scenes make a shorter prompt
        fits = [bisect_left(range(most), True, key=lambda count: prompt_without(count).length <= limit)]
    return FittedPrompt(prompt_without(fits[0]), tuple(range(1, 1 + fits[0])))
