"""Training with pictures, on a tiny LLM: where losses fall, what learns, and the commands end to end."""

import random
from dataclasses import astuple
from itertools import islice

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minigpt5_core.conditioning.mapper_file import load_mapper
from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import add_vokens, load_llm, load_vision
from minigpt5_core.story.prompts import DESCRIBE, LOOK, Turn
from minigpt5_core.vision import ImageEncoder, ImageEncoderConfig, load_image_adapter
from minigpt5_core.vision.image_adapter import IMAGE_ADAPTER
from tests.conftest import make_tiny_parts
from tests.stages import train_finetune, train_mapper
from trainer.common.recipe import make_recipe
from trainer.llm.sequences import story_losses, story_sequence
from trainer.stages.finetune import FinetuneRecipe
from trainer.stages.mapper import MapperRecipe
from trainer.storybook.benchmark.identity import identity
from trainer.storybook.models.caption_baseline import caption_prompt, captioned_turns
from trainer.storybook.models.image_adapter import read_caption
from trainer.storybook.world.render import render
from trainer.storybook.world.state import State, held_out
from trainer.storybook.world.stories import change_a_fact, random_state, stories, training_state
from trainer.storybook.world.visual_turns import (
    caption_turns,
    interleaved_turns,
    questions,
    scenes_to_generate,
)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def tiny_llm():
    """A token a letter: a whole story needs more than the 512 that others have."""
    return add_vokens(*make_tiny_parts(context=4096), 8)


@pytest.fixture
def seeing(tiny_llm):
    torch.manual_seed(0)
    config = ImageEncoderConfig(llm_width=32, tokens=3, channels=[4, 4, 4, 4], hidden=12, heads=2, layers=1)
    return tiny_llm.with_vision(ImageEncoder(config).eval())


def test_a_shown_picture_takes_its_places_and_teaches_nothing(seeing):
    image = torch.randn(3, 32)
    sequence = story_sequence(
        seeing, [Turn(LOOK, "A fox.", picture=False, image_tokens=image), Turn(DESCRIBE, "b", False)]
    )
    assert sequence.ids.count(seeing.picture_id) == 3
    taught = [token for token in sequence.labels if token != -100]
    assert taught == [*seeing.encode("A fox."), *seeing.encode("b"), seeing.tokenizer.eos_token_id]


def test_a_batch_with_pictures_gives_each_storys_own_states(seeing):
    image = torch.randn(3, 32)
    one = story_sequence(seeing, [Turn(LOOK, "A fox.", image_tokens=image), Turn("x", "y")])
    other = story_sequence(seeing, [Turn("a", "b")])
    together, _ = story_losses(seeing, [one, other])
    apart = torch.cat([story_losses(seeing, [part])[0] for part in (one, other)])
    assert torch.allclose(together, apart, atol=1e-4)


def test_the_loss_behind_a_picture_reaches_the_encoder_and_not_the_llm(seeing):
    turns = questions(seeing, 1, random.Random(0))[0]
    story_losses(seeing, [story_sequence(seeing, [turns[0], Turn(DESCRIBE, "a fox")])])[1].backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for p in seeing.image_encoder.projector.parameters()
    )
    assert all(p.grad is None for p in seeing.causal_lm.parameters())


def test_a_story_ends_in_a_scene_of_the_llms_own(seeing):
    draw = random.Random(1)
    for scenes in islice(stories(1), 20):
        turns = interleaved_turns(seeing, scenes, draw)
        assert turns[-1].picture and len(turns) == len(scenes)
        assert all(turn.picture or turn.image_tokens is not None for turn in turns)
        assert len(scenes_to_generate(scenes, turns)) == len(story_sequence(seeing, turns).blocks)


def test_every_caption_of_the_world_is_read_back():
    draw = random.Random(2)
    for _ in range(300):
        state = random_state(draw)
        assert read_caption(f"Well, {state.caption()}.") == state
    assert read_caption("a castle in the forest by day") is None


def test_an_image_adapter_is_trained_and_lets_its_llm_see(trained, tiny_llm_folder):
    folder, _ = trained
    file = folder / "sight" / IMAGE_ADAPTER
    encoder, header = load_image_adapter(file)
    assert encoder.config.tokens == 4 and header.trained["stage"] == "image adapter"
    llm = load_vision(load_llm(tiny_llm_folder), tiny_llm_folder, file)
    assert llm.see(torch.rand(64, 64, 3)).shape == (4, 32)


@pytest.mark.slow
def test_stories_with_pictures_finetune_and_leave_the_encoder_as_it_was(trained, tmp_path):
    folder, parts = trained
    file = folder / "sight" / IMAGE_ADAPTER
    before = load_file(file)
    recipe = make_recipe(
        FinetuneRecipe,
        **parts,
        image_adapter=str(file),
        shown_share=1.0,
        questions=1,
        captions=1,
        stories=2,
        steps=2,
        batch=1,
        image_weight=0.0,
    )
    llm, _ = train_finetune(recipe, tmp_path / "run", folder / "align")
    after = llm.image_encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_mapper_alone_learns_on_what_the_adapter_says(trained, tmp_path):
    folder, parts = trained
    recipe = make_recipe(MapperRecipe,
        **parts, stories=1, captions=1, steps=2, batch=2, image_weight=0.0,
        image_adapter=str(folder / "sight" / IMAGE_ADAPTER), shown_share=1.0,
    )  # fmt: skip
    train_mapper(recipe, tmp_path / "run", folder / "align")
    before, after = (
        load_mapper(run / "mapper.safetensors")[0] for run in (folder / "align", tmp_path / "run")
    )
    assert not torch.equal(before.output.weight, after.output.weight)
    name = "adapter_model.safetensors"
    assert (folder / "align" / "adapter" / name).read_bytes() == (
        tmp_path / "run" / "adapter" / name
    ).read_bytes()


def test_a_new_mapper_of_another_shape(trained, tmp_path):
    folder, parts = trained
    recipe = make_recipe(
        MapperRecipe,
        **parts,
        mapper="reference",
        fresh=True,
        stories=1,
        captions=1,
        steps=1,
        image_weight=0.0,
    )
    train_mapper(recipe, tmp_path / "run", folder / "align")
    assert load_mapper(tmp_path / "run" / "mapper.safetensors")[0].config.kind == "reference"


def test_a_mapper_needs_a_loss_from_its_first_step_and_a_folder_of_its_own(trained, tmp_path):
    folder, parts = trained
    with pytest.raises(BadInputError, match="Set image_weight=1 and image_from=0"):
        make_recipe(MapperRecipe, **parts, caption_weight=0.0)
    with pytest.raises(BadInputError, match="--out and --from are both"):
        train_mapper(make_recipe(MapperRecipe, **parts), folder / "align", folder / "align")


def test_a_mapper_needs_an_adapter_to_listen_to(tmp_path):
    with pytest.raises(BadInputError, match="holds no adapter/"):
        train_mapper(MapperRecipe(), tmp_path / "run", tmp_path)


def test_a_question_shows_its_picture_first():
    first, second = caption_turns(torch.zeros(1, 2), "a fox")
    assert (first.request, first.text, first.picture) == (LOOK, "", False)
    assert (second.request, second.text, second.picture) == (DESCRIBE, "a fox", False)


def test_a_caption_is_asked_for_where_it_stands_in_training(tiny_llm):
    scenes = next(stories(0))
    whole = story_sequence(tiny_llm, captioned_turns(scenes)).ids
    for index, scene in enumerate(scenes):
        ids = caption_prompt(tiny_llm, captioned_turns(scenes[:index]), scene).ids
        caption = tiny_llm.encode(f"{scene.caption})")
        assert whole[: len(ids) + len(caption)] == ids + caption


def test_a_hero_is_itself_wherever_it_stands_and_no_other():
    state = State("fox", "beach", "day", "apple")
    pictures = [render(state, random.Random(seed)) for seed in range(6)]
    assert min(identity(pictures, "fox", [True] * 6)[1:]) > 0.999
    other = render(state.but(hero="bear"), random.Random(0))
    assert identity([pictures[0], other], "fox", [True, True])[1] < 0.5


def test_a_hero_is_compared_with_its_first_appearance():
    pictures = [render(State("fox", "city", "day"), random.Random(seed)) for seed in range(3)]
    found = identity(pictures, "fox", [False, True, True])
    assert np.isnan(found[0]) and np.isnan(found[1]) and found[2] > 0.99


def test_a_changed_fact_is_one_fact_and_never_a_held_out_combination():
    draw = random.Random(3)
    for _ in range(300):
        state = training_state(draw)
        changed = change_a_fact(state, draw)
        assert sum(a != b for a, b in zip(astuple(state), astuple(changed), strict=True)) == 1
        assert not held_out(changed)
