"""A learned prefix: what PEFT computes, trained by finetune, saved, laid over an LLM again."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from minigpt5_core.errors import BadInputError
from minigpt5_core.generate import Prompt, Sampling, StoryCache, generate
from minigpt5_core.llm import load_adapter, load_llm
from minigpt5_core.llm.adapter import ADAPTER_WEIGHTS, VOKEN_ROWS
from tests.stages import train_finetune
from trainer.common.recipe import make_recipe
from trainer.llm.adapters import save_adapter, with_prefix
from trainer.stages.finetune import FinetuneRecipe

pytestmark = pytest.mark.filterwarnings("ignore")


def random_prefix(folder, out, width=16, vokens=8):
    """An LLM with an untrained prefix, and the folder it was saved to."""
    llm = load_llm(folder, vokens)
    torch.manual_seed(1)
    llm, adapted = with_prefix(llm, 3, width)
    adapted.eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
    save_adapter(adapted, folder, out)
    return llm, adapted


@pytest.mark.parametrize("width", [0, 16])
@torch.no_grad()
def test_a_saved_prefix_gives_what_peft_gives(tiny_llm_folder, tmp_path, width):
    _, adapted = random_prefix(tiny_llm_folder, tmp_path / "adapter", width)
    ours = load_adapter(load_llm(tiny_llm_folder), tmp_path / "adapter")
    ids = torch.tensor([[5, 6, *ours.voken_ids], [7, 8, *ours.voken_ids]])
    found = ours.logits(
        ours.decoder(inputs_embeds=ours.embed(ids), past_key_values=ours.begin(2)).last_hidden_state
    )
    assert torch.allclose(found, adapted(ids).logits, atol=1e-4)
    assert not torch.allclose(found, ours.causal_lm(ids).logits, atol=1e-2)
    assert ours.context == load_llm(tiny_llm_folder).context - 3


def test_cached_batched_and_alone_are_one_with_a_prefix(tiny_llm_folder, tmp_path):
    random_prefix(tiny_llm_folder, tmp_path / "adapter")
    llm = load_adapter(load_llm(tiny_llm_folder), tmp_path / "adapter")
    greedy = Sampling(temperature=0.0, max_new_tokens=6)
    prompts = [Prompt([3, 4, 5, 6, 7]), Prompt([9, 8])]
    alone = [generate(llm, [prompt], greedy, [0])[0] for prompt in prompts]
    together = generate(llm, prompts, greedy, [0, 0])
    cache = StoryCache()
    generate(llm, [Prompt([3, 4, 9])], greedy, [0], cache)
    cached = generate(llm, prompts[:1], greedy, [0], cache)[0]
    afresh = generate(llm, prompts[1:], greedy, [0], cache)[0]  # nothing in common: only the prefix stays
    for one, other in zip((*alone, *alone), (*together, cached, afresh), strict=True):
        assert one.ids == other.ids
        assert torch.allclose(one.voken_states, other.voken_states, atol=1e-4)
    plain = generate(load_llm(tiny_llm_folder), prompts[:1], greedy, [0])[0]
    assert not torch.allclose(plain.voken_states, alone[0].voken_states, atol=1e-2)


@pytest.mark.slow
def test_finetune_trains_prefix_rows_and_mapper_and_nothing_else(
    tiny_llm_folder, tiny_diffusion_folder, tmp_path
):
    recipe = make_recipe(FinetuneRecipe,
        llm=str(tiny_llm_folder), diffusion=str(tiny_diffusion_folder), stories=4, steps=3, batch=1,
        image_from=0.0, preview_every=9, save_every=9, adapter="prefix", prefix_width=16,
    )  # fmt: skip
    llm, _ = train_finetune(recipe, tmp_path / "run")
    folder = tmp_path / "run" / "adapter"
    again, plain = load_adapter(load_llm(tiny_llm_folder), folder), load_llm(tiny_llm_folder)
    ids = torch.tensor([[1, 2, 3, *llm.voken_ids]])
    llm.causal_lm.eval()
    with torch.no_grad():
        states = [
            one.decoder(inputs_embeds=one.embed(ids), past_key_values=one.begin(1)).last_hidden_state
            for one in (llm, again)
        ]
    assert torch.allclose(*states, atol=1e-5)
    assert load_file(folder / ADAPTER_WEIGHTS)["prompt_embeddings"].abs().sum() > 0
    before, after = plain.causal_lm.state_dict(), again.causal_lm.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.embed_tokens.weight", "lm_head.weight"}  # the voken rows, tied
    assert (before["lm_head.weight"] != after["lm_head.weight"]).any(1).sum() == 8
    with pytest.raises(BadInputError, match="learned prefix"):
        train_finetune(recipe, tmp_path / "next", tmp_path / "run")


def deeper_llm(folder, tmp_path):
    """The tiny LLM with another number of layers."""
    llm = load_llm(folder)
    config = copy.deepcopy(llm.causal_lm.config)
    config.num_hidden_layers, config.layer_types = 3, None
    type(llm.causal_lm)(config).save_pretrained(tmp_path / "deeper")
    llm.tokenizer.save_pretrained(tmp_path / "deeper")
    return load_llm(tmp_path / "deeper")


def test_what_does_not_fit_is_said(tiny_llm_folder, tmp_path):
    folder = tmp_path / "adapter"
    llm, _ = random_prefix(tiny_llm_folder, folder)
    with pytest.raises(BadInputError, match="only one can stand in front"):
        load_adapter(load_adapter(load_llm(tiny_llm_folder), folder), folder)
    with pytest.raises(BadInputError, match=r"its prefix is \(3, .*expected \(tokens, "):
        load_adapter(deeper_llm(tiny_llm_folder, tmp_path), folder)
    with pytest.raises(BadInputError, match="Set vokens to 8"):
        load_adapter(load_llm(tiny_llm_folder, vokens=4), folder)
    (folder / VOKEN_ROWS).unlink()
    with pytest.raises(BadInputError, match=f"no {VOKEN_ROWS}"):
        load_adapter(load_llm(tiny_llm_folder), folder)


def test_an_unknown_kind_of_adapter_is_said():
    with pytest.raises(BadInputError, match="adapter is 'ia3'"):
        make_recipe(FinetuneRecipe, adapter="ia3")
