"""A toy LLM in the graph: loaded, adapted by patches, and telling one turn with ComfyUI's progress and Cancel."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from minigpt5_core.llm import load_adapter, load_llm
from minigpt5_core.llm.precision import dtype_and_quantization
from minigpt5_core.llm.weights import hash_weights
from minigpt5_core.story.prompts import NEXT
from minigpt5_core.vision import ImageAdapterHeader, ImageEncoder, ImageEncoderConfig, save_image_adapter
from minigpt5_core.vision.image_adapter import IMAGE_ADAPTER
from trainer.llm.adapters import save_adapter as save_prefix
from trainer.llm.adapters import with_prefix

SHORT = {"max_new_tokens": 6, "temperature": 1.0}


class Cancelled(Exception):
    """What ComfyUI's bar raises once the user has pressed Cancel."""


@pytest.fixture
def models(tmp_path, tiny_llm_folder):
    """ComfyUI's models folder with the toy LLM in it."""
    folder = tmp_path / "comfyui" / "models"
    (folder / "LLM").mkdir(parents=True)
    (folder / "LLM" / "tiny").symlink_to(tiny_llm_folder, target_is_directory=True)
    return folder


@pytest.fixture
def llm(pack, models):
    return pack.run("MiniGPT5LoadLLM", llm_name="tiny").args[0]


@pytest.fixture
def opening(pack):
    return pack.part("nodes.sockets").StorySoFar("Mia the fox.")


@pytest.fixture
def tell(pack, llm):
    """tell(story, seed=0, ...) -> (story, text, vokens)."""

    def run(story, instruction="", llm=llm, **inputs):
        given = {"llm": llm, "story": story, "instruction": instruction, **SHORT, **inputs}
        return pack.run("MiniGPT5StoryTurn", **given).args

    return run


@pytest.fixture
def prompts(pack, monkeypatch):
    """What the LLM was asked, turn by turn: [[(request, text, whether there is a picture), ...], ...]."""
    module, asked = pack.part("minigpt5_core.story.prompts"), []
    plain = module.fit_prompt

    def listen(llm, turns, room, wording):
        asked.append([(turn.request, turn.text, turn.picture) for turn in turns])
        return plain(llm, turns, room, wording)

    monkeypatch.setattr(module, "fit_prompt", listen)
    return asked


# Load LLM


def test_an_llm_is_in_comfyuis_keeping_and_knows_its_weights(llm, tiny_llm_folder):
    assert (llm.name, llm.weights_hash) == ("tiny", hash_weights(tiny_llm_folder))
    assert len(llm.frozen.voken_ids) == 8
    names = {f"causal_lm.{name}" for name in llm.frozen.causal_lm.state_dict()}
    assert set(llm.patcher.model.state_dict()) == names
    assert not any(weight.requires_grad for weight in llm.patcher.model.parameters())


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)],
)
def test_an_llm_computes_on_a_cpu_in_float32_unless_asked_otherwise(pack, models, dtype, expected):
    (llm,) = pack.run("MiniGPT5LoadLLM", llm_name="tiny", dtype=dtype, vokens=3).args
    assert llm.frozen.causal_lm.dtype == expected
    assert len(llm.frozen.voken_ids) == 3


@pytest.mark.parametrize("saved", ["bfloat16", "float16", "float32", None])
@pytest.mark.parametrize("comfy", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("bf16", [True, False])
def test_auto_never_takes_float16_for_an_llm_that_was_not_saved_in_it(
    pack, host, models, monkeypatch, saved, comfy, bf16
):
    management = host("comfy.model_management")
    monkeypatch.setattr(management, "text_encoder_dtype", lambda device=None: comfy)
    monkeypatch.setattr(management, "should_use_bf16", lambda device=None: bf16)
    folder = models / "LLM" / "saved"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama"} | ({"torch_dtype": saved} if saved else {}))
    )
    chosen = pack.part("nodes.llm")._auto_dtype(torch.device("cuda"), folder)
    if comfy in (torch.bfloat16, torch.float32) or comfy == torch.float16 and saved == "float16":
        assert chosen == comfy
    else:
        assert chosen == (torch.bfloat16 if bf16 else torch.float32)


def test_a_gguf_file_does_not_say_what_it_was_trained_in(pack, models):
    weights = pack.part("minigpt5_core.llm.weights")
    assert not weights.is_for_float16(models / "LLM" / "a.gguf")
    (models / "LLM" / "parts").mkdir()
    for said, expected in (
        ({"text_config": {"dtype": "float16"}}, True),
        ({"dtype": "bfloat16"}, False),
        ([], False),
    ):
        (models / "LLM" / "parts" / "config.json").write_text(json.dumps(said))
        assert weights.is_for_float16(models / "LLM" / "parts") is expected


def test_an_llm_that_answers_with_no_numbers_is_refused_in_a_sentence(tell, opening, llm):
    for temperature in (0.0, 1.0):
        for value in (float("nan"), float("inf")):
            with torch.no_grad():
                llm.frozen.causal_lm.model.norm.weight.fill_(value)
            with pytest.raises(ValueError, match="NaN or infinite.*load it in bfloat16 or float32"):
                tell(opening, temperature=temperature)


# Load Adapter


def save_adapter(folder, llm_folder, vokens=8):
    """As the trainer writes it, with random weights."""
    llm = load_llm(llm_folder, vokens)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], trainable_token_indices=llm.voken_ids)
    adapted = get_peft_model(llm.causal_lm, config)
    torch.manual_seed(3)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)


def patched(patcher):
    """The weights with every patch added, as ComfyUI computes them."""
    weights = {name: weight.clone() for name, weight in patcher.model.state_dict().items()}
    for name, patches in patcher.patches.items():
        for strength, patch, _, _, _ in patches:
            weights[name] += strength * patch.alpha / len(patch.down) * patch.up @ patch.down
    return {name.removeprefix("causal_lm."): weight for name, weight in weights.items()}


def test_an_adapters_patches_give_what_merging_it_gives(pack, llm, models, tiny_llm_folder):
    save_adapter(models / "loras" / "mine", tiny_llm_folder)
    (adapted,) = pack.run("MiniGPT5LoadAdapter", llm=llm, adapter_name="mine").args
    merged = load_adapter(load_llm(tiny_llm_folder), models / "loras" / "mine").causal_lm.state_dict()
    found = patched(adapted.patcher)
    assert found.keys() == merged.keys()
    assert all(torch.allclose(found[name], merged[name], atol=1e-5) for name in merged)
    plain = load_llm(tiny_llm_folder).causal_lm.state_dict()
    assert sum(not torch.equal(plain[name], merged[name]) for name in merged) == 4  # q_proj twice, rows, head


def test_half_an_adapter_is_half_way(pack, llm, models, tiny_llm_folder):
    save_adapter(models / "loras" / "mine", tiny_llm_folder)
    whole, half = (
        patched(
            pack.run("MiniGPT5LoadAdapter", llm=llm, adapter_name="mine", strength=strength).args[0].patcher
        )
        for strength in (1.0, 0.5)
    )
    plain = llm.frozen.causal_lm.state_dict()
    assert all(torch.allclose(half[name], (plain[name] + whole[name]) / 2, atol=1e-5) for name in plain)


def test_a_prefix_stands_in_front_of_the_story_and_has_no_strength(pack, llm, models, tiny_llm_folder):
    _, prefixed = with_prefix(load_llm(tiny_llm_folder), tokens=3, width=0)
    save_prefix(prefixed, tiny_llm_folder, models / "loras" / "mine")
    (adapted,) = pack.run("MiniGPT5LoadAdapter", llm=llm, adapter_name="mine").args
    assert adapted.frozen.begin(2).get_seq_length() == 3
    assert llm.frozen.begin(2).get_seq_length() == 0  # the LLM it is laid over stays as it was
    assert adapted.adapters == ("mine",)
    with pytest.raises(ValueError, match="strength is 0.5: mine is a learned prefix"):
        pack.run("MiniGPT5LoadAdapter", llm=llm, adapter_name="mine", strength=0.5)


def test_an_adapter_leaves_the_llm_it_is_laid_over_as_it_was(pack, llm, models, tiny_llm_folder):
    save_adapter(models / "loras" / "mine", tiny_llm_folder)
    before = {name: weight.clone() for name, weight in llm.frozen.causal_lm.state_dict().items()}
    (adapted,) = pack.run("MiniGPT5LoadAdapter", llm=llm, adapter_name="mine").args
    assert adapted.patcher is not llm.patcher
    assert (adapted.name, adapted.weights_hash) == (llm.name, llm.weights_hash)
    assert not llm.patcher.patches
    after = llm.frozen.causal_lm.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_loaded_again_has_the_heads_rows_though_patching_has_undone_the_tie(
    pack, llm, models, tiny_llm_folder
):
    """ComfyUI puts a tensor of its own in place of each patched weight, and of each it takes a patch off."""
    save_adapter(models / "loras" / "mine", tiny_llm_folder)
    (first,) = pack.run("MiniGPT5LoadAdapter", llm=llm, adapter_name="mine").args
    assert "causal_lm.lm_head.weight" in first.patcher.patches
    head = llm.frozen.causal_lm.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    (again,) = pack.run("MiniGPT5LoadAdapter", llm=llm, adapter_name="mine").args
    assert again.patcher.patches.keys() == first.patcher.patches.keys()


def test_an_adapter_of_other_vokens_is_refused_by_name(pack, llm, models, tiny_llm_folder):
    save_adapter(models / "loras" / "mine", tiny_llm_folder, vokens=4)
    with pytest.raises(ValueError, match=r"mine.*\(4\).*this LLM of width 32.*\(8\)"):
        pack.run("MiniGPT5LoadAdapter", llm=llm, adapter_name="mine")


# In 4 bits


@pytest.fixture
def packed(pack, models):
    pytest.importorskip("bitsandbytes")
    return pack.run("MiniGPT5LoadLLM", llm_name="tiny", dtype="4bit").args[0]


@torch.no_grad()
def states(frozen):
    return frozen.read(frozen.embed(torch.tensor([[5, 6, 7, 70, 80]]))).last_hidden_state


def test_an_llm_in_4_bits_is_in_comfyuis_keeping(pack, packed, llm):
    weights = packed.patcher.model.causal_lm.model.layers[0].self_attn
    assert {weights.q_proj.weight.dtype, weights.o_proj.weight.dtype} == {torch.uint8}
    assert packed.frozen.causal_lm.dtype == torch.bfloat16
    assert packed.weights_hash == llm.weights_hash
    assert pack.nodes["MiniGPT5LoadLLM"].GET_SCHEMA().inputs[1].options[-1] == "4bit"


def test_an_adapter_over_4_bits_is_unmerged_lora_and_patches_for_all_else(
    pack, packed, models, tiny_llm_folder
):
    save_adapter(models / "loras" / "mine", tiny_llm_folder)
    before = states(packed.frozen)
    (adapted,) = pack.run("MiniGPT5LoadAdapter", llm=packed, adapter_name="mine").args
    assert set(adapted.patcher.patches) == {"causal_lm.model.embed_tokens.weight", "causal_lm.lm_head.weight"}
    own = load_adapter(load_llm(tiny_llm_folder, **dtype_and_quantization("4bit")), models / "loras" / "mine")
    assert torch.equal(states(adapted.frozen), states(own))
    assert not torch.equal(states(own), before)
    assert torch.equal(states(packed.frozen), before)  # the LLM it is laid over stays as it was


def test_an_adapters_strength_holds_over_4_bits(pack, packed, models, tiny_llm_folder):
    save_adapter(models / "loras" / "mine", tiny_llm_folder)
    given = {"llm": packed, "adapter_name": "mine"}
    none, half, whole = (
        pack.run("MiniGPT5LoadAdapter", **given, strength=strength).args[0] for strength in (0.0, 0.5, 1.0)
    )
    (twice,) = pack.run("MiniGPT5LoadAdapter", llm=half, adapter_name="mine", strength=0.5).args
    assert torch.equal(states(none.frozen), states(packed.frozen))
    assert torch.allclose(states(twice.frozen), states(whole.frozen), atol=0.1, rtol=0.1)
    assert not torch.allclose(states(half.frozen), states(whole.frozen), atol=0.1, rtol=0.1)
    assert len(twice.unmerged_lora) == 2


def test_a_turn_loads_unmerged_lora_too(pack, host, tell, packed, opening, models, tiny_llm_folder):
    save_adapter(models / "loras" / "mine", tiny_llm_folder)
    (adapted,) = pack.run("MiniGPT5LoadAdapter", llm=packed, adapter_name="mine").args
    _, _, vokens = tell(opening, llm=adapted)
    assert vokens.states.shape == (1, 8, 32) and vokens.states.isfinite().all()
    (load,) = host("comfy.model_management").loads
    assert load["models"] == [adapted.patcher, *adapted.unmerged_lora] and len(adapted.unmerged_lora) == 1
    assert set(adapted.unmerged_lora[0].model.state_dict()) == {
        "downs.0",
        "downs.1",
        "ups.0",
        "ups.1",
    }  # q_proj twice


def test_a_gguf_file_is_loaded(pack, models, monkeypatch, tiny_llm_folder):
    asked = []
    core, weights = pack.part("minigpt5_core.llm"), pack.part("minigpt5_core.llm.weights")
    plain = core.load_llm
    (models / "LLM" / "small.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(
        core,
        "load_llm",
        lambda path, *rest, **kept: asked.append(path) or plain(tiny_llm_folder, *rest, **kept),
    )
    (loaded,) = pack.run("MiniGPT5LoadLLM", llm_name="small.gguf").args
    assert asked == [models / "LLM" / "small.gguf"]
    assert (loaded.name, loaded.weights_hash) == ("small.gguf", weights.hash_weights(asked[0]))


# Story Turn


def test_a_turn_adds_a_page_and_gives_its_text_and_vokens(tell, opening):
    told, text, vokens = tell(opening)
    assert [(page.request, page.text, page.picture) for page in told.pages] == [("Mia the fox.", text, None)]
    assert vokens.states.shape == (1, 8, 32)
    assert vokens.states.dtype == torch.float32
    assert vokens.llm == "tiny"
    assert not opening.pages


def test_the_same_seed_tells_the_same(tell, opening):
    first, second = tell(opening, seed=5), tell(opening, seed=5)
    assert first[1] == second[1]
    assert torch.equal(first[2].states, second[2].states)


def test_all_64_bits_of_a_seed_count(tell, opening):
    seeds = (1, 2**32 + 1, 2**63 + 1, 2**64 - 1)
    assert len({tell(opening, seed=seed)[1] for seed in seeds}) == 4


def test_a_story_is_asked_for_by_opening_then_instruction_then_what_happens_next(tell, opening, prompts):
    first = tell(opening, "It snows.")[0]
    second = tell(first)[0]
    tell(second, "Night falls.")
    a, b = (page.text for page in second.pages)
    told = [("Mia the fox. It snows.", a, False), (NEXT, b, False)]
    assert prompts[0] == [("Mia the fox. It snows.", None, True)]
    assert prompts[2] == [*told, ("Night falls.", None, True)]


def test_a_page_of_the_users_own_is_read_with_its_picture(pack, tell, prompts):
    image = torch.zeros(1, 4, 4, 3)
    (story,) = pack.run("MiniGPT5Story", text="Mia waves.", image=image).args
    tell(story)
    assert prompts[0] == [("Mia waves.", "Mia waves.", True), (NEXT, None, True)]


@pytest.mark.parametrize(("pictures", "count"), [("after_text", 1), ("first", 1), ("none", 0)])
def test_a_picture_comes_as_asked(tell, opening, pictures, count):
    assert tell(opening, pictures=pictures)[2].states.shape == (count, 8, 32)


def test_comfyui_makes_room_for_the_llm_and_its_memory_before_a_turn(host, tell, llm, opening, prompts):
    tell(opening, max_new_tokens=6)
    (load,) = host("comfy.model_management").loads
    assert load["models"] == [llm.patcher]
    assert load["force_full_load"] is True
    per_position = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads that hold them, head size, bytes
    positions, left = divmod(load["memory_required"], per_position)
    assert left == 0
    assert positions > 6 + 8 + len("Mia the fox.")  # the reply, the vokens, and a prompt of a token a letter


def test_an_adapted_llm_is_loaded_with_its_adapter(pack, host, tell, llm, opening, models, tiny_llm_folder):
    save_adapter(models / "loras" / "mine", tiny_llm_folder)
    (adapted,) = pack.run("MiniGPT5LoadAdapter", llm=llm, adapter_name="mine").args
    tell(opening, llm=adapted)
    assert host("comfy.model_management").loads[-1]["models"] == [adapted.patcher]


def test_cancel_is_heard_at_every_token_whatever_the_bar_does(host, tell, opening, monkeypatch):
    management = host("comfy.model_management")
    asked, plain = [], management.throw_exception_if_processing_interrupted

    def ask():
        asked.append(1)
        management.interrupted.extend([True] * (len(asked) == 3))
        plain()

    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", ask)
    with pytest.raises(management.InterruptProcessingException):
        tell(opening)
    assert len(asked) == 3


def test_every_token_ticks_comfyuis_bar(host, tell, opening):
    ticks = []
    host("comfy.utils").set_progress_bar_global_hook(
        lambda done, total, preview, node_id: ticks.append((done, total))
    )
    tell(opening, max_new_tokens=6)
    assert ticks == [(step, 14) for step in range(1, len(ticks) + 1)]  # 6 tokens and 8 vokens
    assert len(ticks) == 7  # a block of vokens is one step


def test_cancel_ends_a_turn_within_one_token(host, tell, opening):
    ticks = []

    def cancel(done, total, preview, node_id):
        ticks.append(done)
        if done == 2:
            raise Cancelled

    host("comfy.utils").set_progress_bar_global_hook(cancel)
    with pytest.raises(Cancelled):
        tell(opening)
    assert ticks == [1, 2]
    assert not opening.pages
    host("comfy.utils").set_progress_bar_global_hook(None)
    assert tell(opening, seed=5)[1] == tell(opening, seed=5)[1]  # and the LLM tells on as ever


def test_an_opening_longer_than_the_llm_reads_is_refused(tell, pack):
    long = pack.part("nodes.sockets").StorySoFar("Mia " * 1100)
    with pytest.raises(ValueError, match="Shorten the prompt"):
        tell(long)


@pytest.mark.parametrize("longest", [4096, 10**6])
def test_a_turn_may_be_asked_to_be_longer_than_the_llm_reads(host, tell, llm, opening, monkeypatch, longest):
    """A limit is no promise: the reply ends with the context, and no more memory is asked for than that."""
    llm.frozen.causal_lm.config.max_position_embeddings = 256
    told, text, vokens = tell(opening, max_new_tokens=longest, temperature=1.0)
    assert len(told.pages) == 1 and len(vokens.states) == 1 and len(text) < 256
    positions = host("comfy.model_management").loads[-1]["memory_required"] // (2 * 2 * 2 * 8 * 4)
    assert positions == 256


# What the LLM sees


@pytest.fixture
def seeing(pack, models, tiny_llm_folder):
    """The toy LLM with an image adapter in its folder."""
    folder = models / "LLM" / "seeing"
    folder.mkdir()
    for file in tiny_llm_folder.iterdir():
        (folder / file.name).symlink_to(file)
    torch.manual_seed(0)
    config = ImageEncoderConfig(
        llm_width=32, size=16, tokens=3, channels=[4, 4], hidden=12, heads=2, layers=1
    )
    save_image_adapter(folder / IMAGE_ADAPTER, ImageEncoder(config), ImageAdapterHeader("tiny", 32, "", {}))
    return pack.run("MiniGPT5LoadLLM", llm_name="seeing").args[0]


@pytest.fixture
def shown(pack, monkeypatch):
    """Which pages' pictures each turn was shown, and whether a block stood in front of it."""
    module, asked = pack.part("minigpt5_core.story.prompts"), []
    plain = module.fit_prompt

    def listen(llm, turns, room, wording):
        asked.append([(turn.picture, turn.image_tokens is not None) for turn in turns])
        return plain(llm, turns, room, wording)

    monkeypatch.setattr(module, "fit_prompt", listen)
    return asked


def test_an_llm_with_an_image_adapter_keeps_its_eyes_with_its_weights(seeing, llm):
    assert any(name.startswith("image_encoder.") for name in seeing.patcher.model.state_dict())
    assert not any(name.startswith("image_encoder.") for name in llm.patcher.model.state_dict())


def test_an_llm_that_sees_is_shown_a_users_picture_in_place_of_a_block(pack, tell, seeing, shown):
    (story,) = pack.run("MiniGPT5Story", text="", image=torch.rand(1, 20, 16, 3)).args
    tell(story, llm=seeing)
    tell(story)  # the blind one
    assert shown == [[(False, True), (True, False)], [(True, False), (True, False)]]


def test_an_llm_that_sees_is_shown_behind_its_block_what_came_of_it(pack, tell, seeing, shown, opening):
    story = tell(opening, llm=seeing)[0]
    (story,) = pack.run("MiniGPT5AddPicture", story=story, image=torch.rand(1, 16, 16, 3)).args
    tell(story, llm=seeing)
    assert shown[1] == [(True, True), (True, False)]


def test_an_llm_that_sees_reads_words_only_where_it_is_told_to(pack, tell, seeing, llm, shown, opening):
    (mine,) = pack.run("MiniGPT5Story", text="", image=torch.rand(1, 20, 16, 3)).args
    story = pack.run("MiniGPT5AddPicture", story=tell(opening)[0], image=torch.rand(1, 16, 16, 3)).args[0]
    for pages in (mine, story):
        shown.clear()
        closed = tell(pages, llm=seeing, llm_reads="words_only")
        blind = tell(pages, llm=llm)
        assert shown == [[(True, False), (True, False)]] * 2  # a block stands for every picture
        assert torch.equal(closed[2].states, blind[2].states)


# Presets


def test_a_preset_takes_the_place_of_the_widgets_above_it(pack, tell, llm, opening, monkeypatch):
    monkeypatch.setattr(llm.frozen.causal_lm.config, "max_position_embeddings", 1024)
    module, drawn = pack.part("minigpt5_core.generate"), []
    plain = module.generate

    def listen(llm, prompts, sampling, *rest, **more):
        drawn.append((sampling, llm.tokenizer.decode(prompts[0].ids)))
        return plain(llm, prompts, replace(sampling, max_new_tokens=4), *rest, **more)

    monkeypatch.setattr(module, "generate", listen)
    tell(opening)
    tell(opening, preset="default", pictures="when_asked", max_pictures=3)
    tell(opening, preset="published_vist", pictures="after_text")
    (off, asked), (mended, _), (vist, scene) = drawn
    assert vist.max_new_tokens == 1  # a block and no word
    assert (off.temperature, off.repetition_penalty, off.max_new_tokens) == (1.0, 1.0, 6)
    assert (mended.repetition_penalty, mended.max_new_tokens) == (1.1, 256)
    assert (mended.pictures, mended.max_pictures) == ("when_asked", 3)  # the node's own affair
    assert (vist.repetition_penalty, vist.stop_strings) == (2.0, ("###",))
    assert vist.pictures == "first"  # the opening is there already, and only its picture is wanted
    assert scene.endswith("Generate an image with the scene description: Mia the fox. ###Assistant:")
    assert "<|im_start|>user\nMia the fox." in asked


def test_a_scene_that_was_only_drawn_is_told_as_it_was_asked_for(pack, tell, llm, opening, monkeypatch):
    monkeypatch.setattr(llm.frozen.causal_lm.config, "max_position_embeddings", 1024)
    monkeypatch.setattr(pack.part("minigpt5_core.generate.row").RowState, "_text", lambda row, ids: "")
    story, text, vokens = tell(opening, preset="published_vist")
    assert text == story.pages[0].text == "Mia the fox." and len(vokens.states) == 1
    assert tell(opening)[1] == ""


# What the storybook cannot draw


def test_words_outside_the_storybooks_world_are_named_on_the_outer_node(pack, host, llm, opening, caplog):
    adapted = replace(llm, adapters=("storybook",))
    given = {"llm": adapted, "instruction": "A dragon lands.", **SHORT, "story": opening}
    host("server").sent.clear()
    pack.run("MiniGPT5StoryTurn", hidden={"unique_id": "9.0.0.scene_1_turn"}, **given)
    ((text, node, _),) = host("server").sent
    assert "Page 1: The storybook cannot draw these words: dragon, lands." in text and node == "9"
    assert text.removeprefix("Page 1: ") in caplog.text


def test_a_page_says_what_of_it_cannot_be_drawn_and_the_node_says_it_of_all_pages(pack, host, llm, opening):
    adapted = replace(llm, adapters=("storybook",))
    story = opening
    for line in ("A dragon.", "It snows.", "A castle."):
        host("server").sent.clear()
        given = {"llm": adapted, "instruction": line, **SHORT, "story": story}
        answer = pack.run("MiniGPT5StoryTurn", hidden={"unique_id": "9"}, **given)
        story = answer.args[0]
    notes = [page.get("note", "") for page in answer.ui["minigpt5_pages"]]
    assert ["dragon" in notes[0], notes[1], "castle" in notes[2]] == [True, "", True]
    ((text, _, _),) = host("server").sent
    assert text == f"Page 1: {notes[0]}\nPage 3: {notes[2]}"


def test_other_adapters_may_draw_dragons(pack, host, llm, opening):
    host("server").sent.clear()
    given = {"llm": llm, "story": opening, "instruction": "A dragon lands.", **SHORT}
    pack.run("MiniGPT5StoryTurn", hidden={"unique_id": "9"}, **given)
    assert not host("server").sent


@pytest.mark.parametrize("widget", ["pictures", "preset", "llm_reads"])
def test_a_choice_that_came_over_a_link_is_refused_with_what_there_is(tell, opening, widget):
    with pytest.raises(ValueError, match=f"{widget} is 'always'; expected one of .*, .*over the link"):
        tell(opening, **{widget: "always"})


def test_a_turn_of_several_pictures_is_as_many_scenes_as_on_the_command_line(
    pack, tell, opening, prompts, monkeypatch
):
    decode, reply = pack.part("minigpt5_core.generate"), pack.part("minigpt5_core.generate.row").Reply
    answer = reply(
        [],
        "It snows. It melts. The end.",
        torch.zeros(2, 8, 32),
        "end",
        ["It snows.", "It melts.", "The end."],
    )
    monkeypatch.setattr(decode, "generate", lambda *given, **more: [answer])
    told, text, vokens = tell(opening, pictures="when_asked", max_pictures=3)
    assert (text, len(vokens.states)) == (answer.text, 2) and told.pages[0].text == text
    for _ in range(2):
        (told,) = pack.run("MiniGPT5AddPicture", story=told, image=torch.rand(1, 8, 8, 3)).args
    assert [(page.text, page.picture is None) for page in told.pages] == [
        (scene, False) for scene, _ in answer.scenes(3)
    ]
    tell(told)
    assert prompts[-1][:2] == [("Mia the fox.", "It snows.", True), (NEXT, "It melts. The end.", True)]
