"""Reference attention on a tiny UNet: what changes, what does not, and that nothing is left behind."""

import pytest
import torch

from minigpt5_core.diffusion import load_diffusion
from trainer.storybook.benchmark.reference_attention import looking_at


@pytest.fixture
def pipeline(tiny_diffusion_folder):
    return load_diffusion(tiny_diffusion_folder)


def draw(pipeline, seed=0):
    return pipeline(
        prompt="a fox",
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).images


def test_a_picture_that_looks_at_another_is_another(pipeline):
    alone, references = draw(pipeline), torch.randn(2, 4, 16, 16)
    with looking_at(pipeline, references[:1]):
        first = draw(pipeline)
    with looking_at(pipeline, references[1:]):
        second = draw(pipeline)
    assert not torch.allclose(alone, first) and not torch.allclose(first, second)


def test_early_steps_are_left_alone(pipeline):
    reference = torch.randn(1, 4, 16, 16)
    with looking_at(pipeline, reference, below=0):
        assert torch.equal(draw(pipeline), draw(pipeline))
        unlooking = draw(pipeline)
    assert torch.equal(unlooking, draw(pipeline))


def test_the_unet_is_afterwards_as_it_was(pipeline):
    before, processors = draw(pipeline), pipeline.unet.attn_processors
    with pytest.raises(KeyboardInterrupt), looking_at(pipeline, torch.randn(1, 4, 16, 16)):
        raise KeyboardInterrupt
    assert torch.equal(draw(pipeline), before)
    assert pipeline.unet.attn_processors == processors and "forward" not in vars(pipeline.unet)


def test_self_attention_finds_keys_of_both_and_cross_attention_only_the_text(pipeline, monkeypatch):
    """The number of keys that scaled dot-product attention is given, layer by layer."""
    plain, keys = torch.nn.functional.scaled_dot_product_attention, []

    def counted(query, key, value, **keywords):
        keys.append((query.shape[-2], key.shape[-2]))
        return plain(query, key, value, **keywords)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    latents, text = torch.randn(2, 4, 16, 16), torch.randn(2, 77, pipeline.unet.config.cross_attention_dim)
    pipeline.scheduler.set_timesteps(2)
    with looking_at(pipeline, torch.randn(1, 4, 16, 16), below=1001):
        pipeline.unet(latents, pipeline.scheduler.timesteps[0], encoder_hidden_states=text)
    half = len(keys) // 2
    for (queries, alone), (again, both) in zip(keys[:half], keys[half:], strict=True):
        assert queries == again
        assert both == (77 if alone == 77 else 2 * alone)
