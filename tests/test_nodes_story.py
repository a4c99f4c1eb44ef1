"""Stories in the graph: begun, illustrated, shown, taken apart, saved and read again."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

RED, GREEN = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
TEXT = "Mia’s “snow” & <b>ice</b>."


def image(*colours, size=(8, 12), channels=3):
    """An IMAGE (N, H, W, channels), each picture of one colour."""
    batch = torch.stack([colour.expand(*size, 3) for colour in colours])
    return torch.cat((batch, torch.full((*batch.shape[:3], channels - 3), 0.5)), -1)


def noise(seed, size=(8, 12)):
    """A picture whose values a PNG keeps."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*size, 3), generator=generator).float() / 255


@pytest.fixture
def run(pack):
    """Runs a node by the end of its id: run("Story", text="...") -> its outputs."""
    return lambda name, **inputs: pack.run(f"MiniGPT5{name}", **inputs).args


@pytest.fixture
def story(pack):
    """Two pages, the first with a picture."""
    sockets = pack.part("nodes.sockets")
    pages = (sockets.Page("Mia.", TEXT, noise(1)), sockets.Page("What happens next?", "She waits."))
    return sockets.StorySoFar("Mia the fox wakes up.", pages, seed=7)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "comfyui" / "output"


def contents(story):
    """What a story holds, to be compared."""
    pictures = [None if page.picture is None else page.picture.clone() for page in story.pages]
    return (
        story.prompt,
        story.seed,
        [(page.request, page.text) for page in story.pages],
        [None if picture is None else picture.tolist() for picture in pictures],
    )


def texts(story):
    return [page.text for page in story.pages]


# Story


def test_a_text_alone_is_an_opening_still_to_be_told(run):
    (story,) = run("Story", text=" Mia the fox.\n")
    assert (story.prompt, story.pages) == ("Mia the fox.", ())


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_a_story_without_an_opening_is_refused(run, text):
    with pytest.raises(ValueError, match="no opening.*Write how it begins"):
        run("Story", text=text)


def test_a_text_with_a_picture_is_a_page_already_told(run):
    (story,) = run("Story", text="Mia the fox.", image=image(RED))
    assert texts(story) == ["Mia the fox."]
    assert torch.equal(story.pages[0].picture, RED.expand(8, 12, 3))


def test_a_batch_of_pictures_is_a_page_each_with_the_text_on_the_first(run):
    (story,) = run("Story", text="Mia the fox.", image=image(RED, GREEN))
    assert texts(story) == ["Mia the fox.", ""]
    assert torch.equal(story.pages[1].picture, GREEN.expand(8, 12, 3))


@pytest.mark.parametrize("name", ["Story", "AddPicture"])
def test_white_stands_behind_what_is_half_transparent(run, story, name):
    given = {"text": "a"} if name == "Story" else {"story": story}
    (pictured,) = run(name, image=image(RED, channels=4), **given)
    assert torch.equal(pictured.pages[-1].picture, (0.5 * RED + 0.5).expand(8, 12, 3))


def test_a_text_after_an_earlier_story_is_its_next_page(run, story):
    before = contents(story)
    (longer,) = run("Story", text="Night falls.", earlier=story)
    assert (longer.prompt, longer.seed) == (story.prompt, 7)
    assert texts(longer) == [*texts(story), "Night falls."]
    assert longer.pages[-1].picture is None
    assert contents(story) == before


def test_a_grey_picture_is_kept_in_three_channels(pack, run):
    (pictured,) = run("Story", text="a", image=image(RED)[..., 1:2])
    assert pictured.pages[0].picture.shape == (8, 12, 3)
    pack.run("MiniGPT5ViewStory", story=pictured)


# Add Picture


def test_a_picture_goes_onto_the_last_page_and_the_story_before_stays_as_it_was(run, story):
    before = contents(story)
    (pictured,) = run("AddPicture", story=story, image=image(GREEN, RED))
    assert [page.note for page in pictured.pages] == ["", "2 pictures were drawn; the page has the first."]
    assert torch.equal(pictured.pages[1].picture, GREEN.expand(8, 12, 3))
    assert torch.equal(pictured.pages[0].picture, story.pages[0].picture)
    assert texts(pictured) == texts(story)
    assert contents(story) == before


@pytest.fixture
def several(pack):
    """A page of which its turn asked for three pictures, the last without a text of its own."""
    sockets = pack.part("nodes.sockets")
    page = sockets.Page(
        "Go on.", "It snows. It melts.", told=True, note="Careful.", parts=("It snows.", "It melts.", "")
    )
    return sockets.StorySoFar("Mia.", (sockets.Page("Mia.", "Mia wakes."), page))


def test_one_picture_of_several_has_the_turns_whole_text(run, several):
    (one,) = run("AddPicture", story=several, image=image(RED))
    assert texts(one) == ["Mia wakes.", "It snows. It melts."]


def test_every_picture_that_a_turn_asked_for_is_a_page_with_its_text(run, several):
    before, told = contents(several), several
    for colour in (RED, GREEN, RED):
        (told,) = run("AddPicture", story=told, image=image(colour))
    assert contents(several) == before
    assert texts(told) == ["Mia wakes.", "It snows.", "It melts.", ""]
    assert [page.request for page in told.pages] == ["Mia.", "Go on.", "", ""]
    assert [page.note for page in told.pages] == ["", "Careful.", "", ""]
    assert all(page.told for page in told.pages[1:])
    assert [page.picture[0, 0].tolist() for page in told.pages[1:]] == [c.tolist() for c in (RED, GREEN, RED)]


def test_the_last_picture_has_the_rest_of_the_text_and_one_more_takes_its_place(run, several, pack):
    (two,) = run(
        "AddPicture", story=run("AddPicture", story=several, image=image(RED))[0], image=image(GREEN, RED)
    )
    assert texts(two)[1:] == ["It snows.", "It melts."]
    assert two.pages[-1].note == "2 pictures were drawn; the page has the first."
    for colour in (RED, GREEN):
        (two,) = run("AddPicture", story=two, image=image(colour))
    assert texts(two)[1:] == ["It snows.", "It melts.", ""]
    assert torch.equal(two.pages[-1].picture[0, 0], GREEN)


def test_a_pages_only_picture_is_replaced(run, story):
    for colour in (RED, GREEN):
        (story,) = run("AddPicture", story=story, image=image(colour))
    assert len(story.pages) == 2 and torch.equal(story.pages[-1].picture[0, 0], GREEN)


def test_a_half_precision_picture_becomes_float32(run, story):
    (pictured,) = run("AddPicture", story=story, image=image(RED).half())
    assert pictured.pages[-1].picture.dtype == torch.float32


def test_a_picture_without_a_page_is_refused(run):
    (opening,) = run("Story", text="Mia.")
    with pytest.raises(ValueError, match="no page yet"):
        run("AddPicture", story=opening, image=image(RED))


def test_the_story_so_far_is_shown_with_the_newest_picture(pack, story, tmp_path):
    ui = pack.run("MiniGPT5AddPicture", story=story, image=image(GREEN)).ui
    files = [page["picture"] for page in ui["minigpt5_pages"]]
    assert len({file["filename"] for file in files}) == 2
    assert ui["images"] == [files[1]]
    assert ui["text"] == [f"{TEXT}\n\nShe waits."]
    shown = tmp_path / "comfyui" / "temp" / files[1]["filename"]
    assert Image.open(shown).getpixel((0, 0)) == (0, 255, 0)


# Story to Images and Text


def test_a_storys_parts_are_its_pictures_in_one_batch_and_its_texts(run, story):
    (whole,) = run("AddPicture", story=story, image=noise(2)[None])
    same, images, text, text_list = run("StoryParts", story=whole)
    assert same is whole
    assert torch.equal(images, torch.stack([noise(1), noise(2)]))
    assert text == f"{TEXT}\n\nShe waits."
    assert text_list == [TEXT, "She waits."]


def test_a_picture_of_another_size_is_scaled_to_the_first_ones(run, story):
    (whole,) = run("AddPicture", story=story, image=image(GREEN, size=(40, 20)))
    images = run("StoryParts", story=whole)[1]
    assert images.shape == (2, 8, 12, 3)
    assert torch.equal(images[0], noise(1))
    assert torch.allclose(images[1], GREEN.expand(8, 12, 3))


def test_a_story_without_pictures_gives_one_black_image(run, story):
    (opening,) = run("Story", text="Mia.")
    _, images, text, text_list = run("StoryParts", story=opening)
    assert images.shape == (1, 64, 64, 3)
    assert not images.any()
    assert (text, text_list) == ("", [])


def test_a_storys_pictures_come_out_where_comfyui_has_its_own(host, run, story, monkeypatch):
    monkeypatch.setattr(host("comfy.model_management"), "intermediate_device", lambda: torch.device("meta"))
    (opening,) = run("Story", text="Mia.")
    assert {run("StoryParts", story=one)[1].device.type for one in (story, opening)} == {"meta"}


# View Story


def test_a_viewed_story_is_passed_on_and_shown_page_by_page(host, pack, story, tmp_path):
    seen = pack.run("MiniGPT5ViewStory", hidden={"unique_id": "12"}, story=story)
    assert seen.args == (story,)
    first, second = seen.ui["minigpt5_pages"]
    assert (first["text"], second) == (TEXT, {"text": "She waits.", "picture": None})
    assert seen.ui["images"] == [first["picture"]]
    file = tmp_path / "comfyui" / first["picture"]["type"] / first["picture"]["filename"]
    assert torch.equal(torch.from_numpy(np.array(Image.open(file))) / 255, noise(1))


def test_what_comfyuis_own_widget_shows_is_no_html(host, pack, story):
    pack.run("MiniGPT5ViewStory", hidden={"unique_id": "12"}, story=story)
    escaped = "Mia’s “snow” &amp; &lt;b&gt;ice&lt;/b&gt;.\n\nShe waits."
    assert host("server").sent == [(escaped, "12", "browser")]


def test_the_same_picture_is_written_once(pack, story, tmp_path):
    for _ in range(2):
        pack.run("MiniGPT5ViewStory", story=story)
    assert len(list((tmp_path / "comfyui" / "temp").iterdir())) == 1


# Save Story and Load Story


def test_a_saved_story_comes_back_as_it_was(run, story, output):
    assert run("SaveStory", story=story) == (story,)
    (again,) = run("LoadStory", story_name="stories/story_00001_")
    assert (again.prompt, again.seed, texts(again)) == (story.prompt, 7, texts(story))
    assert torch.equal(again.pages[0].picture, story.pages[0].picture)
    assert again.pages[1].picture is None


def test_every_saved_story_gets_a_number_of_its_own(pack, story, output):
    for _ in range(2):
        pack.run("MiniGPT5SaveStory", story=story, filename_prefix="mine/tale")
    (chosen,) = pack.nodes["MiniGPT5LoadStory"].GET_SCHEMA().inputs
    assert sorted(chosen.options) == ["mine/tale_00001_", "mine/tale_00002_"]
    assert sorted(path.name for path in (output / "mine" / "tale_00002_").iterdir()) == [
        "scene_01.png",
        "story.html",
        "story.json",
        "story.md",
        "strip.png",
    ]


def test_a_saved_storys_pictures_are_shown_from_where_they_lie(pack, story, output):
    ui = pack.run("MiniGPT5SaveStory", story=story).ui
    place = {"filename": "scene_01.png", "subfolder": "stories/story_00001_", "type": "output"}
    assert ui["images"] == [place]
    assert (output / place["subfolder"] / place["filename"]).is_file()


def test_a_saved_picture_holds_the_workflow_unless_the_user_wants_none(host, pack, story, output):
    hidden = {"prompt": {"1": {"class_type": "A"}}, "extra_pnginfo": {"workflow": {"nodes": []}}}
    pack.run("MiniGPT5SaveStory", hidden=hidden, story=story)
    kept = Image.open(output / "stories" / "story_00001_" / "scene_01.png").text
    assert {name: json.loads(value) for name, value in kept.items()} == {
        "prompt": hidden["prompt"],
        "workflow": {"nodes": []},
    }
    host("comfy.cli_args").args.disable_metadata = True
    pack.run("MiniGPT5SaveStory", hidden=hidden, story=story)
    assert Image.open(output / "stories" / "story_00002_" / "scene_01.png").text == {}


@pytest.mark.parametrize("prefix", ["../outside", "a/../../outside/b", "/outside/b"])
def test_a_story_is_not_saved_outside_the_output_folder(run, story, tmp_path, prefix):
    with pytest.raises(ValueError, match="filename_prefix is .*under the output folder"):
        run("SaveStory", story=story, filename_prefix=prefix)
    assert not list(tmp_path.rglob("story.json"))


def write_story_json(folder: Path, picture=None):
    folder.mkdir(parents=True)
    scene = {"text": "Hello.", "picture": picture}
    values = {"format_version": 1, "prompt": "Mia.", "seed": 1, "scenes": [scene]}
    (folder / "story.json").write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize("name", ["../../outside", "inside/../../../outside", "", ".."])
def test_a_story_is_not_read_outside_the_output_and_input_folders(run, pack, output, tmp_path, name):
    write_story_json(tmp_path / "outside")
    write_story_json(output / "inside")
    assert "no saved story" in pack.nodes["MiniGPT5LoadStory"].validate_inputs(story_name=name)
    with pytest.raises(ValueError, match="no saved story"):
        run("LoadStory", story_name=name)
    with pytest.raises(ValueError, match="no saved story"):
        run("LoadStory", story_name=str(tmp_path / "outside"))


def test_a_storys_pictures_are_not_read_from_elsewhere(run, output):
    write_story_json(output / "bad", picture="../../secret.png")
    with pytest.raises(ValueError, match="beside story.json"):
        run("LoadStory", story_name="bad")


def test_stories_of_the_input_folder_are_offered_too(pack, run, output, tmp_path):
    write_story_json(tmp_path / "comfyui" / "input" / "given")
    write_story_json(output / "a" / "b" / "c")
    (chosen,) = pack.nodes["MiniGPT5LoadStory"].GET_SCHEMA().inputs
    assert sorted(chosen.options) == ["a/b/c", "given"]
    assert texts(run("LoadStory", story_name="given")[0]) == ["Hello."]


def test_the_newest_story_is_offered_first(pack, output):
    for name, saved_at in (("a", 30), ("b", 10), ("c", 20)):
        write_story_json(output / name)
        os.utime(output / name / "story.json", (saved_at, saved_at))
    assert pack.nodes["MiniGPT5LoadStory"].GET_SCHEMA().inputs[0].options == ["a", "c", "b"]


def test_a_story_in_a_linked_folder_is_offered_and_read(pack, run, story, output, tmp_path):
    (tmp_path / "disk").mkdir()
    output.mkdir(parents=True)
    (output / "stories").symlink_to(tmp_path / "disk", target_is_directory=True)
    run("SaveStory", story=story)
    (name,) = pack.nodes["MiniGPT5LoadStory"].GET_SCHEMA().inputs[0].options
    assert texts(run("LoadStory", story_name=name)[0]) == texts(story)


def test_a_story_that_was_changed_on_the_disk_has_another_fingerprint(pack, output):
    write_story_json(output / "mine")
    fingerprint = pack.nodes["MiniGPT5LoadStory"].fingerprint_inputs
    first = fingerprint(story_name="mine")
    assert fingerprint(story_name="mine") == first
    (output / "mine" / "story.json").write_text("{}", encoding="utf-8")
    assert fingerprint(story_name="mine") != first
