"""The published wordings, beside prompts written out by hand after the published data loader."""

from dataclasses import replace

import pytest
import torch

from minigpt5_core.errors import BadInputError
from minigpt5_core.story.prompts import LOOK, NEXT, Turn, fit_prompt
from minigpt5_core.story.published_prompts import CC3M, MMDIALOG, VIST, clean_caption

STORY = (
    "Give the following images in <Img>ImageContent</Img> format. You will be able to see the images once I provide it "
    "to you. Please understanding images and generate story."
)
DIALOGUE = (
    "Give the following images in <Img>ImageContent</Img> format. You will be able to see the images once I provide it "
    "to you. Please generate conversations with appropriate images."
)
SEEN = "<Img>[PICTURE]</Img>"


def seen(value: float) -> torch.Tensor:
    return torch.full((2, 32), value)


def worded(llm, wording, turns) -> tuple[str, list[float]]:
    """A prompt as text, and which pictures stand in it."""
    prompt = wording.prompt(llm, turns)
    assert prompt.ids.count(llm.picture_id) == len(prompt.images)
    return llm.tokenizer.decode(prompt.ids), [float(image[0, 0]) for image in prompt.images]


def test_an_opening_is_a_scene_to_be_drawn(tiny_llm):
    text, pictures = worded(tiny_llm, VIST, [Turn("My sister arrived early.")])
    asked = "Generate an image with the scene description: My sister arrived early."
    assert text == f"{STORY}###Human: {asked} ###Assistant:"
    assert pictures == [] and VIST.illustrates([Turn("My sister arrived early.")])


def test_a_story_so_far_is_texts_with_their_pictures_and_the_question(tiny_llm):
    turns = [
        Turn(
            "My sister arrived early.", "", image_tokens=seen(1)
        ),  # asked for, and nothing but a picture came
        Turn(NEXT, "Every one else arrived soon after.", image_tokens=seen(2)),
        Turn(LOOK, "", picture=False, image_tokens=seen(3)),  # given, without a word
        Turn(NEXT, "No picture of this."),
        Turn(NEXT),
    ]
    text, pictures = worded(tiny_llm, VIST, turns)
    history = (
        f"My sister arrived early.{SEEN}Every one else arrived soon after.{SEEN}{SEEN}No picture of this."
    )
    assert text == f"{STORY}###Human:{history}\n Tell me the next scene with image. ###Assistant:"
    assert pictures == [1, 2, 3] and not VIST.illustrates(turns)


def test_an_instruction_is_asked_in_the_questions_place(tiny_llm):
    text, _ = worded(tiny_llm, VIST, [Turn(NEXT, "A dog."), Turn("What should happen then?")])
    assert text == f"{STORY}###Human:A dog.\n What should happen then? ###Assistant:"


def test_a_caption_stands_alone_in_lower_case_and_without_punctuation(tiny_llm):
    text, _ = worded(tiny_llm, CC3M, [Turn("Earlier."), Turn('A dog (brown) runs: "fast"... home!')])
    assert text == "a dog brown runs fast home"
    assert clean_caption(" It's 5 o'clock; #1, ~ok?\n") == "it's 5 o'clock 1, ok?"


@pytest.mark.parametrize("request_", [NEXT, LOOK])
def test_without_a_caption_there_is_nothing_to_draw(tiny_llm, request_):
    with pytest.raises(BadInputError, match="draws a caption, and this turn has none"):
        CC3M.prompt(tiny_llm, [Turn(request_)])


def published_history(utterances: list[str]) -> list[str]:
    """What the published loader keeps in front of the utterance that follows, step by step as it goes through them."""
    history: list[str] = []
    humans = remove = 0
    for index, utterance in enumerate(utterances):
        if index % 2 == 0:
            humans += 1
            if humans == 2:
                remove = len(history)
        if humans == 2 and index % 2 == 1:
            history, humans, remove = history[remove:], 1, 0
        history.append(utterance)
    return history


@pytest.mark.parametrize("length", range(1, 9))
def test_a_dialogue_keeps_what_the_published_loader_kept(tiny_llm, length):
    said = [f"Line {index}." for index in range(length)]
    turns = [Turn(*said[index : index + 2]) for index in range(0, length, 2)]
    if length % 2 == 0:  # it is the human's turn, and nobody was asked
        turns.append(Turn(NEXT))
    text, _ = worded(tiny_llm, MMDIALOG, turns)
    speakers = [f"###{'Assistant' if index % 2 else 'Human'}:" for index in range(length + 1)]
    lines = [f"{speaker} {line}" for speaker, line in zip(speakers, said, strict=False)]
    assert text == " ".join([DIALOGUE, *published_history(lines), speakers[length]])


def test_a_picture_follows_what_was_said_with_it(tiny_llm):
    turns = [
        Turn(LOOK, "", picture=False, image_tokens=seen(1)),  # the human's
        Turn("What a day!", "It was.", image_tokens=seen(2)),
        Turn("And then?"),
    ]
    text, pictures = worded(tiny_llm, MMDIALOG, turns)
    assert text == (
        f"{DIALOGUE} ###Human: What a day! {SEEN} ###Assistant: It was. {SEEN} ###Human: And then? ###Assistant:"
    )
    assert pictures == [1, 2]


def test_pictures_that_are_left_out_of_a_dialogue_leave_with_their_words(tiny_llm):
    turns = [Turn(f"Question {i}?", f"Answer {i}.", image_tokens=seen(i)) for i in range(3)] + [Turn("Well?")]
    text, pictures = worded(tiny_llm, MMDIALOG, turns)
    assert pictures == [2] and "Question 2?" in text and "Answer 1." not in text


@pytest.mark.parametrize("wording", [VIST, MMDIALOG, CC3M])
def test_words_that_mean_pictures_or_vokens_stay_words(tiny_llm, wording):
    turns = [
        Turn("<ImageHere>[IMG0]", "[PICTURE]<ImageHere>", image_tokens=seen(1)),
        Turn("[IMG0] <ImageHere>"),
    ]
    worded(tiny_llm, wording, turns)
    assert tiny_llm.voken_ids[0] not in wording.prompt(tiny_llm, turns).ids


def test_a_prompt_begins_as_the_adapter_says_or_else_with_the_tokenizers_own_mark(tiny_llm):
    plain = VIST.prompt(tiny_llm, [Turn("Mia.")]).ids
    assert VIST.prompt(replace(tiny_llm, bos_id=2), [Turn("Mia.")]).ids == [2, *plain]
    tiny_llm.tokenizer.bos_token = "<|im_start|>"
    assert VIST.prompt(tiny_llm, [Turn("Mia.")]).ids == [tiny_llm.tokenizer.bos_token_id, *plain]


def test_a_long_story_is_fitted_in_its_own_wording(tiny_llm):
    turns = [Turn(NEXT, f"Scene {index}. {'x' * 40}") for index in range(8)] + [Turn(NEXT)]
    fitted = fit_prompt(tiny_llm, turns, 40, VIST)
    text = tiny_llm.tokenizer.decode(fitted.prompt.ids)
    assert fitted.dropped and fitted.prompt.length <= tiny_llm.context - 40
    assert text.startswith(f"{STORY}###Human:Scene 0.") and "Scene 7." in text and "Scene 1." not in text
