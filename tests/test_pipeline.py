import pytest
import torch

from minigpt5_core.conditioning import SPACES
from minigpt5_core.errors import BadInputError
from minigpt5_core.mapper import build_mapper, compact_config
from minigpt5_core.pipeline import StoryTeller, check_diffusion, load_diffusion
from minigpt5_core.story import Scene, Story
from minigpt5_core.weights import MapperHeader

WORDS = frozenset("the fox finds red balloon tree in at".split())


@pytest.fixture
def teller(tiny_llm, tiny_diffusion_folder):
    torch.manual_seed(0)
    mapper = build_mapper(compact_config(SPACES["storybook"], tiny_llm.width)).eval()
    return StoryTeller(tiny_llm, mapper, load_diffusion(tiny_diffusion_folder), WORDS)


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("The fox finds trees.", []),
        ("Zelda the fox finds a dragon in the red castle, a dragon!", ["dragon", "castle"]),
        ("A fox called Zorro", ["called"]),
    ],
)
def test_words_outside_the_world_are_told_names_are_not(teller, prompt, unknown):
    assert teller.unknown_words(prompt) == unknown


def test_another_diffusion_model_knows_no_list_of_words(teller):
    teller.words = None
    assert teller.unknown_words("a dragon") == []


def test_a_story_goes_on_as_if_it_had_never_stopped(teller):
    story = Story("Mia the fox.", seed=4)
    whole = list(teller.tell(story, scenes=3, steps=1))
    begun = Story(
        story.prompt, story.seed, (Scene(whole[0].text, "scene_01.png"), Scene(whole[1].text, None))
    )
    (last,) = teller.tell(begun, scenes=1, steps=1)
    assert last.text == whole[2].text
    assert last.picture.tobytes() == whole[2].picture.tobytes()


def test_progress_ticks_for_every_token_and_step(teller):
    ticks = []
    teller.on_progress = lambda stage, done, total: ticks.append((stage, done, total))
    list(teller.tell(Story("Mia the fox.", seed=0), scenes=1, steps=3))
    writing = [done for stage, done, _ in ticks if stage == "writing"]
    assert writing == sorted(writing) and len(writing) > 3
    assert [tick for tick in ticks if tick[0] == "drawing"] == [("drawing", step, 3) for step in (1, 2, 3)]


def test_a_story_past_the_context_says_what_it_dropped(tiny_diffusion_folder, teller, tiny_llm):
    told = tuple(Scene("x" * 90, None) for _ in range(5))
    (scene,) = teller.tell(Story("Mia.", 0, told), scenes=1, steps=1)
    assert scene.dropped and scene.dropped[0] == 2


def test_a_mapper_for_another_space_is_refused_before_anything_is_drawn(teller, tmp_path):
    header = MapperHeader(SPACES["sd15"], "an LLM", 32, "hash")
    with pytest.raises(BadInputError, match="width 128.*--mapper|sd15.*width 128"):
        check_diffusion(teller.diffusion, header, tmp_path / "mapper.safetensors")


def test_a_folder_without_a_pipeline_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="no diffusers model folder"):
        load_diffusion(tmp_path)


def test_vokens_are_added_behind_the_vocabulary_as_the_mean_row(tiny_llm):
    table = tiny_llm.causal_lm.get_input_embeddings().weight
    first = tiny_llm.voken_ids[0]
    assert tiny_llm.voken_ids == list(range(first, first + 8))
    assert torch.allclose(table[first:], table[:first].mean(0).expand(8, -1))
