"""The wordings that the published checkpoints were trained with: a story, a dialogue, a caption.

Source: dataloader.py and examples/playground.py of github.com/UCSB-AI/MiniGPT-5 (arXiv 2310.02239). A prompt begins
with the id that the checkpoint's own began with, and a picture stands in it as `<Img><ImageHere></Img>`.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import BadInputError
from ..generate.prompt import Prompt
from ..llm.frozen import FrozenLLM
from ..vokens import IMAGE_HERE, PICTURE, plain
from .prompts import LOOK, NEXT, Turn, Wording

SEEING = (
    "Give the following images in <Img>ImageContent</Img> format. "
    "You will be able to see the images once I provide it to you."
)
STORY_SYSTEM = f"{SEEING} Please understanding images and generate story."
DIALOGUE_SYSTEM = f"{SEEING} Please generate conversations with appropriate images."
DRAW_SCENE = "Generate an image with the scene description:"
NEXT_SCENE = "Tell me the next scene with image."
STOP = "###"
HUMAN, ASSISTANT = "Human", "Assistant"
KEPT = {
    ASSISTANT: 3,
    HUMAN: 2,
}  # by who answers: earlier utterances kept, an exchange and what is to be answered


def vist_prompt(llm: FrozenLLM, turns: Sequence[Turn]) -> Prompt:
    """Each scene's text followed by its picture, then the question; a story's opening is a scene to be drawn."""
    *told, asked = turns
    history = "".join(_words(turn) + _slot(llm, turn) for turn in told)
    if not told:
        question = f"{DRAW_SCENE} {_said(asked.request)}"
    else:
        question = NEXT_SCENE if asked.request == NEXT else _said(asked.request)
    human = f"{history}\n {question}" if history else f" {question}"
    return _prompt(llm, f"{STORY_SYSTEM}###Human:{human} ###Assistant:", _pictures(told))


def cc3m_prompt(llm: FrozenLLM, turns: Sequence[Turn]) -> Prompt:
    """The bare caption of one picture; BadInputError for a turn that has none."""
    asked = turns[-1].request
    if asked in (NEXT, LOOK):
        raise BadInputError(
            "The preset published_cc3m draws a caption, and this turn has none. Give the caption as the prompt or the "
            "instruction, and ask for one scene."
        )
    return _prompt(llm, clean_caption(_said(asked)), [])


def clean_caption(caption: str) -> str:
    """A caption as stage 1 was trained on it: in lower case, most punctuation gone."""
    return re.sub(r"\s{2,}", " ", re.sub(r'[.!"()*#:;~]', " ", caption.lower())).strip()


@dataclass
class _Utterance:
    """What one of the two speakers said in a row, and the pictures that came with it."""

    speaker: str
    texts: list[str] = field(default_factory=list)
    pictures: list[Tensor] = field(default_factory=list)


def mmdialog_prompt(llm: FrozenLLM, turns: Sequence[Turn]) -> Prompt:
    """The last exchange and what followed it. Where the last turn asks nothing, the other speaker goes on."""
    said = _dialogue(turns)
    answering = HUMAN if said and said[-1].speaker == ASSISTANT else ASSISTANT
    kept = said[-KEPT[answering] :]
    lines = [DIALOGUE_SYSTEM]
    for utterance in kept:
        lines.append(" ".join((f"###{utterance.speaker}:", *utterance.texts)))
        lines += [_written(llm)] * len(utterance.pictures)
    pictures = [picture for utterance in kept for picture in utterance.pictures]
    return _prompt(llm, " ".join((*lines, f"###{answering}:")), pictures)


def _dialogue(turns: Sequence[Turn]) -> list[_Utterance]:
    """The turns as a dialogue: requests and given pictures are the human's, replies the assistant's.

    A reply without a request is by the speaker who did not speak last.
    """
    said: list[_Utterance] = []
    for speaker, text, picture in _spoken(turns):
        last = said[-1].speaker if said else None
        speaker = speaker or (HUMAN if last == ASSISTANT else ASSISTANT)
        if speaker != last:
            said.append(_Utterance(speaker))
        said[-1].texts += [text] if text else []
        said[-1].pictures += [] if picture is None else [picture]
    return said


def _spoken(turns: Sequence[Turn]) -> Iterator[tuple[str | None, str, Tensor | None]]:
    """(speaker, text, picture) in order; the speaker is None where it depends on who spoke before."""
    for turn in turns:
        asked = turn.request not in (NEXT, LOOK)
        if asked:
            yield HUMAN, _said(turn.request), None
        if turn.text is not None:
            given = turn.image_tokens is not None and not turn.picture
            yield HUMAN if given else ASSISTANT if asked else None, _said(turn.text), turn.image_tokens


def _words(turn: Turn) -> str:
    """The text of a scene that was told; the request, for one whose reply is a picture without text."""
    own = "" if turn.request in (NEXT, LOOK) else turn.request
    return _said(turn.text or own)


def _said(text: str) -> str:
    """A text without the brackets that would turn a word into a voken or a picture's slot."""
    return plain(text).replace(IMAGE_HERE, IMAGE_HERE.strip("<>")).strip()


def _pictures(turns: Sequence[Turn]) -> list[Tensor]:
    return [turn.image_tokens for turn in turns if turn.image_tokens is not None]


def _slot(llm: FrozenLLM, turn: Turn) -> str:
    return "" if turn.image_tokens is None else _written(llm)


def _written(llm: FrozenLLM) -> str:
    """How a picture is written in the published prompts."""
    return f"<Img>{_picture_token(llm)[0]}</Img>"


def _picture_token(llm: FrozenLLM) -> tuple[str, int]:
    """The token of a picture's slot, and its id: `<ImageHere>`, or ours for an LLM that does not know it."""
    known = llm.tokenizer.convert_tokens_to_ids(IMAGE_HERE)
    if known is None or known == llm.tokenizer.unk_token_id:
        return PICTURE, llm.picture_id
    return IMAGE_HERE, known


def _prompt(llm: FrozenLLM, text: str, pictures: list[Tensor]) -> Prompt:
    begin = llm.tokenizer.bos_token_id if llm.bos_id is None else llm.bos_id
    ids = ([] if begin is None else [begin]) + llm.encode(text)
    return Prompt(ids, pictures, _picture_token(llm)[1] if pictures else None)


VIST = Wording(vist_prompt, lambda turns: len(turns) == 1, (STOP,))
MMDIALOG = Wording(mmdialog_prompt, stops=(STOP,))
CC3M = Wording(cc3m_prompt, lambda turns: True, (STOP,))
