"""Every family of LLMs passes one battery, on tiny random models of transformers' own classes (`TOYS`).

The table of what passed is tests/families.md; a test holds each family's line against what ran.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import BitsAndBytesConfig

from minigpt5_core import versions
from minigpt5_core.errors import BadInputError
from minigpt5_core.generate import Sampling, StoryCache, embed_prompt, generate
from minigpt5_core.llm import FrozenLLM, load_adapter, load_llm, load_vision
from minigpt5_core.llm.families import FAMILIES, OLDEST, SINCE
from minigpt5_core.llm.families.base import Family, features, placed, stack_positions
from minigpt5_core.pipeline import Parts, load
from minigpt5_core.story import Story
from minigpt5_core.story.presets import Preset
from minigpt5_core.story.prompts import Turn, chat_prompt, chat_text
from minigpt5_core.versions import has_transformers
from minigpt5_core.vokens import gather_voken_states
from tests.family_toys import SIDE, TOYS
from tests.stages import train_align, train_finetune
from trainer.common.recipe import make_recipe
from trainer.llm.adapters import save_adapter, trainable, with_prefix
from trainer.llm.sequences import StorySequence, story_losses, story_sequence
from trainer.stages.align import AlignRecipe
from trainer.stages.finetune import FinetuneRecipe

pytestmark = pytest.mark.filterwarnings("ignore")
TABLE = Path(__file__).with_name("families.md")
CHECKS: dict[str, bool] = {}  # whether a check is about pictures
OUTCOMES: dict[tuple[str, str], str] = {}  # of the checks that ran, by family and check


def check(name: str, pictures: bool = False) -> Callable:
    """A test of the battery, whose outcome the table is held against."""
    CHECKS[name] = pictures

    def marked(test: Callable) -> Callable:
        @wraps(test)
        def run(*arguments: Any, **named: Any) -> None:
            if pictures and TOYS[named["kind"]].processor is None:
                pytest.skip("a text-only LLM")
            cell = named["kind"], name
            OUTCOMES[cell] = "failed"
            try:
                test(*arguments, **named)
            except pytest.skip.Exception:  # a package that is not installed
                del OUTCOMES[cell]
                raise
            OUTCOMES[cell] = "passed"

        return run

    return marked


@pytest.fixture(scope="module", params=TOYS)
def kind(request):
    since = SINCE.get(request.param, OLDEST)
    if not has_transformers(since):
        pytest.skip(f"{request.param} needs transformers {since}")
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tiny_tokenizer, tmp_path_factory):
    """A tiny random model of the family, as a Hugging Face folder."""
    toy = TOYS[kind]
    tokenizer = tiny_tokenizer(["<|im_start|>", *toy.tokens])
    tokenizer.chat_template = toy.template
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192,
        "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    torch.manual_seed(0)
    config = toy.config(tokenizer, text)
    model = FAMILIES.get(kind, Family).model_class.from_config(config)
    for (
        parameter
    ) in model.parameters():  # so large that choices differ from token to token, and pictures matter
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    path = tmp_path_factory.mktemp(kind) / kind
    for part in (model, tokenizer, *([toy.processor()] if toy.processor else [])):
        part.save_pretrained(path)
    return path


@pytest.fixture
def llm(folder):
    return load_llm(folder)


def picture(seed: int, height: int = SIDE, width: int = SIDE) -> torch.Tensor:
    """(H, W, 3) of whole 255ths, as a file's are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (height, width, 3), generator=generator).float() / 255


def turns_with(llm, *seeds: int, open_end: bool = True) -> list[Turn]:
    """A story whose scenes show these pictures."""
    told = [
        Turn(
            f"Scene {seed}?",
            f"Mia{'a' * seed} wakes.",
            picture=seed % 2 == 0,
            image_tokens=llm.see(picture(seed)),
        )
        for seed in seeds
    ]
    return [*told, Turn("And then?")] if open_end else told


def library_inputs(kind: str, llm, ids: list[int], seeds: tuple[int, ...]) -> dict[str, Any]:
    """The same story as the library's own forward takes it; pixels by transformers' own image processor."""
    if not seeds or TOYS[kind].processor is None:
        return {"input_ids": torch.tensor([ids])}
    slot, image = llm.picture_id, llm.tokenizer.convert_tokens_to_ids(TOYS[kind].tokens[0])
    tokens = torch.tensor([[image if token == slot else token for token in ids]])
    images = [(picture(seed) * 255).round().to(torch.uint8).numpy() for seed in seeds]
    inputs = {"input_ids": tokens, **pixels_of(kind, images)}
    if "image_grid_thw" in inputs and has_transformers("5"):
        inputs["mm_token_type_ids"] = (tokens == image).int()
    return inputs


def pixels_of(kind: str, images: list) -> dict[str, torch.Tensor]:
    made = TOYS[kind].processor()(images, return_tensors="pt", input_data_format="channels_last")
    return {name: value for name, value in made.items() if "mask" not in name}


@check("voken rows move no other logit")
@torch.no_grad()
def test_voken_rows_move_no_other_logit(kind, folder, llm):
    ids = chat_prompt(llm, turns_with(llm, 1)).spread
    inputs = library_inputs(kind, llm, ids, (1,))
    plain = llm.family.model_class.from_pretrained(folder).eval()
    before, after = plain(**inputs).logits, llm.causal_lm(**inputs).logits
    rows = plain.get_input_embeddings().num_embeddings
    assert before.shape[-1] == rows and after.shape[-1] > rows
    assert torch.equal(before, after[..., :rows])
    assert min(llm.voken_ids) >= rows


@check("pictures stand where the library's forward puts them", pictures=True)
@torch.no_grad()
def test_logits_are_those_of_the_librarys_own_forward(kind, llm):
    prompt = chat_prompt(llm, turns_with(llm, 1, 2))
    ids = prompt.spread
    theirs = llm.causal_lm(**library_inputs(kind, llm, ids, (1, 2))).logits
    positions = llm.family.positions(len(ids), list(placed(ids, prompt.images, prompt.image_id)))
    hidden = llm.read(embed_prompt(llm, prompt)[None], position_ids=stack_positions([positions]))
    assert torch.allclose(llm.logits(hidden.last_hidden_state), theirs, atol=1e-4)
    blind = llm.causal_lm(**library_inputs(kind, llm, ids, (3, 4))).logits
    assert not torch.allclose(blind, theirs, atol=0.1)


@check("training reads what the library reads")
@torch.no_grad()
def test_training_states_and_loss_are_those_of_the_librarys_own_forward(kind, llm):
    sequence = story_sequence(llm, turns_with(llm, 2, 4, open_end=False))
    states, loss = story_losses(llm, [sequence])
    inputs = library_inputs(kind, llm, sequence.ids, (2, 4))
    hidden = llm.causal_lm.model(**inputs).last_hidden_state
    expected = gather_voken_states(hidden, [(0, start) for start in sequence.blocks], 8)
    assert len(expected) == 2 and torch.allclose(states, expected, atol=1e-4)
    labels = torch.tensor(sequence.labels)
    logits = llm.causal_lm(**inputs).logits[0]
    assert torch.allclose(
        loss, functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100), atol=1e-4
    )
    taught = [token for token in sequence.labels if token != -100]
    assert set(taught).isdisjoint(llm.encode(llm.family.before + llm.family.after) + [llm.picture_id])
    assert taught.count(llm.voken_ids[0]) == 2


@check("cached equals uncached")
def test_cached_turns_are_the_librarys_own_choices(kind, llm):
    cache, turns, seeds = StoryCache(), [], []
    greedy = Sampling(temperature=0, max_new_tokens=5, pictures="none")
    for seed in (1, 2, 3):
        prompt = chat_prompt(llm, [*turns, Turn("And then?")])
        cached = generate(llm, [prompt], greedy, [0], cache)[0]
        ids = prompt.spread
        assert generate(llm, [prompt], greedy, [0])[0].ids == cached.ids
        for token in cached.ids:
            with torch.no_grad():
                logits = llm.causal_lm(**library_inputs(kind, llm, ids, tuple(seeds))).logits[0, -1]
            logits[llm.voken_ids] = -torch.inf
            assert token == int(logits.argmax())
            ids.append(token)
        seeds.append(seed)
        turns.append(Turn("And then?", cached.text, picture=True, image_tokens=llm.see(picture(seed))))


@check("a batch of one equals a batch of many")
def test_stories_of_a_batch_are_told_as_each_would_be_alone(kind, llm):
    stories = [turns_with(llm, 1, 2), [Turn("A bear.")], turns_with(llm, 5)]
    prompts = [chat_prompt(llm, turns) for turns in stories]
    sampling = Sampling(max_new_tokens=6)
    together = generate(llm, prompts, sampling, [1, 2, 3])
    for prompt, seed, reply in zip(prompts, (1, 2, 3), together, strict=True):
        alone = generate(llm, [prompt], sampling, [seed])[0]
        assert reply.ids == alone.ids
        assert torch.allclose(reply.voken_states, alone.voken_states, atol=1e-4)
    told = [turns_with(llm, 2, 4, open_end=False), [Turn("A.", "B.")], turns_with(llm, 6, open_end=False)]
    sequences = [story_sequence(llm, turns) for turns in told]
    packed, _ = story_losses(llm, sequences)
    apart = torch.cat([story_losses(llm, [sequence])[0] for sequence in sequences])
    assert torch.allclose(packed, apart, atol=1e-4)


@check("several pictures, each at its place and seen once", pictures=True)
def test_pictures_stand_behind_their_scenes_and_are_seen_once(kind, llm, monkeypatch):
    seen, plain = [], type(llm.family).see
    monkeypatch.setattr(
        type(llm.family), "see", lambda family, model, shown: seen.append(1) or plain(family, model, shown)
    )
    first = chat_prompt(llm, turns_with(llm, 1, 2))
    again = chat_prompt(llm, turns_with(llm, 1, 2, 3))
    assert len(seen) == 3
    assert [image is kept for image, kept in zip(first.images, again.images, strict=False)] == [True, True]
    text = chat_text(llm, turns_with(llm, 1, 2))
    written = TOYS[kind].written.replace("*", "[PICTURE]")
    assert f"Miaa wakes.{written}" in text and "Miaaa wakes.[IMG0]" in text and f"[IMG7]{written}" in text
    tokens = llm.tokenizer.tokenize(text)
    assert tokens.count("[PICTURE]") == 2
    longer = story_sequence(llm, turns_with(llm, 1, 2, open_end=False))
    assert longer.ids.count(llm.picture_id) == sum(len(image) for image in longer.images)


@pytest.fixture(scope="module")
def stages(folder, tiny_diffusion_folder, tmp_path_factory):
    """Both stages, two steps each; what was trained in the second one, and their folders."""
    run = tmp_path_factory.mktemp("stages")
    return train_both(folder, tiny_diffusion_folder, run), run


def train_both(folder: Path, diffusion: Path, run: Path) -> FrozenLLM:
    parts = {"llm": str(folder), "diffusion": str(diffusion), "steps": 2, "batch": 2}
    align = make_recipe(AlignRecipe, **parts, captions=4)
    train_align(align, run / "align")
    recipe = make_recipe(
        FinetuneRecipe, **parts, stories=2, questions=1, shown_share=1.0, image_from=0.0, lora_dropout=0.0
    )
    trained, _ = train_finetune(recipe, run / "finetune", run / "align")
    trained.causal_lm.eval()
    return trained


@pytest.mark.slow
@pytest.mark.trains
@check("align and finetune")
def test_both_stages_train_voken_rows_and_the_decoders_lora_alone(kind, folder, stages):
    trained, run = stages
    rows = load_file(run / "align" / "adapter" / "adapter_model.safetensors")
    fresh = load_llm(folder)
    before = fresh.embed(torch.tensor(fresh.voken_ids))
    name = next(name for name in rows if "embed_tokens" in name)
    assert rows[name].shape == before.shape and not torch.equal(rows[name], before)
    learning = [name for name, part in trained.causal_lm.named_parameters() if part.requires_grad]
    decoder = next(name for name, part in trained.causal_lm.named_modules() if part is trained.decoder)
    lora = [name for name in learning if "lora_" in name]
    assert len(lora) == 2 * 2 * 2 and all(name.startswith(f"{decoder}.layers.") for name in lora)
    moved = dict(trained.causal_lm.named_parameters())
    assert all(moved[name].abs().sum() > 0 for name in lora if "lora_B" in name)
    if not trained.has_vision:
        return
    looked = trained.family.vision(trained.causal_lm).state_dict()
    eyes = fresh.family.vision(fresh.causal_lm).state_dict()
    assert looked.keys() == eyes.keys() and all(torch.equal(looked[name], eyes[name]) for name in eyes)


@pytest.mark.slow
@pytest.mark.trains
@check("adapter and folder are saved and loaded")
@torch.no_grad()
def test_a_saved_adapter_over_a_saved_folder_gives_what_was_trained(kind, folder, stages):
    trained, run = stages
    again = load_adapter(load_llm(folder), run / "finetune" / "adapter")
    inputs = library_inputs(kind, again, chat_prompt(again, turns_with(again, 2)).spread, (2,))
    assert torch.allclose(again.causal_lm(**inputs).logits, trained.causal_lm(**inputs).logits, atol=1e-3)
    assert not torch.allclose(again.causal_lm(**inputs).logits, load_llm(folder).causal_lm(**inputs).logits)


@pytest.mark.slow
@pytest.mark.trains
@check("a story told and drawn")
def test_a_story_is_told_and_what_was_drawn_is_shown(kind, folder, stages, tiny_diffusion_folder):
    _, run = stages
    adapter, mapper = (run / "finetune" / name for name in ("adapter", "mapper.safetensors"))
    teller = load(Parts(llm=folder, adapter=adapter, mapper=mapper, diffusion=tiny_diffusion_folder))
    story = Story("Mia the fox.", seed=1)
    scenes = list(teller.tell(story, scenes=2, steps=1, preset=Preset(Sampling(max_new_tokens=6))))
    assert all(scene.picture is not None for scene in scenes)
    assert len(teller.llm.seen) == (2 if teller.llm.has_vision else 0)


@pytest.mark.slow
@check("a learned prefix")
def test_a_learned_prefix_stands_in_front_in_training_and_in_use(kind, folder, llm, tmp_path):
    llm, adapted = with_prefix(llm, 3, 8)
    turns = turns_with(llm, 2, open_end=False)
    _, loss = story_losses(llm, [story_sequence(llm, turns)])
    loss.backward()
    assert all(parameter.grad is not None for parameter in trainable(adapted))
    save_adapter(adapted, folder, tmp_path / "adapter")
    again = load_adapter(load_llm(folder), tmp_path / "adapter")
    start = chat_prompt(again, [*turns_with(again, 1, open_end=False), Turn("Next?")])
    reply = generate(again, [start], Sampling(max_new_tokens=3, pictures="first"), [0])[0]
    ids = [*start.spread, *llm.voken_ids]
    labels = [-100] * (len(ids) - 1) + [0]
    trained, _ = story_losses(llm, [StorySequence(ids, labels, [len(start.spread)], start.images)])
    assert torch.allclose(reply.voken_states, trained, atol=1e-4)
    bare = replace(llm, prefix=None)
    without, _ = story_losses(bare, [StorySequence(ids, labels, [len(start.spread)], start.images)])
    assert not torch.allclose(trained, without, atol=1e-2)


@pytest.mark.slow
@check("4 bits")
def test_it_is_held_in_4_bits(kind, folder):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    llm = load_llm(folder, quantization=nf4)
    assert any(isinstance(layer, bitsandbytes.nn.Linear4bit) for layer in llm.decoder.modules())
    reply = generate(llm, [chat_prompt(llm, turns_with(llm, 1))], Sampling(max_new_tokens=3), [0])[0]
    assert reply.voken_states.isfinite().all() and reply.voken_states.abs().sum() > 0


@pytest.mark.slow
@check("ComfyUI's nodes")
def test_a_node_loads_it_and_shows_it_a_picture(kind, folder, pack, tmp_path):
    models = tmp_path / "comfyui" / "models" / "LLM"
    models.mkdir(parents=True)
    (models / kind).symlink_to(folder, target_is_directory=True)
    (llm,) = pack.run("MiniGPT5LoadLLM", llm_name=kind, dtype="float32").args
    (story,) = pack.run("MiniGPT5Story", text="Mia.", image=picture(1)[None]).args
    given = {"llm": llm, "story": story, "instruction": "", "max_new_tokens": 4}
    _, _, vokens = pack.run("MiniGPT5StoryTurn", **given).args
    assert len(vokens.states) == 1
    assert len(llm.frozen.seen) == (1 if kind in FAMILIES else 0)


def test_what_is_kept_of_pictures_goes_by_the_vision_tower_alone(kind, llm):
    if not llm.has_vision:
        pytest.skip("a text-only LLM")
    parts = llm.family.vision(llm.causal_lm)
    own = {id(weight) for weight in parts.parameters()}
    decoder = {id(weight) for weight in llm.decoder.parameters()}
    head = {id(weight) for weight in llm.causal_lm.get_output_embeddings().parameters()}
    everything = {id(weight) for weight in llm.causal_lm.parameters()}
    assert own and not own & (decoder | head) and own | decoder | head == everything


def test_what_transformers_4_answers_with_is_read_alike(kind, folder, llm, monkeypatch):
    if not llm.has_vision:
        pytest.skip("a text-only LLM")
    if not has_transformers("5"):
        pytest.skip("the installed transformers is a 4 itself")
    older = load_llm(folder)
    plain = older.causal_lm.get_image_features

    def bare(**inputs: Any) -> Any:
        found = plain(**inputs)
        if "deepstack_features" in found:
            return found.pooler_output, [torch.cat(layer) for layer in found.deepstack_features]
        return found.pooler_output

    monkeypatch.setattr(older.causal_lm, "get_image_features", bare)
    assert torch.equal(older.see(picture(1)), llm.see(picture(1)))


@pytest.mark.parametrize(("height", "width"), [(28, 56), (70, 14), (41, 300)])
def test_positions_of_an_oblong_picture_are_the_librarys(kind, llm, height, width):
    if llm.family.axes == 1:
        pytest.skip("plain positions")
    story = chat_prompt(
        llm, [Turn("?", "Mia.", image_tokens=llm.see(picture(1, height, width))), *turns_with(llm, 2)]
    )
    image = llm.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    ids = torch.tensor([[image if token == llm.picture_id else token for token in story.spread]])
    shown = [(picture(1, height, width) * 255).byte().numpy(), (picture(2) * 255).byte().numpy()]
    kinds = [(ids == image).int()] if has_transformers("5") else []
    theirs, _ = llm.causal_lm.model.get_rope_index(ids, *kinds, pixels_of(kind, shown)["image_grid_thw"])
    ours = llm.family.positions(len(story.spread), list(placed(story.spread, story.images, llm.picture_id)))
    assert torch.equal(ours[:, None], theirs)


@check("a picture of another size", pictures=True)
@torch.no_grad()
def test_a_large_picture_is_scaled_as_the_librarys_processor_does_within_a_rounding(kind, llm):
    y, x = torch.meshgrid(torch.linspace(0, 1, 90), torch.linspace(0, 1, 60), indexing="ij")
    large = torch.stack((y, x, (x * y * 9).sin() / 2 + 0.5), -1).mul(255).round() / 255
    array = (large * 255).round().to(torch.uint8).numpy()
    answer = features(llm.causal_lm.get_image_features(**pixels_of(kind, [array])))
    if kind == "qwen3_vl" and not has_transformers("5"):
        answer, _ = answer  # beside it, what deeper layers are told
    expected = answer[0]
    ours = llm.see(large)[:, : llm.width]
    assert ours.shape == expected.shape
    assert (ours - expected).norm() < 0.1 * expected.norm()


def read_table() -> dict[str, dict[str, str]]:
    """The cells of tests/families.md, by family and check."""
    head, _, *lines = TABLE.read_text(encoding="utf-8").splitlines()
    _, *names = [cell.strip() for cell in head.strip("| ").split("|")]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    return {row[0].strip("`"): dict(zip(names, row[1:], strict=True)) for row in rows}


def test_the_table_has_every_family_and_check():
    table = read_table()
    assert list(table) == list(TOYS) and all(list(cells) == list(CHECKS) for cells in table.values())


def test_the_table_says_what_passed(kind):
    """Stands behind all checks: whatever of them ran is held against its cell; one that failed fails here too."""
    cells, toy = read_table()[kind], TOYS[kind]
    for name, pictures in CHECKS.items():
        outcome = "no pictures" if pictures and not toy.processor else OUTCOMES.get((kind, name))
        assert outcome in (None, cells[name]), f"{TABLE} says of {kind}, {name}: {cells[name]}; it {outcome}"


def test_every_family_has_a_toy():
    assert list(TOYS) == ["llama", *FAMILIES]


def changed_config(source: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_an_unknown_kind_is_refused_with_the_known_ones(tiny_llm_folder, tmp_path):
    folder = changed_config(tiny_llm_folder, tmp_path / "llm", model_type="internvl_chat")
    with pytest.raises(
        BadInputError, match="of the kind 'internvl_chat'.*text-only causal LM.*llava"
    ) as error:
        load_llm(folder)
    assert all(kind in str(error.value) for kind in FAMILIES)


def test_the_oldest_transformers_is_the_same_wherever_it_is_said():
    root = Path(__file__).parents[1]
    said = {"pyproject.toml": ">=", "nodes/llm.py": ">=", "constraints-oldest.txt": "=="}
    for name, relation in said.items():
        found = re.findall(rf"\btransformers{relation}([\d.]+)", (root / name).read_text(encoding="utf-8"))
        assert found[0].startswith(OLDEST), name


@pytest.mark.parametrize("newer", SINCE)
def test_a_kind_that_the_installed_transformers_is_too_old_for_is_refused(
    newer, tiny_llm_folder, tmp_path, monkeypatch
):
    folder = changed_config(tiny_llm_folder, tmp_path / "llm", model_type=newer)
    monkeypatch.setattr(versions, "INSTALLED", "4.50.3")
    with pytest.raises(BadInputError, match=f"{newer}'.*transformers {SINCE[newer]} or later, but 4.50.3"):
        load_llm(folder)


@pytest.mark.parametrize("where", ["text", "whole"])
def test_a_folder_of_transformers_5_is_not_misread_by_an_older_one(
    where, tiny_llm_folder, tmp_path, monkeypatch
):
    rope = {"rope_type": "default", "rope_theta": 500.0}
    changes = {"rope_parameters": rope} if where == "whole" else {"text_config": {"rope_parameters": rope}}
    folder = changed_config(tiny_llm_folder, tmp_path / "llm", **changes)
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_theta", None)
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(versions, "INSTALLED", "4.57.6")
    with pytest.raises(BadInputError, match="rope_parameters in its config.json.*transformers 5 or later"):
        load_llm(folder)


def test_a_folder_that_does_not_say_how_to_scale_pictures_is_refused(kind, folder, tmp_path):
    if TOYS[kind].processor is None:
        pytest.skip("a text-only LLM")
    copy = Path(shutil.copytree(folder, tmp_path / "llm"))
    for file in copy.glob("*processor_config.json"):
        file.unlink()
    with pytest.raises(BadInputError, match="has no preprocessor_config.json.*Copy it"):
        load_llm(copy)


def test_a_family_that_sees_takes_no_image_adapter(kind, folder, llm, tmp_path):
    if not llm.has_vision:
        pytest.skip("a text-only LLM")
    assert load_vision(llm, folder).image_encoder is None
    with pytest.raises(BadInputError, match="sees by itself. Leave the image adapter"):
        load_vision(llm, folder, chosen=tmp_path / "image_adapter.safetensors")
