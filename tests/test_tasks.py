"""Records as training examples: what each task shows, asks and teaches, and training on data sets end to end."""

import json
import random
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import add_vokens
from minigpt5_core.story.prompts import LOOK, NEXT
from tests.conftest import make_tiny_parts
from tests.stages import stopping_source, train_align, train_finetune
from trainer.common.images import center_crop
from trainer.common.recipe import make_recipe
from trainer.data.formats import read
from trainer.data.record_source import RecordSource
from trainer.data.records import Picture, Record, Scene
from trainer.data.stream import Stream
from trainer.data.tasks import TASKS, Task, Tools
from trainer.llm.sequences import story_losses, story_sequence
from trainer.stages.align import AlignRecipe
from trainer.stages.finetune import FinetuneData, FinetuneRecipe
from trainer.storybook.world.export import export_stories
from trainer.storybook.world.source import StorySource
from trainer.storybook.world.stories import stories

pytestmark = pytest.mark.filterwarnings("ignore")
# stand-ins of the same layout, and the originals where they lie beside this repository: they may not be passed on
SAMPLES = {
    "stand-ins": Path(__file__).parent / "samples",
    "originals": Path(__file__).parents[2] / "shared" / "data",
}


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    return Picture("a.png", tmp_path / "a.png")


@pytest.fixture
def record(picture):
    """A story of three scenes, as VIST has them."""
    return Record("1", tuple(Scene(text, picture) for text in ("One.", "Two.", "Three.")), "x:1")


def make(name, record, wordings=(), sees=True, feed_back=False, seed=0):
    image = torch.ones(2, 32) if sees else None
    return TASKS[name](record, Tools(random.Random(seed), wordings, lambda picture: image, feed_back))


def plain(turns):
    return [(turn.request, turn.text, turn.picture, turn.image_tokens is not None) for turn in turns]


def test_a_caption_asks_for_its_picture(record):
    turns, drawn = make("caption", record, ("draw:",))
    assert plain(turns) == [(f"draw: {drawn[0].text}", "", True, False)] and len(drawn) == 1


def test_a_story_is_one_sequence_with_all_its_blocks(record):
    turns, drawn = make("story", record, ("Tell it.",))
    assert plain(turns) == [
        ("Tell it.", "One.", True, False),
        (NEXT, "Two.", True, False),
        (NEXT, "Three.", True, False),
    ]
    assert drawn == list(record.scenes)
    assert [turn.image_tokens is not None for turn in make("story", record, feed_back=True)[0]] == [True] * 3


def test_a_reader_in_the_story_asks_and_gives(record, picture):
    scenes = (Scene("Go on.", picture, speaker="user"), Scene("Yes.", picture))
    turns, drawn = make("story", replace(record, scenes=scenes))
    assert plain(turns) == [(LOOK, "", False, True), ("Go on.", "Yes.", True, False)] and drawn == [scenes[1]]


def test_picture_from_text_gives_what_came_before(record):
    for seed in range(9):
        turns, (scene,) = make("picture_from_text", record, ("draw",), seed=seed)
        before = record.scenes[: record.scenes.index(scene)]
        assert plain(turns) == [
            *((earlier.text, "", False, True) for earlier in before), (f"draw {scene.text}", "", True, False)
        ]  # fmt: skip


def test_text_and_picture_never_asks_for_the_first_scene(record):
    found = [make("text_and_picture", record, ("next?",), seed=seed) for seed in range(9)]
    assert {drawn[0].text for _, drawn in found} == {"Two.", "Three."}
    assert all(turns[-1].request == "next?" and turns[-1].text == drawn[0].text for turns, drawn in found)


def test_understanding_shows_the_picture_before_its_text_and_draws_nothing(record):
    turns, drawn = make("understanding", record, ("what?",))
    looked, told = plain(turns)[-2:]
    assert looked == (LOOK, "", False, True) and told[0] == "what?" and not told[2] and drawn == []


def test_a_dialogue_is_answered_by_its_speaker_with_little_history(picture):
    lines = [("user", "a", None), ("assistant", "b", picture), ("user", "c", None), ("assistant", "d", picture),
             ("user", "e", None)]  # fmt: skip
    record = Record("1", tuple(Scene(text, p, speaker=who) for who, text, p in lines), "x:1")
    found = {
        turns[-1].text: (plain(turns), len(drawn))
        for turns, drawn in (make("next_turn", record, seed=s) for s in range(40))
    }
    assert found["b"] == ([("a", "b", True, False)], 1)
    assert found["d"] == ([("a", "b", False, True), ("c", "d", True, False)], 1)
    assert found["e"] == (
        [
            (LOOK, "", False, True),
            ("b", "c", False, False),
            (LOOK, "", False, True),
            ("d", "e", False, False),
        ],
        0,
    )


@pytest.fixture
def tiny_llm():
    """A token a letter: a whole story needs more than the 512 that others have."""
    return add_vokens(*make_tiny_parts(context=4096), 8)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_leaves_a_record_it_has_no_use_for(name):
    assert make(name, Record("1", (Scene("Only words."),), "x:1")) is None


@pytest.mark.parametrize("name", [name for name in TASKS if name != "understanding"])
@pytest.mark.parametrize("sees", [True, False])
def test_every_block_has_its_picture(tiny_llm, record, name, sees):
    for seed in range(5):
        turns, drawn = make(name, record, sees=sees, seed=seed)
        sequence = story_sequence(tiny_llm, turns)
        assert len(sequence.blocks) == len(drawn)
        assert len(story_losses(tiny_llm, [sequence])[0]) == len(drawn)


# sources


def source(llm, path, layout="jsonl", tasks=None, **stream):
    return RecordSource(llm, Stream(path, layout, **stream), tasks or {"story": Task()}, shown_share=0.0)


def test_exported_stories_give_the_examples_of_the_built_in_ones(tiny_llm, tmp_path):
    path = export_stories("jsonl", 4, 3, tmp_path / "data")
    told = list(islice(stories(3), 4))
    built_in = {
        tuple((scene.request, scene.text) for scene in story): [scene.caption for scene in story]
        for story in told
    }
    for example in source(tiny_llm, path).sample(4, random.Random(0))["text"]:
        turns = tuple((turn.request, turn.text) for turn in example.turns)
        assert [one.caption for one in example.targets] == built_in.pop(turns)
    assert not built_in
    world = StorySource(tiny_llm, FinetuneData(stories=4, shown_share=0.0), 3)
    assert len(world.sample(4, random.Random(0))["text"]) == 4


@pytest.mark.parametrize("layout", ["vist", "mmdialog"])
def test_other_layouts_give_the_same_texts_and_pictures(tiny_llm, tmp_path, layout):
    path = export_stories(layout, 3, 3, tmp_path / "data")
    told = {tuple(scene.text for scene in story) for story in islice(stories(3), 3)}
    found = source(tiny_llm, path, layout).sample(3, random.Random(0))["text"]
    assert {tuple(turn.text for turn in example.turns if turn.picture) for example in found} == told


def test_a_source_goes_on_where_it_stood_and_counts_what_it_could_not_use(tiny_llm, tmp_path):
    path = export_stories("jsonl", 6, 3, tmp_path / "data")
    broken = next((tmp_path / "data" / "pictures").glob("00002_*.png"))
    broken.write_bytes(broken.read_bytes()[:-50])
    whole = source(tiny_llm, path)

    def texts(source, step):
        return [one.turns[0].text for one in source.sample(2, random.Random(step))["text"]]

    drawn = [texts(whole, step) for step in range(6)]
    assert whole.unused == 2  # that story, in two epochs; its batches are one smaller
    assert sorted(map(len, drawn)) in ([1, 1, 2, 2, 2, 2], [0, 2, 2, 2, 2, 2])
    first = source(tiny_llm, path)
    for step in range(3):
        texts(first, step)
    again = source(tiny_llm, path)
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in (3, 4, 5):
        assert texts(again, step) == drawn[step]


def test_what_a_source_cannot_do_is_said(tiny_llm, tmp_path):
    path = export_stories("jsonl", 1, 3, tmp_path / "data")
    with pytest.raises(BadInputError, match="unknown nonsense. Known: caption, story"):
        source(tiny_llm, path, tasks={"nonsense": Task()})
    with pytest.raises(BadInputError, match="understanding needs an LLM that sees"):
        source(tiny_llm, path, tasks={"understanding": Task()})


def test_pictures_are_cut_to_the_middle_square():
    wide = Image.new("RGB", (40, 20), "red")
    wide.paste("blue", (10, 0, 30, 20))
    assert max(red for _, (red, _, _) in center_crop(wide, 16).getcolors()) < 16


# training


@pytest.fixture
def parts(trained):
    return {**trained[1], "steps": 3, "batch": 2, "image_from": 0.0, "preview_every": 3, "save_every": 2}


@pytest.mark.slow
@pytest.mark.parametrize("which", SAMPLES)
def test_both_stages_train_on_samples_of_vist_and_cc3m(which, parts, trained, tmp_path):
    samples = SAMPLES[which]
    if not samples.is_dir():
        pytest.skip("the originals are not beside this repository")
    align = make_recipe(AlignRecipe, **parts, data=str(samples / "CC3M" / "cc3m_val.tsv"), format="cc3m")
    train_align(align, tmp_path / "align")
    tasks = {
        name: {"weight": 1.0} for name in ("picture_from_text", "text_and_picture", "understanding", "story")
    }
    finetune = make_recipe(FinetuneRecipe,
        **parts, data=str(samples / "VIST" / "val_cleaned.json"), format="vist", tasks=tasks,
        image_adapter=str(trained[0] / "sight" / "image_adapter.safetensors"), questions=0,
    )  # fmt: skip
    train_finetune(finetune, tmp_path / "run", tmp_path / "align")
    assert (tmp_path / "run" / "preview_000003.png").is_file()
    assert (tmp_path / "run" / "mapper.safetensors").is_file()
    record = next(iter(read(samples / "VIST" / "val_cleaned.json", "vist")))
    assert len(record.scenes) == 5


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["align", "finetune"])
def test_a_run_on_a_data_set_resumes_exactly(parts, tmp_path, stage):
    path = export_stories("jsonl", 6, 3, tmp_path / "data")
    kind, run = {"align": (AlignRecipe, train_align), "finetune": (FinetuneRecipe, train_finetune)}[stage]
    recipe = make_recipe(kind, **{**parts, "steps": 4}, data=str(path))
    run(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "parts", open_source=stopping_source(recipe, after=2))
    run(recipe, tmp_path / "parts", None, resume=True)
    for name in ("mapper.safetensors", "adapter/adapter_model.safetensors"):
        whole, parted = (load_file(tmp_path / out / name) for out in ("whole", "parts"))
        assert all(torch.equal(whole[key], parted[key]) for key in whole), name
