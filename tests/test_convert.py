"""Published files at toy size, converted and loaded as the main job loads them, beside what their tensors say."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

from minigpt5_core.conditioning.mapper_file import load_mapper
from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import load_adapter, load_llm, load_vision
from minigpt5_core.llm.adapter import read_adapter
from minigpt5_core.llm.weights import hash_weights
from minigpt5_core.published import PublishedTokenizer
from minigpt5_core.story import load_story
from minigpt5_core.story.prompts import NEXT, Turn
from minigpt5_core.story.published_prompts import CC3M, DIALOGUE_SYSTEM, MMDIALOG, STORY_SYSTEM, VIST
from tests import published_files as files
from trainer.cli import main
from trainer.convert import minigpt5
from trainer.convert.pickles import read_tensors
from trainer.convert.written import save_checked

SIZES = files.Sizes()
HEADS = ["--vit-heads", str(SIZES.vit_heads), "--qformer-heads", str(SIZES.qformer_heads)]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    files.write_published(folder, SIZES)
    return folder


def convert_llm(published: Path, out: Path, *more: str, **other: Path) -> int:
    parts = {
        "vicuna": "vicuna",
        "vit": "eva_vit_g.pth",
        "qformer": "qformer.pth",
        "projection": "projection.pth",
    }
    given = {name: str(other.get(name, published / file)) for name, file in parts.items()}
    flags = [word for name, file in given.items() for word in (f"--{name}", file)]
    return main(["convert", "minigpt4", *flags, *HEADS, "--out", str(out), *more])


def convert_stages(out: Path, *flags: object) -> int:
    return main(["convert", "minigpt5", *map(str, flags), "--out", str(out)])


@pytest.fixture(scope="module")
def converted(published, tmp_path_factory) -> Path:
    """llm/, one/ from stage 1 alone without a word of the LLM, and two/ from both."""
    folder = tmp_path_factory.mktemp("converted")
    assert convert_llm(published, folder / "llm") == 0
    first, second = published / "stage1.ckpt", published / "stage2.ckpt"
    assert convert_stages(folder / "one", "--stage1", first, "--bos", 2) == 0
    both = ("--stage1", first, "--stage2", second)
    assert convert_stages(folder / "two", *both, "--bos", 1, "--llm", folder / "llm") == 0
    return folder


def merged_by_hand(published: Path, stage: int) -> LlamaForCausalLM:
    """Vicuna with the checkpoint's tables and, in stage 2, the product of its LoRA matrices times alpha (16) / rank."""
    vicuna = {}
    for part in sorted((published / "vicuna").glob("*.bin")):
        vicuna |= torch.load(part, weights_only=True)
    vicuna = {name: tensor for name, tensor in vicuna.items() if "inv_freq" not in name}
    checkpoint = torch.load(published / f"stage{stage}.ckpt", weights_only=True)["state_dict"]
    for table in ("model.embed_tokens", "lm_head"):
        [name] = [name for name in checkpoint if f".{table}." in name]
        vicuna[f"{table}.weight"] = checkpoint[name]
    for name in [name for name in checkpoint if ".lora_A." in name]:
        module = name.split("base_model.model.")[1].split(".lora_A")[0]
        product = checkpoint[name.replace("lora_A", "lora_B")] @ checkpoint[name]
        vicuna[f"{module}.weight"] = vicuna[f"{module}.weight"] + 16 / SIZES.rank * product
    config = files.llama_config(SIZES)
    config.vocab_size += 9
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(vicuna, strict=True)
    return model


IDS = torch.tensor([[1, 9, 320, 321, 327, 328, 200, 2]])


@pytest.mark.parametrize(("folder", "stage", "bos"), [("one", 1, 2), ("two", 2, 1)])
def test_the_adapter_gives_the_checkpoints_own_llm_merged_and_through_peft(
    published, converted, folder, stage, bos
):
    expected = merged_by_hand(published, stage)(IDS).logits
    merged = load_adapter(load_llm(converted / "llm"), converted / folder / "adapter")
    assert torch.allclose(merged.causal_lm(IDS).logits, expected, atol=1e-4)
    assert torch.equal(merged.causal_lm.lm_head.weight, merged_by_hand(published, stage).lm_head.weight)
    assert (merged.bos_id, merged.voken_ids) == (bos, list(range(320, 328)))
    through = PeftModel.from_pretrained(load_llm(converted / "llm").causal_lm, converted / folder / "adapter")
    assert torch.allclose(through.eval()(IDS).logits, expected, atol=1e-4)


@pytest.mark.parametrize(("folder", "stage"), [("one", 1), ("two", 2)])
def test_the_mapper_is_torchs_transformer_with_the_latest_weights_behind_stage_ones_projection(
    published, converted, folder, stage
):
    first = torch.load(published / "stage1.ckpt", weights_only=True)["state_dict"]
    latest = torch.load(published / f"stage{stage}.ckpt", weights_only=True)["state_dict"]
    transformer = nn.Transformer(
        SIZES.width, 8, 4, 4, SIZES.feed_forward, 0.0, batch_first=True, norm_first=True
    ).eval()
    stem = "llm_to_t2i_mapping."
    transformer.load_state_dict(
        {name.removeprefix(stem): tensor for name, tensor in latest.items() if name.startswith(stem)}
    )
    states = torch.randn(2, 8, SIZES.llm_width)
    inner = nn.functional.gelu(states @ first["fc.0.weight"].T + first["fc.0.bias"])
    features = inner @ first["fc.2.weight"].T + first["fc.2.bias"]
    expected = transformer(features, first["t2i_decoder_prompt"].expand(2, -1, -1))
    mapper, header = load_mapper(converted / folder / "mapper.safetensors")
    assert torch.allclose(mapper(states).tokens, expected, atol=1e-4)
    known = ("llm", hash_weights(converted / "llm"))
    assert (header.llm_id, header.llm_hash) == (known if folder == "two" else ("MiniGPT-4", ""))
    assert (header.space.name, header.llm_width) == ("storybook", SIZES.llm_width)


def test_new_rows_of_the_llm_are_the_mean_of_its_own(published, converted):
    table = load_file(converted / "llm" / "model.safetensors")["lm_head.weight"]
    assert table.shape == (329, SIZES.llm_width)
    assert torch.allclose(table[320:], table[:320].mean(0).expand(9, -1), atol=1e-6)


def test_every_size_of_the_vision_path_is_read_off_the_files(converted):
    encoder = load_vision(load_llm(converted / "llm"), converted / "llm").image_encoder
    config = encoder.config
    assert (config.size, config.patch, config.queries, config.cross_every) == (28, 7, 6, 2)
    assert (config.vision_layers, config.vision_width, config.vision_hidden) == (3, 20, 44)
    assert (config.layers, config.width, config.hidden, config.llm_width) == (5, 18, 30, 24)


def test_lavis_names_and_folders_of_blip_2_give_the_same_sight_as_evas_names(published, converted, tmp_path):
    wanted = load_file(converted / "llm" / "qformer.safetensors")
    eva, lavis = (
        torch.load(published / name, weights_only=True) for name in ("eva_vit_g.pth", "qformer.pth")
    )
    whole = {f"visual_encoder.{name}": tensor for name, tensor in eva.items()} | lavis["model"]
    torch.save({"model": whole}, tmp_path / "lavis.pth")
    blip = {name: tensor for name, tensor in wanted.items() if not name.startswith("projector.")}
    (tmp_path / "blip2").mkdir()
    torch.save(blip | {"language_projection.bias": torch.zeros(3)}, tmp_path / "blip2" / "pytorch_model.bin")
    for source in (tmp_path / "lavis.pth", tmp_path / "blip2"):
        assert convert_llm(published, tmp_path / "out", vit=source, qformer=source) == 0
        found = load_file(tmp_path / "out" / "qformer.safetensors")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_last_block_of_evas_own_file_is_left_over(published, tmp_path):
    big = files.Sizes(vit_blocks=40)
    torch.save(files.filled(files.vit(big), 2), tmp_path / "eva_vit_g.pth")
    assert convert_llm(published, tmp_path / "out", vit=tmp_path / "eva_vit_g.pth") == 0
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    last = [name for name in report["left_over"] if name.startswith("vit: ")]
    assert last and all(name.startswith("vit: blocks.39.") for name in last)


def test_every_tensor_is_reported_as_used_or_left_over(converted):
    report = json.loads((converted / "two" / "conversion.json").read_text())
    names = {f"stage1: {name}" for name in files.stage1(SIZES)} | {
        f"stage2: {name}" for name in files.stage2(SIZES)
    }
    assert set(report["used"]) | set(report["left_over"]) == names
    report = json.loads((converted / "llm" / "conversion.json").read_text())
    parts = {
        "vicuna": files.llama,
        "vit": files.vit,
        "qformer": files.qformer,
        "projection": files.projection,
    }
    names = {f"{part}: {name}" for part, shapes in parts.items() for name in shapes(SIZES)}
    assert set(report["used"]) | set(report["left_over"]) == names
    assert not set(report["used"]) & set(report["left_over"])


def test_a_dry_run_lists_every_tensor_and_writes_nothing(published, tmp_path, capsys):
    assert convert_llm(published, tmp_path / "out", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert (
        "vit: blocks.2.attn.v_bias -> qformer.safetensors: vision_model.encoder.layers.2.self_attn.qkv.bias"
        in shown
    )
    assert "left over  qformer: t5_proj.weight" in shown
    first = published / "stage1.ckpt"
    assert convert_stages(tmp_path / "out", "--stage1", first, "--bos", 2, "--dry-run") == 0
    assert "131 tensors used, 0 left over, none missing." in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_padding_row_behind_the_vocabulary_is_replaced_as_the_published_code_did(
    published, tmp_path, capsys
):
    longer = files.Sizes(vocabulary=SIZES.vocabulary + 1)
    (tmp_path / "vicuna").mkdir()
    files.llama_config(longer).save_pretrained(tmp_path / "vicuna")
    shutil.copy(published / "vicuna" / "tokenizer.model", tmp_path / "vicuna")
    weights = files.filled(files.llama(longer), 1)
    torch.save(weights, tmp_path / "vicuna" / "pytorch_model.bin")
    assert convert_llm(published, tmp_path / "out", vicuna=tmp_path / "vicuna") == 0
    assert "Vicuna's padding row is replaced, as the published code did" in capsys.readouterr().out
    table = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(table[:320], weights["lm_head.weight"][:320])
    assert torch.allclose(table[320:], table[:320].mean(0).expand(9, -1), atol=1e-6)


def test_tensors_stay_on_the_disk_until_they_are_used(tmp_path):
    def held() -> int:
        """Memory of the process's own, in bytes."""
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    file = tmp_path / "large.pth"
    torch.save({"model": {"weight": torch.ones(32, 2**20)}}, file)
    before = held()
    tensors = read_tensors(file, "model")
    assert tensors["weight"].sum() == 32 * 2**20
    save_checked(tensors, tmp_path / "large.safetensors", {})
    assert held() - before < 64 * 2**20  # of 128 MB


# What its prompts begin with


def test_auto_knows_the_published_files_and_says_so_of_others(published, monkeypatch):
    file = published / "stage1.ckpt"
    with pytest.raises(BadInputError, match="none of the published files.*--bos 2.*else --bos 1"):
        minigpt5.find_bos("auto", file)
    monkeypatch.setitem(minigpt5.PUBLISHED, "mine", (file.stat().st_size, "", "", 2))
    assert minigpt5.find_bos("auto", file) == 2
    assert minigpt5.find_bos("1", file) == 1
    monkeypatch.setitem(minigpt5.PUBLISHED, "mine", (file.stat().st_size, "", "", None))
    with pytest.raises(BadInputError, match="is mine, which may begin its prompts with id 1 or 2"):
        minigpt5.find_bos("auto", file)
    monkeypatch.setitem(minigpt5.PUBLISHED, "mine", (file.stat().st_size, "no digest begins so", "", 2))
    with pytest.raises(BadInputError, match="none of the published"):
        minigpt5.find_bos("auto", file)


# Broken input


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile-was-run",)


def refused(capsys, code: int) -> str:
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_stage_files_that_are_swapped_are_named(published, tmp_path, capsys):
    first, second = published / "stage1.ckpt", published / "stage2.ckpt"
    code = convert_stages(tmp_path / "out", "--stage1", second, "--stage2", first)
    assert "stage2.ckpt was given as --stage1 but is a checkpoint of stage 2" in refused(capsys, code)
    code = convert_stages(tmp_path / "out", "--stage1", first, "--stage2", first)
    assert "given as --stage2 but is a checkpoint of stage 1" in refused(capsys, code)


def test_stage_two_alone_asks_for_stage_one(published, tmp_path, capsys):
    code = convert_stages(tmp_path / "out", "--stage2", published / "stage2.ckpt")
    assert "Stage 2 alone is not whole" in refused(capsys, code)


def test_stages_that_do_not_belong_together_are_refused(published, tmp_path, capsys):
    other = files.stage2(files.Sizes(width=64))
    torch.save({"state_dict": files.filled(other, 6)}, tmp_path / "other.ckpt")
    flags = ("--stage1", published / "stage1.ckpt", "--stage2", tmp_path / "other.ckpt", "--bos", 1)
    assert "Do the files belong together" in refused(capsys, convert_stages(tmp_path / "out", *flags))


@pytest.mark.parametrize("gone", ["t2i_decoder_prompt", "fc.2.bias", "model.llama_model.lm_head.weight"])
def test_a_checkpoint_that_lacks_a_tensor_names_it(published, tmp_path, capsys, gone):
    tensors = files.filled(files.stage1(SIZES), 5)
    del tensors[gone]
    torch.save({"state_dict": tensors}, tmp_path / "stage1.ckpt")
    error = refused(
        capsys, convert_stages(tmp_path / "out", "--stage1", tmp_path / "stage1.ckpt", "--bos", 1)
    )
    assert {"t2i_decoder_prompt": "queries"}.get(gone, gone.removeprefix("model.llama_model.")) in error


def test_a_projection_into_another_size_of_vicuna_is_refused(published, tmp_path, capsys):
    wide = files.projection(files.Sizes(llm_width=40))
    torch.save({"model": files.filled(wide, 4)}, tmp_path / "13b.pth")
    error = refused(capsys, convert_llm(published, tmp_path / "out", projection=tmp_path / "13b.pth"))
    assert "leads into an LLM of width 40, but --vicuna is 24 wide (7B: 4096, 13B: 5120)" in error


@pytest.mark.parametrize("legacy", [False, True])
def test_a_truncated_file_is_said_to_be_cut_short(published, tmp_path, capsys, legacy):
    whole = tmp_path / "whole.pth"
    torch.save({"model": files.filled(files.vit(SIZES), 2)}, whole, _use_new_zipfile_serialization=not legacy)
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    error = refused(capsys, convert_llm(published, tmp_path / "out", vit=tmp_path / "cut.pth"))
    assert "cut.pth" in error and "cut short" in error


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_is_refused_named_and_never_run(published, tmp_path, capsys, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "hostile.ckpt"
    if zipped:
        torch.save({"state_dict": {"fc.0.weight": Hostile()}}, file)
    else:
        file.write_bytes(pickle.dumps({"state_dict": Hostile()}, protocol=2))
    error = refused(capsys, convert_stages(tmp_path / "out", "--stage1", file, "--bos", 1))
    assert "it would run code" in error and "mkdir" in error and "hostile.ckpt" in error
    assert not (tmp_path / "hostile-was-run").exists()


def test_a_vocabulary_of_the_wrong_size_is_refused(published, converted, tmp_path, capsys):
    other = shutil.copytree(published / "vicuna", tmp_path / "vicuna")
    for vocabulary in (318, 324):
        files.write_tokenizer(other / "tokenizer.model", vocabulary)
        error = refused(capsys, convert_llm(published, tmp_path / "out", vicuna=other))
        assert f"has 320 rows, but tokenizer.model beside it has a vocabulary of {vocabulary}" in error
    longer = files.stage1(files.Sizes(vocabulary=SIZES.vocabulary + 1))
    torch.save({"state_dict": files.filled(longer, 5)}, tmp_path / "longer.ckpt")
    flags = ("--stage1", tmp_path / "longer.ckpt", "--bos", 1, "--llm", converted / "llm")
    error = refused(capsys, convert_stages(tmp_path / "out", *flags))
    assert "rows 321 to 328 (8)" in error and "rows 320 to 327 (8)" in error


def test_a_number_of_heads_that_cannot_be_is_refused(published, tmp_path, capsys):
    error = refused(capsys, convert_llm(published, tmp_path / "out", "--vit-heads", "16"))
    assert "a width of 20 cannot be split over 16 heads" in error


def test_a_file_without_the_part_it_was_given_for_is_refused(published, tmp_path, capsys):
    error = refused(capsys, convert_llm(published, tmp_path / "out", vit=published / "projection.pth"))
    assert "--vit holds no EVA ViT" in error
    error = refused(capsys, convert_llm(published, tmp_path / "out", qformer=published / "eva_vit_g.pth"))
    assert "--qformer has no ln_vision" in error
    error = refused(capsys, convert_llm(published, tmp_path / "out", vicuna=published))
    assert "has no config.json" in error
    assert "holds no tensors" in refused(
        capsys, convert_llm(published, tmp_path / "out", projection=_saved(tmp_path, {"a": 1}))
    )


def _saved(folder: Path, content: object) -> Path:
    torch.save(content, folder / "saved.pth")
    return folder / "saved.pth"


def test_a_conversion_that_fails_leaves_the_old_folder_and_nothing_else(published, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert convert_stages(out, "--stage1", published / "stage1.ckpt", "--bos", 2) == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.rglob("*")}
    monkeypatch.setattr(
        minigpt5, "check_file", lambda *_: (_ for _ in ()).throw(BadInputError("not the same"))
    )
    assert convert_stages(out, "--stage1", published / "stage1.ckpt", "--bos", 1) == 2
    assert {path.name: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_adapter_of_whole_matrices_does_not_fit_an_llm_with_one_for_both(converted, tiny_llm):
    with pytest.raises(BadInputError):
        read_adapter(converted / "two" / "adapter", tiny_llm.causal_lm, tiny_llm.voken_ids)
    own = load_llm(converted / "llm")
    read_adapter(converted / "two" / "adapter", own.causal_lm, own.voken_ids, own.tied_head)
    with pytest.raises(
        BadInputError, match="one matrix for both"
    ):  # as it was loaded, whatever a host did since
        read_adapter(converted / "two" / "adapter", own.causal_lm, own.voken_ids, tied_head=True)


# In the main job


TURNS = [
    Turn("Mia the fox.", "", image_tokens=torch.zeros(6, SIZES.llm_width)),
    Turn(NEXT, "She sees snow!", image_tokens=torch.ones(6, SIZES.llm_width)),
    Turn("What should happen then?"),
]
ASKED = {
    VIST: f"{STORY_SYSTEM}###Human:Mia the fox.<Img><ImageHere></Img>She sees snow!<Img><ImageHere></Img>\n "
    "What should happen then? ###Assistant:",
    MMDIALOG: f"{DIALOGUE_SYSTEM} ###Human: Mia the fox. ###Assistant: <Img><ImageHere></Img> "
    "###Human: What should happen then? ###Assistant:",
    CC3M: "what should happen then?",
}


@pytest.mark.parametrize("name", ["VIST", "MMDIALOG", "CC3M"])
@pytest.mark.parametrize(("folder", "bos"), [("one", 2), ("two", 1)])
def test_a_prompt_has_the_ids_that_the_published_tokenizer_gave(published, converted, name, folder, bos):
    """Beside the slow tokenizer's rules, straight on the sentencepiece file."""
    wording = {"VIST": VIST, "MMDIALOG": MMDIALOG, "CC3M": CC3M}[name]
    llm = load_adapter(load_llm(converted / "llm"), converted / folder / "adapter")
    turns = TURNS if name != "MMDIALOG" else [TURNS[0], TURNS[2]]
    prompt = wording.prompt(llm, turns)
    slow = PublishedTokenizer(published / "vicuna" / "tokenizer.model")
    assert prompt.ids == [bos, *slow.encode(ASKED[wording])]
    assert (
        prompt.ids.count(slow.image_id) == len(prompt.images) == {"VIST": 2, "MMDIALOG": 1, "CC3M": 0}[name]
    )
    assert prompt.length == len(prompt.ids) + 5 * len(prompt.images)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["default", "published_vist", "published_mmdialog", "published_cc3m"])
def test_the_converted_files_tell_a_story_from_the_command_line(converted, tmp_path, caplog, preset):
    from minigpt5_core.cli import main as tell

    flags = {"llm": "llm", "adapter": "one/adapter", "mapper": "one/mapper.safetensors"}
    parts = [word for flag, file in flags.items() for word in (f"--{flag}", str(converted / file))]
    out = tmp_path / "story"
    number = "1" if preset == "published_cc3m" else "2"
    assert (
        tell(["A fox.", *parts, "--preset", preset, "--scenes", number, "--steps", "1", "--out", str(out)])
        == 0
    )
    story = load_story(out)
    assert len(story.scenes) == int(number)
    if preset == "default":  # the published ones leave it to the LLM
        assert all(scene.picture for scene in story.scenes)
    assert "other weights" not in caplog.text  # which LLM the mapper knows is not known


def test_the_node_lays_the_whole_matrices_over_the_llm(pack, host, converted):
    models = Path(host("folder_paths").models_dir)
    shutil.copytree(converted / "two" / "adapter", models / "loras" / "two")
    shutil.copytree(converted / "llm", models / "LLM" / "vicuna")
    (llm,) = pack.run("MiniGPT5LoadLLM", llm_name="vicuna", dtype="float32").args
    (adapted,) = pack.run("MiniGPT5LoadAdapter", llm=llm, adapter_name="two").args
    assert llm.has_vision and adapted.frozen.bos_id == 1 and llm.frozen.bos_id is None
    merged = load_adapter(load_llm(converted / "llm"), converted / "two" / "adapter").causal_lm.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        [(strength, patch, *_)] = adapted.patcher.patches[f"causal_lm.{name}"]
        found = llm.frozen.causal_lm.state_dict()[name] + strength * patch[1][0]
        assert torch.allclose(found, merged[name], atol=1e-5)


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert convert_stages(tmp_path, "--stage1", tmp_path / "none.ckpt") == 2
    assert "a folder with other things in it. Name a new or an empty one." in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "mine"
