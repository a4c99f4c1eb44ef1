"""Trains the storybook's autoencoder: AutoencoderTiny, 8x, so that a 128x128 picture becomes 4x16x16 latents.

Why AutoencoderTiny: it has no normalisation. AutoencoderKL at a width that two CPU cores can train has one channel
a group, and group normalisation then erases each picture's own colours; it was tried here and came out washed out.
Being convolutions and ReLU only, a narrow one becomes the width-64 one that ComfyUI's VAE class builds, exactly, by
padding its weights with zeros. Training is on 64x64 crops of fresh scenes, taken where the lines are.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch import Tensor

from ...common.images import grid, to_pictures, to_tensor
from ...training.optimise import optimise
from ..world.render import CELL, render
from ..world.stories import random_state, training_state

CROP = 64
LOCAL_SAFETENSORS = {"local_files_only": True, "use_safetensors": True}  # nothing fetched or unpickled


@dataclass(frozen=True)
class AutoencoderRecipe:
    """How to train the autoencoder; `latent_noise` is added to latents so that the decoder forgives a UNet's errors."""

    width: int = 32
    latent_channels: int = 4
    steps: int = 9000
    freeze_encoder_share: float = 0.5
    batch: int = 6
    learning_rate: float = 1e-3
    latent_noise: float = 0.05
    seed: int = 0


def build_autoencoder(recipe: AutoencoderRecipe) -> AutoencoderTiny:
    """An untrained autoencoder of the recipe's size."""
    widths = (recipe.width,) * 4
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        latent_channels=recipe.latent_channels,
    )


def _crop(picture: Image.Image, rng: random.Random) -> Image.Image:
    left = CELL * rng.randint(0, 8)
    top = CELL * rng.choice((0, 2, 3, 4, 5, 6, 7, 8, 8, 8))  # more often below, where hero and prop stand
    return picture.crop((left, top, left + CROP, top + CROP))


def scenes(count: int, rng: random.Random) -> Tensor:
    """Fresh scenes, (count, 3, 128, 128) in [-1, 1]."""
    return to_tensor([render(random_state(rng), rng) for _ in range(count)])


def crops(count: int, rng: random.Random) -> Tensor:
    """Crops of fresh scenes, (count, 3, 64, 64) in [-1, 1]."""
    return to_tensor([_crop(render(training_state(rng), rng), rng) for _ in range(count)])


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of pixels and of their differences, which is what keeps lines sharp."""
    error = output - target
    across = (error[..., 1:] - error[..., :-1]).abs().mean()
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + across + down


@torch.no_grad()
def psnr(model: AutoencoderTiny, count: int = 64, seed: int = 123456) -> float:
    """Mean peak signal-to-noise ratio in dB over fresh whole scenes."""
    pictures = scenes(count, random.Random(seed))
    output = torch.cat([model(part).sample for part in pictures.split(8)]).clamp(-1, 1)
    mse = ((output - pictures) / 2).square().mean((1, 2, 3))
    return float((-10 * mse.log10()).mean())


def train_autoencoder(recipe: AutoencoderRecipe, out: Path, start: Path | None = None) -> None:
    """Trains and writes the diffusers folder `out`, a preview beside it; from the weights of `start` where given."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    model = (
        AutoencoderTiny.from_pretrained(start, **LOCAL_SAFETENSORS) if start else build_autoencoder(recipe)
    )
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), recipe.learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, recipe.steps, pct_start=0.03
    )

    def step_loss(step: int) -> dict[str, Tensor]:
        if step == max(1, int(recipe.steps * recipe.freeze_encoder_share)):
            freeze_encoder(model, out)
        pictures = crops(recipe.batch, rng)
        latents = model.encode(pictures).latents
        output = model.decode(latents + recipe.latent_noise * torch.randn_like(latents)).sample
        return {"loss": reconstruction_loss(output, pictures), "latents": latents.square().mean()}

    optimise(
        optimizer,
        schedule,
        step_loss,
        steps=recipe.steps,
        samples=recipe.batch,
        save=lambda: save_autoencoder(model, out),
        save_every=500,
        weights={"latents": 1e-3},
    )
    print(f"autoencoder: {psnr(model):.2f} dB on fresh scenes, in {out}")


def freeze_encoder(model: AutoencoderTiny, out: Path) -> None:
    """From here on only the decoder learns: latents no longer change, so a UNet can be trained on them meanwhile."""
    model.encoder.requires_grad_(False)
    measure_scale(model)
    save_autoencoder(model, out)
    (out / "encoder_is_final").touch()


@torch.no_grad()
def measure_scale(model: AutoencoderTiny) -> None:
    """Sets the scaling factor so that latents of whole scenes have a standard deviation of 1."""
    latents = model.encode(scenes(64, random.Random(1))).latents
    model.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))


@torch.no_grad()
def save_autoencoder(model: AutoencoderTiny, out: Path) -> None:
    """Writes the folder and a preview: fresh scenes above their reconstructions."""
    model.save_pretrained(out)
    pictures = scenes(8, random.Random(7))
    grid(to_pictures(torch.cat((pictures, model(pictures).sample))), 8).save(
        out.parent / f"{out.name}_preview.png"
    )
