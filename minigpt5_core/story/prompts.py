"""A story as the LLM reads it, in its own chat template: every scene is a request and the reply to it.

A reply ends with its voken block. The published checkpoints' wordings are in `published_prompts`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import BadInputError
from ..generate.prompt import Prompt
from ..llm.frozen import FrozenLLM
from ..vokens import PICTURE, plain

SYSTEM = "You tell a picture book story, scene by scene."
NEXT = "What happens next?"
LOOK = "Look at this picture."  # the request of a scene that is a picture without text
DESCRIBE = "What does the picture show?"
# For an LLM whose tokenizer has no chat template: a line a message, each ended by the LLM's own end mark.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
)


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
    family = llm.family
    block = "".join(llm.tokenizer.convert_ids_to_tokens(llm.voken_ids))
    said = [("system", SYSTEM)]
    for turn in turns:
        said.append(("user", plain(turn.request)))
        if turn.text is not None:
            slot = f"{family.before}{PICTURE}{family.after}" if turn.image_tokens is not None else ""
            said.append(
                ("assistant", plain(turn.text) + (block if turn.picture else "") + slot + family.reply_end)
            )
    content = family.content if llm.tokenizer.chat_template else str
    messages = [{"role": role, "content": content(text)} for role, text in said]
    is_open = bool(turns) and turns[-1].text is None
    return llm.tokenizer.apply_chat_template(
        messages,
        chat_template=None if llm.tokenizer.chat_template else PLAIN_TEMPLATE,
        tokenize=False,
        add_generation_prompt=is_open,
    )


def chat_prompt(llm: FrozenLLM, turns: Sequence[Turn]) -> Prompt:
    """The text of `chat_text` as token ids, with the turns' image tokens in their slots."""
    images = [turn.image_tokens for turn in turns if turn.text is not None and turn.image_tokens is not None]
    return Prompt(llm.encode(chat_text(llm, turns)), images, llm.picture_id if images else None)


CHAT = Wording(chat_prompt)


def fit_prompt(llm: FrozenLLM, turns: Sequence[Turn], room: int, wording: Wording = CHAT) -> FittedPrompt:
    """The prompt for a story whose last turn is still to be told, leaving `room` tokens for the reply.

    A story longer than the context keeps its first scene and its latest ones; which scenes were left out is returned.
    Raises BadInputError when the first scene and the request do not fit.
    """
    limit = llm.context - room
    dropped: list[int] = []
    while True:
        kept = [turn for index, turn in enumerate(turns) if index not in dropped]
        prompt = wording.prompt(llm, kept)
        if prompt.length <= limit:
            return FittedPrompt(prompt, tuple(dropped))
        if len(kept) <= 2:
            raise BadInputError(
                f"The prompt is {prompt.length} tokens long; with {room} kept for the reply this LLM reads at most "
                f"{limit}. Shorten the prompt."
            )
        dropped.append(len(dropped) + 1)
