"""A story as the LLM reads it: token ids, scene by scene, in one of two wordings.

`chat` is the LLM's own chat template: every scene is a user's request and the assistant's reply, which ends with its
voken block. `published` is the grammar of the published checkpoints: "###Human:" and "###Assistant:", pictures as
`<Img><ImageHere></Img>`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .errors import BadInputError
from .generate import Prompt
from .llm import FrozenLLM
from .vokens import PICTURE, plain

SYSTEM = "You tell a picture book story, scene by scene."
NEXT = "What happens next?"
LOOK = "Look at this picture."  # the request of a page that is a picture alone
DESCRIBE = "What does the picture show?"
# For an LLM whose tokenizer has no chat template: a line a message, each ended by the LLM's own end mark.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
)
PUBLISHED_SYSTEM = (
    "Give the following images in <Img>ImageContent</Img> format. You will be able to see the images once I provide "
    "it to you. Please understanding images and generate story."
)
PUBLISHED_PICTURE = "<Img><ImageHere></Img>"
PUBLISHED_NEXT = "Tell me the next scene with image."


@dataclass(frozen=True)
class Turn:
    """One scene as it was asked for and told; `text` is None for the scene still to be told.

    `picture` stands for a voken block, with which the LLM asked for its picture. `shown` are the image tokens (K, W)
    of a picture that the LLM sees: one that was given, or, behind the block, what came of it.
    """

    request: str
    text: str | None = None
    picture: bool = True
    shown: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True)
class FittedPrompt:
    """A prompt within the context, and which turns (counted from 0) were left out to make it fit."""

    prompt: Prompt
    dropped: tuple[int, ...]


def chat_text(llm: FrozenLLM, turns: Sequence[Turn]) -> str:
    """The turns through the LLM's chat template, or a plain one; an untold last turn leaves the reply open."""
    family = llm.family
    block = "".join(llm.tokenizer.convert_ids_to_tokens(llm.voken_ids))
    said = [("system", SYSTEM)]
    for turn in turns:
        said.append(("user", plain(turn.request)))
        if turn.text is not None:
            shown = f"{family.before}{PICTURE}{family.after}" if turn.shown is not None else ""
            said.append(
                ("assistant", plain(turn.text) + (block if turn.picture else "") + shown + family.reply_end)
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
    """The same as token ids, with the pictures that are shown in their slots."""
    images = [turn.shown for turn in turns if turn.text is not None and turn.shown is not None]
    return Prompt(llm.encode(chat_text(llm, turns)), images, llm.picture_id if images else None)


def published_text(turns: Sequence[Turn]) -> str:
    """The published grammar for a story's next scene: earlier texts with their pictures, then the question."""
    told = [turn for turn in turns if turn.text is not None]
    history = "".join(f"{turn.text}{PUBLISHED_PICTURE if turn.picture else ''}" for turn in told)
    asked = turns[-1].request if turns and turns[-1].text is None else PUBLISHED_NEXT
    return f"{PUBLISHED_SYSTEM}###Human:{history}{chr(10) if history else ''} {asked} ###Assistant:"


def fit_chat(llm: FrozenLLM, turns: Sequence[Turn], room: int) -> FittedPrompt:
    """The chat prompt for an open story, leaving `room` tokens for the reply.

    A story longer than the context keeps its first scene and its latest ones; which scenes fell out is returned.
    Raises BadInputError when the opening alone does not fit.
    """
    limit = llm.context - room
    dropped: list[int] = []
    while True:
        kept = [turn for index, turn in enumerate(turns) if index not in dropped]
        prompt = chat_prompt(llm, kept)
        if prompt.length <= limit:
            return FittedPrompt(prompt, tuple(dropped))
        if len(kept) <= 2:
            raise BadInputError(
                f"The prompt is {prompt.length} tokens long; with {room} kept for the reply this LLM reads at most "
                f"{limit}. Shorten the prompt."
            )
        dropped.append(len(dropped) + 1)
