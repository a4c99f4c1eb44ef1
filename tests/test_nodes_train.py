"""Train Voken Mapper on stand-ins: what is asked of LLM and CLIP, what is saved where, Cancel, and what is refused."""

from types import SimpleNamespace

import pytest
import torch

from minigpt5_core.conditioning.mapper_file import load_mapper
from minigpt5_core.story.captioned import read_captioned
from minigpt5_core.story.states import read_voken_states
from tests.elsewhere import Elsewhere

NODE = "MiniGPT5TrainMapper"
FEW = {"steps": 3, "batch": 4, "scenes": 6}
TEXTS = """a fox in the snow by day
a bear at night

Mia the fox wakes up. | a fox in the snow by day
She runs. | a fox on the beach by day
"""


class Cancelled(BaseException):
    """What ComfyUI raises once the user has pressed Cancel; none of Exception's, as there."""


class Clip:
    """A text encoder as ComfyUI answers for it: `lengths` says how many tokens a text gets."""

    def __init__(self, width=6, pooled=5, lengths=lambda text: 4, **extra):
        self.width, self.pooled, self.lengths, self.extra = width, pooled, lengths, extra
        self.asked = []

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, tokens):
        self.asked.append(tokens)
        seed = torch.Generator().manual_seed(sum(tokens.encode()))
        pooled = self.pooled and torch.randn(1, self.pooled, generator=seed)
        answer = torch.randn(1, self.lengths(tokens), self.width, generator=seed)
        return [[answer, {"pooled_output": pooled, **self.extra}]]


@pytest.fixture
def models(tmp_path, tiny_llm_folder):
    folder = tmp_path / "comfyui" / "models"
    (folder / "LLM").mkdir(parents=True)
    (folder / "LLM" / "tiny").symlink_to(tiny_llm_folder, target_is_directory=True)
    return folder


@pytest.fixture
def mappers(models):
    return models / "voken_mappers"


@pytest.fixture
def llm(pack, models):
    return pack.run("MiniGPT5LoadLLM", llm_name="tiny").args[0]


@pytest.fixture
def train(pack, llm):
    """train(clip, texts, ...) -> (MAPPER, LOSS_MAP, steps), as ComfyUI runs it: in inference mode."""

    def run(clip=None, texts=TEXTS, llm=llm, **inputs):
        with torch.inference_mode():
            given = {"llm": llm, "clip": clip or Clip(), "texts": texts, **FEW, **inputs}
            return pack.run(NODE, {"unique_id": "7"}, **given).args

    return run


def said(pack, **inputs):
    """What validation says of widgets."""
    return pack.nodes[NODE].validate_inputs(**inputs)


# What comes out


def test_a_mapper_comes_out_and_is_saved_with_what_it_belongs_to(train, mappers, llm):
    mapper, losses, steps = train(style="watercolor of {caption}", name="mine", seed=3)
    assert steps == 3 and len(losses["loss"]) == 3
    assert mapper.name == "mine.safetensors"
    loaded, header = load_mapper(mappers / "mine.safetensors")
    assert (header.llm_id, header.llm_width, header.llm_hash) == ("tiny", 32, llm.weights_hash)
    assert str(header.space) == "text_6_5 (4 x 6 with a pooled vector of 5)"
    assert header.trained == {
        "stage": "mapper in ComfyUI", "steps": 3, "seed": 3, "data": "texts", "style": "watercolor of {caption}",
        "scenes": 4,
    }  # fmt: skip
    states = torch.randn(1, 8, 32)
    assert torch.equal(loaded(states).tokens, mapper.mapper(states).tokens)
    assert loaded(states).pooled.shape == (1, 5)


def test_it_draws_in_the_graph_at_once(train, pack):
    mapper = train()[0]
    vokens = pack.part("nodes.sockets").Vokens(torch.randn(1, 8, 32), "tiny", mapper.header.llm_hash)
    ((tokens, extra),) = pack.run("MiniGPT5VokensToConditioning", vokens=vokens, mapper=mapper).args[0]
    assert tokens.shape == (1, 4, 6) and extra["pooled_output"].shape == (1, 5)


def test_a_family_that_takes_no_pooled_vector_gets_none(train):
    assert str(train(Clip(width=768, pooled=768))[0].header.space) == "sd15 (4 x 768)"


def test_clip_is_asked_once_a_caption_in_the_style_and_for_the_empty_text_without(train):
    clip = Clip()
    train(clip, style="{caption}, soft {light}")
    captions = ["a fox in the snow by day", "a bear at night", "a fox on the beach by day"]
    assert clip.asked == ["", *(f"{caption}, soft {{light}}" for caption in captions)]


def test_the_llm_is_loaded_and_then_let_go_before_the_fitting(train, llm, host):
    management = host("comfy.model_management")
    train()
    assert [load["models"] for load in management.loads] == [llm.patchers]
    assert len(management.freed) == 1 and management.freed[0] > 0


def test_the_states_are_those_that_the_llm_has_in_a_story(train, pack, llm, monkeypatch):
    fit, given = pack.part("minigpt5_core.conditioning.fit"), []
    plain = fit.fit_mapper

    def listen(states, targets, *others, rows, **more):
        given.append((states, rows, targets.rows(rows).tokens))
        return plain(states, targets, *others, rows=rows, **more)

    monkeypatch.setattr(fit, "fit_mapper", listen)
    clip = Clip()
    train(clip)
    states, rows, tokens = given[0]
    stories = list(read_captioned(TEXTS.splitlines()))
    found = dict(read_voken_states(llm.frozen, stories))
    assert torch.allclose(states.float(), torch.cat([found[0], found[1], found[2]]), atol=1e-2)
    assert rows == [0, 1, 0, 2]
    assert torch.allclose(
        tokens[3], clip.encode_from_tokens_scheduled("a fox on the beach by day")[0][0][0], atol=1e-2
    )


def test_the_host_knows_that_it_trains_and_only_then(train, host, monkeypatch, pack):
    management, seen = host("comfy.model_management"), []
    monkeypatch.setattr(management, "in_training", False, raising=False)
    fit = pack.part("minigpt5_core.conditioning.fit")
    plain = fit.fit_mapper

    def listen(*given, **more):
        seen.append((management.in_training, torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        return plain(*given, **more)

    monkeypatch.setattr(fit, "fit_mapper", listen)
    train()
    assert seen == [(True, False, True)]
    assert management.in_training is False
    monkeypatch.setattr(fit, "fit_mapper", lambda *given, **more: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train()
    assert management.in_training is False


def test_the_same_inputs_give_the_same_mapper(train, mappers):
    train(name="a")
    train(name="b")
    train(name="c", seed=2**64 - 1)
    contents = [(mappers / f"{name}.safetensors").read_bytes() for name in "abc"]
    assert contents[0] == contents[1] != contents[2]


def test_an_earlier_mapper_goes_on_and_its_steps_are_counted(train, mappers):
    first = train(name="first")[0]
    before = (mappers / "first.safetensors").read_bytes()
    mapper, losses, steps = train(name="second", mapper=first)
    assert steps == 6 and len(losses["loss"]) == 3
    assert mapper.header.trained["steps"] == 6
    assert (mappers / "first.safetensors").read_bytes() == before


def test_progress_counts_stories_captions_and_steps_and_shows_the_loss(train, host):
    ticks = []
    host("comfy.utils").set_progress_bar_global_hook(
        lambda value, total, *_, **__: ticks.append((value, total))
    )
    host("server").sent.clear()
    train()
    assert ticks == [(number, 9) for number in range(1, 10)]  # 3 stories, 3 captions, 3 steps
    text, node, _ = host("server").sent[-1]
    assert node == "7"
    assert text.startswith("3 steps, loss ") and "Saved as models/voken_mappers/my_mapper.safetensors" in text


# Cancel


def cancel_at(host, tick):
    def hook(value, total, *_, **__):
        if value == tick:
            raise Cancelled

    host("comfy.utils").set_progress_bar_global_hook(hook)


@pytest.mark.parametrize("tick", range(1, 10))
def test_cancel_at_any_moment_keeps_what_was_learned_and_says_so(train, host, mappers, tick):
    cancel_at(host, tick)
    host("server").sent.clear()
    with pytest.raises(Cancelled):
        train()
    learned = tick - 6  # behind 3 stories and 3 captions
    if learned < 1:
        assert not mappers.exists() or not list(mappers.iterdir())
        return
    (file,) = mappers.iterdir()
    assert load_mapper(file)[1].trained["steps"] == learned
    assert f"Stopped after {learned} of 3 steps" in host("server").sent[-1][0]


def test_cancel_is_heard_between_the_ticks_of_a_long_bar(train, host, mappers):
    """ComfyUI's bar looks at every 200th part of its length only."""
    management = host("comfy.model_management")

    def hook(value, *_, **__):
        if value == 8:
            management.interrupted.append(True)

    host("comfy.utils").set_progress_bar_global_hook(hook)
    with pytest.raises(management.InterruptProcessingException):
        train()
    (file,) = mappers.iterdir()
    assert load_mapper(file)[1].trained["steps"] == 2


# Files


def test_nothing_is_written_over(train, mappers):
    names = [train(name="mine")[0].name for _ in range(3)]
    assert names == ["mine.safetensors", "mine_2.safetensors", "mine_3.safetensors"]
    assert len({(mappers / name).read_bytes() for name in names}) == 1


def test_the_storybooks_own_mapper_is_not_hidden_by_one_of_its_name(train):
    assert train(name="storybook.safetensors")[0].name == "storybook_2.safetensors"


@pytest.mark.parametrize(
    "name", ["", " ", "a/b", "..", "../x", "a\\b", "/etc/x", "C:x", ".hidden", "x" * 101, "a\nb", "a?", "a."]
)
def test_a_name_that_is_no_plain_name_is_refused(pack, train, name):
    assert "name" in said(pack, name=name)
    with pytest.raises(ValueError, match="name"):
        train(name=name)


@pytest.mark.parametrize("name", ["mine", "mine.safetensors", "my mapper 2.1"])
def test_a_plain_name_is_taken(pack, name):
    assert said(pack, name=name) is True


def test_on_a_full_disk_the_mapper_lives_on_in_the_graph(train, pack, host, monkeypatch, mappers):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack.part("minigpt5_core.conditioning.mapper_file"), "atomic_save", full)
    mapper = train()[0]
    assert mapper.mapper(torch.randn(1, 8, 32)).tokens.shape == (1, 4, 6)
    assert "could NOT be saved" in host("server").sent[-1][0]
    assert not mappers.exists() or not list(mappers.iterdir())


def test_answers_that_find_no_room_are_refused_with_where(train, pack, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack.part("minigpt5_core.conditioning.fit").Targets, "add", full)
    with pytest.raises(ValueError, match="cannot be kept in .*temp: No space left on device.*scenes lower"):
        train()


# Texts


def test_empty_texts_are_the_storybooks_own(train):
    clip = Clip()
    mapper = train(clip, texts=" \n")[0]
    assert mapper.header.trained["data"] == "storybook"
    assert all(caption.startswith("a ") for caption in clip.asked[1:])


def test_a_file_in_the_input_folder_is_read_by_its_name(train, pack, tmp_path):
    folder = tmp_path / "comfyui" / "input"
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text(TEXTS, encoding="utf-8")
    clip = Clip()
    train(clip, texts="mine.txt")
    assert len(clip.asked) == 4
    assert said(pack, texts="mine.txt") is True
    before = pack.nodes[NODE].fingerprint_inputs(texts="mine.txt")
    (folder / "mine.txt").write_text(TEXTS + "a cat", encoding="utf-8")
    assert pack.nodes[NODE].fingerprint_inputs(texts="mine.txt") != before


@pytest.mark.parametrize("texts", ["../secret.txt", "/etc/passwd.txt", "http://x/y.txt", "none.txt"])
def test_a_file_elsewhere_is_refused(pack, train, texts):
    assert "texts" in said(pack, texts=texts)
    with pytest.raises(ValueError, match="texts"):
        train(texts=texts)


@pytest.mark.parametrize(
    "texts", ["Mia wakes up. |", "\n\n{}".replace("{}", '{"items": [{"text": "Mia."}]}')]
)
def test_texts_without_a_caption_are_refused(train, texts):
    with pytest.raises(ValueError, match="hold no caption.*text | caption"):
        train(texts=texts)


def test_an_empty_file_is_refused(train, tmp_path):
    (tmp_path / "comfyui" / "input").mkdir(parents=True)
    (tmp_path / "comfyui" / "input" / "none.txt").touch()
    with pytest.raises(ValueError, match="hold no caption"):
        train(texts="none.txt")


def test_of_many_lines_no_more_are_read_than_asked_for(train, pack, monkeypatch):
    read = []

    def lines(path):
        for number in range(100_000):
            read.append(number)
            yield f"a fox in room {number}"

    monkeypatch.setattr(pack.part("minigpt5_core.story.captioned"), "open_captioned", lines)
    clip = Clip()
    train(clip, texts="", scenes=5)
    assert len(read) == 5 and len(clip.asked) == 6


def test_texts_longer_than_the_llm_reads_are_refused(train):
    with pytest.raises(ValueError, match="Not one of the texts fits into what tiny can read, 4096 tokens"):
        train(texts="x" * 5000)


def test_a_clip_that_stays_on_the_gpu_is_learned_from(train, monkeypatch):
    plain = Clip.encode_from_tokens_scheduled

    def answer(self, tokens):
        ((tokens, extra),) = plain(self, tokens)
        return [
            [tokens.as_subclass(Elsewhere), {"pooled_output": extra["pooled_output"].as_subclass(Elsewhere)}]
        ]

    monkeypatch.setattr(Clip, "encode_from_tokens_scheduled", answer)
    assert train()


@pytest.mark.parametrize("style", ["", "watercolor", "{Caption}"])
def test_a_style_without_a_place_for_the_caption_is_refused(pack, train, style):
    assert "without {caption}" in said(pack, style=style)
    with pytest.raises(ValueError, match="without {caption}"):
        train(style=style)


def test_widgets_that_come_by_links_are_not_judged_before_they_are_there(pack):
    assert said(pack) is True


# CLIPs


def test_a_checkpoint_without_a_text_encoder_is_refused(pack, llm):
    with pytest.raises(ValueError, match="brings no text encoder"):
        pack.run(NODE, llm=llm, clip=None, texts=TEXTS, **FEW)


def test_a_clip_of_another_family_than_the_mapper_is_refused_before_the_llm_reads(train, host):
    mapper = train()[0]
    loads = host("comfy.model_management").loads
    before = len(loads)
    with pytest.raises(ValueError, match="width 6 where 768 is needed"):
        train(Clip(width=768, pooled=768), mapper=mapper)
    assert len(loads) == before


def test_an_encoder_whose_answers_are_as_long_as_the_text_is_not_supported(train):
    clip = Clip(lengths=lambda text: 1 + len(text.split()))
    with pytest.raises(
        ValueError, match=r"other numbers of tokens than to an empty text \(1\).*not supported"
    ):
        train(clip)
    assert len(clip.asked) == 4


def test_it_is_noticed_before_all_captions_are_encoded(train):
    clip = Clip(lengths=lambda text: 1 + len(text.split()))
    with pytest.raises(ValueError, match="not supported"):
        train(clip, texts="", scenes=500)
    assert len(clip.asked) < 20


def test_captions_that_are_too_long_are_left_out_and_counted(train, caplog):
    clip = Clip(lengths=lambda text: 8 if "beach" in text else 4)
    mapper = train(clip)[0]
    assert mapper.header.trained["scenes"] == 3
    assert "1 captions are longer" in caplog.text


def test_answers_with_more_than_tokens_and_a_pooled_vector_are_not_supported(train):
    with pytest.raises(ValueError, match="attention_mask.*not supported"):
        train(Clip(attention_mask=torch.ones(1, 4)))


# Against a MODEL


@pytest.mark.parametrize(
    ("config", "channels", "fits"),
    [
        (
            {"context_dim": 6, "adm_in_channels": None},
            4,
            True,
        ),  # takes no pooled vector: one too many does no harm
        ({"context_dim": 6, "adm_in_channels": 5}, 16, True),
        ({"context_dim": 6, "adm_in_channels": 7}, 4, False),
        ({"context_dim": 8, "adm_in_channels": 5}, 4, False),
    ],
)
def test_a_space_of_no_known_family_fits_the_models_of_its_width(train, pack, config, channels, fits):
    mapper = train()[0]
    latents = SimpleNamespace(latent_channels=channels)
    model = SimpleNamespace(
        model=SimpleNamespace(model_config=SimpleNamespace(unet_config=config)),
        get_model_object={"latent_format": latents}.__getitem__,
    )
    check = pack.part("nodes.conditioning").check_model
    if fits:
        check(model, mapper)
        return
    with pytest.raises(ValueError, match="Load the checkpoint whose CLIP it was trained with"):
        check(model, mapper)
