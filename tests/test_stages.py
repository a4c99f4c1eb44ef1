"""Both stages end to end on a tiny LLM and a tiny diffusion model: what moves, what does not, and resuming."""

import pytest
import torch
from safetensors.torch import load_file

from minigpt5_core.conditioning.mapper_file import load_mapper
from minigpt5_core.errors import BadInputError
from minigpt5_core.llm import load_adapter, load_llm
from minigpt5_core.pipeline import Parts, load
from minigpt5_core.story import Story
from tests.stages import stopping_diffusion, train_align, train_finetune
from trainer.common.recipe import change_recipe, make_recipe
from trainer.stages.align import AlignRecipe
from trainer.stages.finetune import FinetuneRecipe

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def align_recipe(tiny_llm_folder, tiny_diffusion_folder):
    return make_recipe(AlignRecipe,
        llm=str(tiny_llm_folder), diffusion=str(tiny_diffusion_folder), captions=8, steps=4, batch=4,
        image_from=0.0, preview_every=4, save_every=2, dropout=0.3,
    )  # fmt: skip


@pytest.fixture
def finetune_recipe(tiny_llm_folder, tiny_diffusion_folder):
    return make_recipe(FinetuneRecipe,
        llm=str(tiny_llm_folder), diffusion=str(tiny_diffusion_folder), stories=4, steps=4, batch=1,
        image_from=0.0, preview_every=4, save_every=2,
    )  # fmt: skip


def unmoved(recipe):
    """The same training with nothing learned: what it leaves is what the other one began with."""
    rates = {"lora_lr": 0.0} if recipe.stage == "finetune" else {}
    return change_recipe(recipe, steps=1, mapper_lr=0.0, voken_lr=0.0, **rates)


def base_weights(model):
    """The LLM's own weights, by their names before PEFT; tied heads once."""
    return {
        name.replace(".token_adapter", "").replace(".base_layer", ""): tensor
        for name, tensor in model.state_dict().items()
        if "lora_" not in name and "trainable_tokens" not in name and "lm_head" not in name
    }


@pytest.mark.slow
def test_align_moves_every_trained_parameter_and_no_frozen_one(align_recipe, tmp_path, tiny_llm_folder):
    train_align(unmoved(align_recipe), tmp_path / "start")
    llm, mapper = train_align(align_recipe, tmp_path / "run")
    started = load_file(tmp_path / "start" / "mapper.safetensors")
    for name, tensor in mapper.named_parameters():
        assert not torch.equal(tensor, started[name]), name
    fresh = base_weights(load_llm(tiny_llm_folder).causal_lm)
    trained = base_weights(llm.causal_lm)
    assert fresh.keys() == trained.keys()
    assert all(torch.equal(fresh[name], trained[name]) for name in fresh)
    before, _ = load_file(tmp_path / "start" / "adapter" / "adapter_model.safetensors").values()
    after, tied = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors").values()
    assert torch.equal(after, tied)  # this LLM's input and output rows are one
    assert (before != after).any(1).all()


@pytest.mark.slow
def test_finetune_moves_every_trained_parameter_and_no_frozen_one(
    finetune_recipe, align_recipe, tmp_path, tiny_llm_folder
):
    train_align(align_recipe, tmp_path / "align")
    begun, _ = train_finetune(unmoved(finetune_recipe), tmp_path / "start", tmp_path / "align")
    llm, mapper = train_finetune(finetune_recipe, tmp_path / "run", tmp_path / "align")
    started, _ = load_mapper(tmp_path / "align" / "mapper.safetensors")
    for name, tensor in mapper.named_parameters():
        assert not torch.equal(tensor, started.state_dict()[name]), name
    trained = {name: p for name, p in llm.causal_lm.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2 + 1
    before = begun.causal_lm.state_dict()
    for name, tensor in trained.items():
        assert not torch.equal(tensor, before[name]), name
    fresh, after = base_weights(load_llm(tiny_llm_folder).causal_lm), base_weights(llm.causal_lm)
    rows = len(fresh["model.embed_tokens.weight"]) - 8  # the eight added rows came from align
    for name in fresh:
        assert (
            torch.equal(fresh[name][:rows], after[name][:rows])
            if "embed" in name
            else torch.equal(fresh[name], after[name])
        )


@pytest.mark.slow
@pytest.mark.parametrize("head", ["tiny", "untied"])
def test_a_saved_adapter_gives_the_states_of_the_trained_llm(finetune_recipe, tmp_path, request, head):
    folder = request.getfixturevalue(f"{head}_llm_folder")
    llm, _ = train_finetune(change_recipe(finetune_recipe, llm=str(folder)), tmp_path / "run")
    llm.causal_lm.eval()
    again = load_adapter(load_llm(folder), tmp_path / "run" / "adapter")
    ids = torch.tensor([[1, 2, 3, *llm.voken_ids]])
    with torch.no_grad():
        states = [one.decoder(inputs_embeds=one.embed(ids)).last_hidden_state for one in (llm, again)]
        logits = [one.logits(hidden) for one, hidden in zip((llm, again), states, strict=True)]
    assert torch.allclose(states[0], states[1], atol=1e-5)
    assert torch.allclose(logits[0], logits[1], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["align", "finetune"])
def test_an_output_head_of_its_own_learns_its_rows_too(
    stage, align_recipe, finetune_recipe, tmp_path, untied_llm_folder
):
    recipe, run = {"align": (align_recipe, train_align), "finetune": (finetune_recipe, train_finetune)}[stage]
    run(change_recipe(recipe, llm=str(untied_llm_folder)), tmp_path / "run")
    plain, trained = load_llm(untied_llm_folder), load_llm(untied_llm_folder)
    load_adapter(trained, tmp_path / "run" / "adapter")
    before, after = (llm.causal_lm.get_output_embeddings().weight for llm in (plain, trained))
    first, last = plain.voken_ids[0], plain.voken_ids[-1]
    assert not torch.equal(before[first], after[first])
    assert torch.equal(before[:first], after[:first])
    assert torch.equal(before[last + 1 :], after[last + 1 :])


@pytest.mark.slow
def test_align_on_stories_goes_on_from_finetune_and_leaves_its_lora(finetune_recipe, align_recipe, tmp_path):
    train_finetune(finetune_recipe, tmp_path / "first")
    train_align(change_recipe(align_recipe, captions=1, stories=2), tmp_path / "second", tmp_path / "first")
    first, second = (
        load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("first", "second")
    )
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]) == ("lora_" in name), name
    assert any("lora_" in name for name in first)
    mappers = [load_file(tmp_path / run / "mapper.safetensors") for run in ("first", "second")]
    assert not torch.equal(mappers[0]["queries"], mappers[1]["queries"])


@pytest.mark.slow
def test_finetune_goes_on_from_finetune(finetune_recipe, tmp_path):
    train_finetune(finetune_recipe, tmp_path / "first")
    still = change_recipe(finetune_recipe, steps=1, lora_lr=0.0, voken_lr=0.0, mapper_lr=0.0)
    train_finetune(still, tmp_path / "second", tmp_path / "first")
    first, second = (
        load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("first", "second")
    )
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["align", "finetune"])
def test_an_interrupted_run_resumes_bit_exactly(stage, align_recipe, finetune_recipe, tmp_path):
    def run(out, **options):
        if stage == "align":
            return train_align(align_recipe, out, **options)
        return train_finetune(finetune_recipe, out, **options)

    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", load_diffusion=stopping_diffusion(after=2))
    assert [state.name for state in (tmp_path / "parts" / "states").iterdir()] == ["step_000002"]
    run(tmp_path / "parts", resume=True)
    for file in ("mapper.safetensors", "adapter/adapter_model.safetensors"):
        whole, parts = (load_file(tmp_path / out / file) for out in ("whole", "parts"))
        assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.slow
def test_what_was_trained_tells_a_story(
    align_recipe, finetune_recipe, tmp_path, tiny_llm_folder, tiny_diffusion_folder
):
    train_align(align_recipe, tmp_path / "align")
    train_finetune(finetune_recipe, tmp_path / "run", tmp_path / "align")
    parts = Parts(
        tiny_llm_folder,
        tmp_path / "run" / "adapter",
        tmp_path / "run" / "mapper.safetensors",
        tiny_diffusion_folder,
    )
    scenes = list(load(parts).tell(Story("Mia the fox.", 0), scenes=2, steps=2))
    assert [scene.picture.size for scene in scenes] == [(128, 128)] * 2
    again = list(load(parts).tell(Story("Mia the fox.", 0), scenes=2, steps=2))
    assert [(s.text, s.picture.tobytes()) for s in scenes] == [(s.text, s.picture.tobytes()) for s in again]


@pytest.mark.slow
def test_the_number_of_tokens_is_a_setting(align_recipe, tmp_path):
    with pytest.raises(BadInputError, match="tokens is 12, but the text encoder gives 77"):
        train_align(change_recipe(align_recipe, tokens=12), tmp_path / "run")
    train_align(change_recipe(align_recipe, tokens=12, caption_weight=0.0), tmp_path / "run")
    mapper, header = load_mapper(tmp_path / "run" / "mapper.safetensors")
    assert mapper(torch.zeros(1, 8, header.llm_width)).tokens.shape == (1, 12, header.space.width)


def test_bad_folders_and_names_are_refused(align_recipe, finetune_recipe, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInputError, match="lies at or below a file"):
        train_align(align_recipe, tmp_path / "file" / "run")
    with pytest.raises(BadInputError, match="holds no saved state"):
        train_align(align_recipe, tmp_path / "new", resume=True)
    with pytest.raises(BadInputError, match="holds no mapper.safetensors"):
        train_finetune(finetune_recipe, tmp_path / "new", tmp_path)
    with pytest.raises(BadInputError, match="Unknown space 'sd9'. Known: sd15"):
        train_align(change_recipe(align_recipe, space="sd9"), tmp_path / "new")
