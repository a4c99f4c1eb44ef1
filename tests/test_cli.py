"""The command line against a stand-in for the pipeline that tells without any model."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from minigpt5_core.cli import main
from minigpt5_core.errors import BadInputError, CancelledError
from minigpt5_core.story import Story, load_story
from minigpt5_core.story.pages import read_pictures
from minigpt5_core.story.presets import PRESETS

ROOT = Path(__file__).parents[1]
PROMPT = """Mia's friend said: "Don't pay $5!" """


@dataclass(frozen=True)
class Parts:
    llm: Path | None = None
    adapter: Path | None = None
    mapper: Path | None = None
    diffusion: Path | None = None
    device: str | None = None
    image_adapter: Path | None = None
    llm_precision: str = "float32"
    diffusion_precision: str = "float32"


@dataclass
class ToldScene:
    text: str
    picture: Image.Image | None
    dropped: tuple[int, ...] = ()


class Teller:
    """Tells "Scene 1." and so on, with pictures whose red is the scene's number; `trouble` comes after two."""

    def __init__(self, parts: Parts, on_progress: Callable[[str, int, int], None]) -> None:
        self.parts, self.on_progress = parts, on_progress
        self.trouble: BaseException | None = None
        self.settings: dict = {}
        self.draws = True
        on_progress("loading", 1, 1)

    def unknown_words(self, prompt: str) -> list[str]:
        return [word for word in ("dragon", "castle") if word in prompt]

    def tell(self, story: Story, scenes: int, **settings: float) -> Iterator[ToldScene]:
        self.settings = settings
        for told in range(scenes):
            if self.trouble and told == 2:
                raise self.trouble
            number = len(story.scenes) + told + 1
            self.on_progress("writing", 3, 50)
            self.on_progress("drawing", 1, 2)
            self.on_progress("drawing", 2, 2)
            picture = Image.new("RGB", (8, 8), (number, story.seed % 256, 0)) if self.draws else None
            yield ToldScene(f"Scene {number}.", picture, tuple(range(2, number - 2)))


class Pipeline(ModuleType):
    """Stands in for minigpt5_core.pipeline."""

    def __init__(self) -> None:
        super().__init__("minigpt5_core.pipeline")
        self.Parts = Parts
        self.tellers: list[Teller] = []
        self.trouble: BaseException | None = None
        self.draws = True

    def load(self, parts: Parts, on_progress: Callable[[str, int, int], None]) -> Teller:
        self.tellers.append(Teller(parts, on_progress))
        self.tellers[-1].trouble, self.tellers[-1].draws = self.trouble, self.draws
        return self.tellers[-1]


@pytest.fixture(autouse=True)
def pipeline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pipeline:
    stand_in = Pipeline()
    monkeypatch.setitem(sys.modules, "minigpt5_core.pipeline", stand_in)
    monkeypatch.chdir(tmp_path)
    return stand_in


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_prompt_becomes_a_story_and_the_last_line_says_where(capsys: pytest.CaptureFixture) -> None:
    assert main([PROMPT, "--scenes", "2", "--seed", "7"]) == 0
    story = load_story(Path("story"))
    assert (story.prompt, story.seed) == (PROMPT.strip(), 7)
    assert [(scene.text, scene.picture) for scene in story.scenes] == [
        ("Scene 1.", "scene_01.png"),
        ("Scene 2.", "scene_02.png"),
    ]
    assert capsys.readouterr().out.splitlines()[-1] == f"Open {Path('story/story.html')}"


def test_four_scenes_with_seed_0_are_the_default() -> None:
    assert main(["Mia", "--out", "mine"]) == 0
    story = load_story(Path("mine"))
    assert (len(story.scenes), story.seed) == (4, 0)


def test_the_same_command_writes_the_same_bytes() -> None:
    for name in ("a", "b"):
        main(["Mia", "--scenes", "3", "--out", name])
    assert contents(Path("a")) == contents(Path("b"))


def test_a_story_goes_on_in_its_own_folder(pipeline: Pipeline) -> None:
    main(["Mia", "--scenes", "2", "--seed", "7"])
    before = contents(Path("story"))
    assert main(["--continue", "story/story.json", "--scenes", "1"]) == 0
    story = load_story(Path("story"))
    assert [scene.text for scene in story.scenes] == ["Scene 1.", "Scene 2.", "Scene 3."]
    assert (story.prompt, story.seed) == ("Mia", 7)
    assert contents(Path("story"))["scene_02.png"] == before["scene_02.png"]


def test_a_story_without_pictures_is_told_and_goes_on(pipeline: Pipeline) -> None:
    pipeline.draws = False
    assert main(["Mia", "--scenes", "2"]) == 0
    assert main(["--continue", "story", "--scenes", "1"]) == 0
    assert [scene.picture for scene in load_story(Path("story")).scenes] == [None] * 3
    assert sorted(contents(Path("story"))) == ["story.html", "story.json", "story.md", "strip.png"]


def test_a_story_goes_on_elsewhere_and_the_first_stays() -> None:
    main(["Mia", "--scenes", "1"])
    before = contents(Path("story"))
    assert main(["--continue", "story", "--scenes", "1", "--out", "longer"]) == 0
    assert contents(Path("story")) == before
    assert len(load_story(Path("longer")).scenes) == 2


def test_parts_and_settings_reach_the_pipeline(pipeline: Pipeline) -> None:
    arguments = "--llm L --adapter A --mapper M --diffusion D --device cpu --steps 5 --guidance 2.5"
    main(["Mia", "--scenes", "1", *arguments.split(), "--diffusion-precision", "bf16"])
    parts = Parts(Path("L"), Path("A"), Path("M"), Path("D"), "cpu", diffusion_precision="bf16")
    assert pipeline.tellers[0].parts == parts
    assert pipeline.tellers[0].settings == {
        "steps": 5, "guidance": 2.5, "pictures": (), "preset": PRESETS["default"]
    }  # fmt: skip


def test_how_the_llm_is_held_reaches_the_pipeline(pipeline: Pipeline, capsys: pytest.CaptureFixture) -> None:
    main(["Mia", "--scenes", "1", "--llm", "small.gguf", "--llm-precision", "bf16"])
    assert pipeline.tellers[0].parts == Parts(Path("small.gguf"), llm_precision="bf16")
    with pytest.raises(SystemExit):
        main(["Mia", "--llm-precision", "8bit"])
    assert "4bit" in capsys.readouterr().err


def test_settings_nobody_gave_are_left_to_the_pipeline(pipeline: Pipeline) -> None:
    main(["Mia", "--scenes", "1"])
    assert pipeline.tellers[0].parts == Parts()
    assert pipeline.tellers[0].settings == {"pictures": (), "preset": PRESETS["storybook"]}


def test_a_preset_can_be_named_and_one_that_draws_a_caption_tells_one_scene(
    pipeline: Pipeline, capsys: pytest.CaptureFixture
) -> None:
    assert main(["A dog.", "--preset", "published_cc3m", "--out", "one"]) == 0
    assert pipeline.tellers[0].settings["preset"] is PRESETS["published_cc3m"]
    assert len(load_story(Path("one")).scenes) == 1
    assert main(["A dog.", "--preset", "published_cc3m", "--scenes", "2"]) == 2
    assert "--scenes is 2, but the preset published_cc3m draws one caption" in capsys.readouterr().err


def test_words_the_storybook_cannot_draw_are_named(capsys: pytest.CaptureFixture) -> None:
    assert main(["A dragon in a castle", "--scenes", "1"]) == 0
    assert "cannot draw these words: dragon, castle." in capsys.readouterr().out


def test_scenes_that_no_longer_fit_the_context_are_named(capsys: pytest.CaptureFixture) -> None:
    main(["Mia", "--scenes", "6"])
    printed = capsys.readouterr().out
    assert "scene 2 was left out" in printed and "scenes 2, 3 were left out" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "The prompt is empty"),
        (["  "], "The prompt is empty"),
        (["Mia", "--scenes", "0"], "--scenes is 0; expected at least 1"),
        (["Mia", "--scenes", "-3"], "--scenes is -3"),
        (["Mia", "--steps", "0"], "--steps is 0"),
        (["Mia", "--guidance", "nan"], "--guidance is nan"),
        (["Mia", "--seed", "-1"], "seed is -1"),
        (["Mia", "--out", "file"], "file is not a folder"),
        (["Mia", "--out", "file/story"], "file is not a folder"),
        (["Mia", "--out", "s" * 300], "too long"),
        (["Mia", "--out", "full"], "it holds letter.txt"),
        (["--continue", "none.json"], "Cannot read none.json"),
        (["--continue", "file"], "file: The story is not valid JSON"),
        (["Mia", "--continue", "file"], "leave PROMPT and --seed out"),
        (["\udcff"], "not valid Unicode"),
    ],
)
def test_bad_input_is_said_plainly_before_anything_is_loaded(
    arguments: list[str], words: str, pipeline: Pipeline, capsys: pytest.CaptureFixture
) -> None:
    Path("file").write_text("mine")
    Path("full").mkdir()
    Path("full/letter.txt").write_text("mine")
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
    assert not pipeline.tellers
    assert sorted(path.name for path in Path().iterdir()) == ["file", "full"]


@pytest.mark.parametrize(
    "arguments", [["Mia", "--scenes", "many"], ["Mia", "--colour", "red"], ["Mia", "the", "fox"]]
)
def test_arguments_that_cannot_be_read_are_bad_input_too(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize(("trouble", "code"), [(KeyboardInterrupt(), 130), (CancelledError(), 130)])
def test_what_was_told_is_saved_when_someone_interrupts(
    trouble: BaseException, code: int, pipeline: Pipeline, capsys: pytest.CaptureFixture
) -> None:
    pipeline.trouble = trouble
    assert main(["Mia"]) == code
    assert len(load_story(Path("story")).scenes) == 2
    printed = capsys.readouterr()
    assert "Open " in printed.out and "Interrupted" in printed.err


def test_every_scene_is_on_the_disk_before_the_next_one_is_told(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def tell(teller: Teller, story: Story, scenes: int, **settings: float) -> Iterator[ToldScene]:
        for scene in told(teller, story, scenes, **settings):
            yield scene
            saved = load_story(Path("story"))
            pictures = [picture for picture in read_pictures(saved, Path("story")) if picture]
            seen.append((len(saved.scenes), len(pictures)))

    told = Teller.tell
    monkeypatch.setattr(Teller, "tell", tell)
    assert main(["Mia", "--scenes", "3"]) == 0
    assert seen == [(1, 1), (2, 2), (3, 3)]
    assert main(["--continue", "story", "--scenes", "2"]) == 0
    assert seen[3:] == [(4, 4), (5, 5)]
    assert not [path.name for path in Path("story").iterdir() if path.name.endswith(".part")]


def test_a_story_that_was_killed_goes_on_and_is_replaced(pipeline: Pipeline) -> None:
    assert main(["Mia", "--scenes", "2"]) == 0
    (Path("story") / ".scene_03.png.part").write_bytes(b"half")
    assert main(["--continue", "story", "--scenes", "1"]) == 0
    assert len(load_story(Path("story")).scenes) == 3
    assert not (Path("story") / ".scene_03.png.part").exists()
    Path("story").rename(".story.17.old")
    assert main(["--continue", "story", "--scenes", "1"]) == 0
    assert len(load_story(Path("story")).scenes) == 4
    assert not Path(".story.17.old").exists()


def test_what_was_told_is_saved_when_the_pipeline_refuses_to_go_on(pipeline: Pipeline) -> None:
    pipeline.trouble = BadInputError("too long")
    assert main(["Mia"]) == 2
    assert len(load_story(Path("story")).scenes) == 2


def test_nothing_is_written_when_nothing_was_told(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "load", interrupt)
    assert main(["Mia"]) == 130
    assert not list(Path().iterdir())


def test_a_prompt_may_begin_with_a_dash() -> None:
    assert main(["--scenes", "1", "--", "-- Mia --"]) == 0
    assert load_story(Path("story")).prompt == "-- Mia --"


def test_get_llm_says_where_the_model_is(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    assert main(["get-llm", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"The language model is in {tmp_path}\n"


def test_get_llm_into_a_folder_of_other_things_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    assert main(["get-llm", str(tmp_path)]) == 2


@pytest.mark.parametrize("arguments", [["--help"], ["get-llm", "--help"], [""]])
def test_an_answer_that_needs_no_model_imports_none(arguments: list[str]) -> None:
    code = (
        "import sys; from minigpt5_core.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'diffusers', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1] == "[]"


def test_help_answers_without_importing_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "minigpt5_core", "--help"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert b"get-llm" in run.stdout
    assert b"torch" not in run.stderr  # which takes seconds: without it, help comes at once
