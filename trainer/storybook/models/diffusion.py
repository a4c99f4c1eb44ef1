"""Trains the storybook's text-to-image model from scratch: tokenizer, text encoder, UNet; diffusers layout.

It is the "pretrained diffusion model" of the method (arXiv 2310.02239) and the two-stage baseline's text-to-image
model, so its text encoder learns full captions and story sentences alike. Latents are encoded once and kept.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor

from minigpt5_core.errors import BadInputError
from minigpt5_core.losses import compute_snr, diffusion_loss
from minigpt5_core.model_index import check_index

from ...common.images import grid
from ...training.optimise import optimise
from ..world.source import PREVIEWS
from ..world.state import State
from ..world.stories import change_a_fact
from .autoencoder import LOCAL_SAFETENSORS, AutoencoderRecipe, train_autoencoder
from .diffusion_data import encode_scenes
from .diffusion_model import DiffusionRecipe, build_pipeline, encode_texts


def train_diffusion(recipe: DiffusionRecipe, autoencoder: Path, out: Path, start: Path | None = None) -> None:
    """Trains and writes the diffusers folder `out`; from the weights of the folder `start` where given."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    vae = AutoencoderTiny.from_pretrained(autoencoder, **LOCAL_SAFETENSORS)
    pipeline = (
        StableDiffusionPipeline.from_pretrained(
            start, vae=vae, torch_dtype=torch.float32, **LOCAL_SAFETENSORS
        )
        if start
        else build_pipeline(recipe, autoencoder)
    )
    unet, text_encoder = pipeline.unet.train(), pipeline.text_encoder.train()
    data = encode_scenes(pipeline.vae, recipe.scenes, recipe.seed)
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, recipe.steps, pct_start=0.05
    )
    average = EMAModel(unet.parameters(), decay=recipe.ema_decay, use_ema_warmup=True, power=0.75)

    def step_loss(step: int) -> dict[str, Tensor]:
        if step == max(1, int(recipe.steps * recipe.freeze_text_encoder_share)):
            freeze_text_encoder(pipeline, average, out)
        rows = rng.choices(range(len(data.latents)), k=recipe.batch)
        conditioning = encode_texts(pipeline, data.texts(rows, recipe, rng))
        weights = 1 + (recipe.figure_weight - 1) * data.figures[rows]
        loss = noise_loss(unet, noise_scheduler, data.latents[rows], conditioning, weights, recipe)
        close = torch.zeros(())
        if next(text_encoder.parameters()).requires_grad:
            close = closeness(pipeline, [data.states[row] for row in rows], recipe.margin, rng)
        return {"loss": loss, "close": close}

    optimise(
        optimizer,
        schedule,
        step_loss,
        steps=recipe.steps,
        samples=recipe.batch,
        save=lambda: save_pipeline(pipeline, average, out),
        save_every=400,
        weights={"close": recipe.margin_weight},
        after_step=lambda: average.step(unet.parameters()),
    )


def freeze_text_encoder(pipeline: StableDiffusionPipeline, average: EMAModel, out: Path) -> None:
    """From here on only the UNet learns: a mapper can be aligned with the text encoder meanwhile."""
    pipeline.text_encoder.requires_grad_(False)
    pipeline.text_encoder.save_pretrained(out / "text_encoder")
    save_pipeline(pipeline, average, out)
    (out / "text_encoder_is_final").touch()


def noise_loss(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    latents: Tensor,
    conditioning: Tensor,
    weights: Tensor,
    recipe: DiffusionRecipe,
) -> Tensor:
    """The method's own diffusion loss at random timesteps, its cells weighted by `weights` (B, 1, h, w).

    Its minimum is the same for any weights of cells or timesteps: they only decide what is learned first.
    """
    noise = torch.randn_like(latents)
    steps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),))
    if recipe.noise_offset:
        noise = noise + recipe.noise_offset * torch.randn_like(latents[:, :, :1, :1])
    predicted = unet(scheduler.add_noise(latents, noise, steps), steps, conditioning).sample
    snr = compute_snr(scheduler.alphas_cumprod, steps)
    layout = (recipe.min_snr_gamma / snr).clamp(min=1, max=max(1.0, recipe.layout_weight))
    scale = (weights / weights.mean() * layout[:, None, None, None]).sqrt()  # the loss squares it
    return diffusion_loss(predicted * scale, noise * scale, snr, recipe.min_snr_gamma)


def closeness(
    pipeline: StableDiffusionPipeline, states: Sequence[State], margin: float, rng: random.Random
) -> Tensor:
    """The mean of max(0, margin - d), d being how far apart a caption and the same with one fact changed are encoded.

    d is the mean squared difference in units of the standard deviation over captions: 2 for two random captions.
    """
    changed = [change_a_fact(state, rng) for state in states]
    encoded = encode_texts(pipeline, [state.caption() for state in (*states, *changed)])
    std = encoded.detach().std(0).clamp(min=1e-2)
    original, other = encoded.chunk(2)
    distance = ((original - other) / std).square().mean((1, 2))
    return (margin - distance).relu().mean()


@torch.no_grad()
def save_pipeline(pipeline: StableDiffusionPipeline, average: EMAModel, out: Path) -> None:
    """Writes the folder with the averaged UNet, and a preview of fixed prompts beside it."""
    average.store(pipeline.unet.parameters())
    average.copy_to(pipeline.unet.parameters())
    pipeline.save_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    pictures = pipeline(
        list(PREVIEWS), num_inference_steps=20, guidance_scale=3.0, generator=generator
    ).images
    grid(pictures, 4).save(out.parent / f"{out.name}_preview.png")
    average.restore(pipeline.unet.parameters())


@dataclass(frozen=True)
class StorybookDiffusionRecipe:
    """The autoencoder is trained first, then text encoder and UNet. With 0 steps a part stays as it was."""

    autoencoder: AutoencoderRecipe = AutoencoderRecipe()
    diffusion: DiffusionRecipe = DiffusionRecipe()


def train_storybook_diffusion(recipe: StorybookDiffusionRecipe, out: Path, start: Path | None = None) -> None:
    """Writes the diffusers folder `out`; training starts from the weights of `start`, an earlier one."""
    if start and not (start / "model_index.json").is_file():
        raise BadInputError(f"--from {start} is not a diffusers folder: it has no model_index.json.")
    if not start and not (recipe.autoencoder.steps and recipe.diffusion.steps):
        raise BadInputError(
            "autoencoder.steps and diffusion.steps can be 0 only with --from, whose weights are then kept."
        )
    if start:
        check_index(start)
    autoencoder = start / "vae" if start else None
    if recipe.autoencoder.steps:
        autoencoder = out.parent / f"{out.name}_autoencoder"
        train_autoencoder(recipe.autoencoder, autoencoder, start / "vae" if start else None)
    assert autoencoder is not None
    if recipe.diffusion.steps:
        train_diffusion(recipe.diffusion, autoencoder, out, start)
    else:
        vae = AutoencoderTiny.from_pretrained(autoencoder, **LOCAL_SAFETENSORS)
        pipeline = StableDiffusionPipeline.from_pretrained(start, vae=vae, **LOCAL_SAFETENSORS)
        pipeline.save_pretrained(out)
