import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler

from minigpt5_core.losses import (
    Statistics,
    caption_loss,
    compute_snr,
    diffusion_loss,
    drop_states,
    voken_loss,
)
from trainer.storybook.models.diffusion import DiffusionRecipe, noise_loss


@pytest.mark.trains
def test_the_default_weights_are_the_published_ones():
    from trainer.stages.align import AlignRecipe
    from trainer.stages.finetune import FinetuneRecipe

    for loss in (AlignRecipe().loss, FinetuneRecipe().loss):
        assert (loss.text_weight, loss.image_weight, loss.caption_weight) == (0.01, 1.0, 0.1)


def test_voken_loss_is_the_mean_negative_log_likelihood_of_the_targets():
    # the first position gives its target the odds 3 : 1, the second even odds
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0]]])
    found = voken_loss(logits, torch.tensor([[1, 0]]))
    assert found.item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)


def test_positions_with_the_ignored_label_do_not_count():
    logits = torch.tensor([[[0.0, math.log(3)], [7.0, 0.0], [0.0, 0.0]]])
    assert voken_loss(logits, torch.tensor([[1, -100, -100]])).item() == pytest.approx(math.log(4 / 3))


def test_a_batch_without_any_target_has_loss_zero():
    logits = torch.randn(1, 3, 5, requires_grad=True)
    loss = voken_loss(logits, torch.full((1, 3), -100))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_voken_loss_takes_each_position_s_own_target():
    logits = torch.zeros(2, 3, 7)
    assert voken_loss(logits, torch.tensor([[4, 5, 6]] * 2)).item() == pytest.approx(math.log(7))


def test_the_signal_to_noise_ratio_is_that_of_the_timestep():
    assert compute_snr(torch.tensor([0.9, 0.5, 0.2]), torch.tensor([2, 0])).tolist() == pytest.approx(
        [0.25, 9.0]
    )


def test_min_snr_lowers_the_weight_of_clean_samples_only():
    # squared errors 4 and 1; weights min(10, 5) / 10 = 0.5 and min(2, 5) / 2 = 1
    prediction = torch.stack([torch.full((1, 2, 2), 2.0), torch.full((1, 2, 2), -1.0)])
    loss = diffusion_loss(prediction, torch.zeros(2, 1, 2, 2), torch.tensor([10.0, 2.0]))
    assert loss.item() == pytest.approx((0.5 * 4 + 1 * 1) / 2)


def test_pure_noise_has_weight_one():
    loss = diffusion_loss(torch.full((1, 4), 3.0), torch.zeros(1, 4), torch.tensor([0.0]))
    assert loss.item() == pytest.approx(9.0)


def test_caption_loss_is_the_mean_squared_distance():
    answer, target = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.0, 5.0]]])
    assert caption_loss(answer, target).item() == pytest.approx((1 + 9) / 2)


def test_the_standardised_caption_loss_counts_in_deviations():
    answer, target = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.0, 5.0]]])
    loss = caption_loss(answer, target, std=torch.tensor([[0.5, 3.0]]))
    assert loss.item() == pytest.approx((2**2 + 1**2) / 2)


def test_the_statistics_of_a_target_are_per_token_and_dimension_with_a_smallest_deviation():
    found = Statistics(smallest=0.01)
    for part in ([[[1.0, 7.0]], [[5.0, 7.0]]], [[[9.0, 7.0]]]):
        found.add(torch.tensor(part))
    assert found.mean.tolist() == [[5.0, 7.0]]
    assert found.std.flatten().tolist() == pytest.approx([(32 / 3) ** 0.5, 0.01])
    generator = torch.Generator().manual_seed(0)
    wide = 30 + torch.randn(64, 3, 5, generator=generator)
    many = Statistics()
    for part in wide.split(10):
        many.add(part)
    deviation, mean = torch.std_mean(wide, dim=0, correction=0)
    assert torch.allclose(many.mean, mean) and torch.allclose(many.std, deviation)


def test_half_precision_inputs_are_compared_in_float32():
    answer = torch.full((1, 1, 1), 300.0, dtype=torch.float16)
    assert caption_loss(answer, torch.zeros_like(answer)).item() == 90000.0  # beyond float16


def test_dropped_states_are_zero_and_send_no_gradient_and_the_others_stay():
    states = torch.ones(200, 2, 3, requires_grad=True)
    kept, dropped = drop_states(states, 0.1, torch.Generator().manual_seed(0))
    kept.sum().backward()
    assert 5 <= dropped.sum() <= 40
    assert not kept[dropped].any() and kept[~dropped].eq(1).all()
    assert not states.grad[dropped].any() and states.grad[~dropped].eq(1).all()


def test_dropout_is_repeatable_and_can_be_switched_off():
    states = torch.ones(50, 1, 1)
    draws = [drop_states(states, 0.5, torch.Generator().manual_seed(3))[1] for _ in range(2)]
    assert torch.equal(*draws)
    assert not drop_states(states, 0.0)[1].any()


class _Silent(torch.nn.Module):
    """A UNet that predicts no noise at all."""

    def forward(self, noisy: torch.Tensor, *rest: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=torch.zeros_like(noisy))


@pytest.mark.parametrize("most", [1.0, 4.0, 100.0])
def test_noisy_timesteps_count_as_far_as_they_would_by_the_pictures_own_error(most):
    """The clean latents' error is the noise's over the signal-to-noise ratio; here times gamma, up to `most`."""
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    latents, cells = torch.randn(64, 4, 4, 4), torch.ones(64, 1, 4, 4)
    torch.manual_seed(3)
    found = noise_loss(
        _Silent(), scheduler, latents, torch.zeros(64), cells, DiffusionRecipe(layout_weight=most)
    )
    torch.manual_seed(3)
    noise, times = torch.randn_like(latents), torch.randint(0, 1000, (64,))
    kept = scheduler.alphas_cumprod[times]
    weights = torch.minimum(5 * (1 - kept) / kept, torch.tensor(most))
    assert torch.allclose(found, (noise.square().mean((1, 2, 3)) * weights).mean(), rtol=1e-4)


def test_an_offset_moves_the_noise_of_each_channel_as_a_whole():
    """With a prediction of nothing at the weight 1 of every timestep the loss is the noise's mean square."""
    scheduler = DDPMScheduler(beta_start=0.9, beta_end=0.99)  # noise alone, nearly from the first timestep on
    latents, cells = torch.zeros(512, 4, 4, 4), torch.ones(512, 1, 4, 4)
    torch.manual_seed(3)
    plain, moved = (
        noise_loss(
            _Silent(), scheduler, latents, torch.zeros(512), cells, DiffusionRecipe(noise_offset=offset)
        )
        for offset in (0.0, 2.0)
    )
    assert moved / plain == pytest.approx(1 + 2.0**2, rel=0.1)
