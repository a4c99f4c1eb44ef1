"""Trains the storybook's text-to-image model from nothing: tokenizer, text encoder, UNet; diffusers layout.

It is the "pretrained diffusion model" of the method (arXiv 2310.02239) and the two-stage baseline's text-to-image
model, so its text encoder learns full captions and story sentences alike. Latents are encoded once and kept.
"""

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from diffusers import (
    AutoencoderTiny,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import EMAModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from minigpt5_core.errors import BadInputError
from minigpt5_core.losses import compute_snr, diffusion_loss

from ...common.images import encode_pictures, grid
from ...training.optimise import optimise
from ..world.render import render_with_figures
from ..world.state import State
from ..world.stories import change_a_fact, stories, training_state
from .autoencoder import AutoencoderRecipe, train_autoencoder

TOKENS = 77
PREVIEW = (
    "a fox with a red balloon in the snow by day",
    "a bear with a golden key on the beach at night",
    "a panda in the city by day",
    "a unicorn with a purple umbrella in the forest at night and a butterfly",
    "a penguin with a red apple in the desert by day",
    "a mouse with a slice of cake in the village by day and a bee",
    "a lion with a football in the forest by day",
    "Mia the cat is in the snow. She has a golden crown. It is night.",
)


@dataclass(frozen=True)
class DiffusionRecipe:
    """How to train text encoder and UNet. Until `freeze_text_encoder_share` of the steps both learn; then only the
    UNet does, so that a mapper can be aligned with the text encoder meanwhile. Cells that show hero, prop or
    companion count `figure_weight` times: they are a quarter of the picture, and what is hard in it. Noisy timesteps
    count up to `layout_weight` times, as far as they would by the error of the picture itself: what stands where is
    decided there, and the noise's own error hardly shows it. The noise's mean is moved by a deviation of
    `noise_offset`, so that day and night are not read off it: the last timestep's noise still holds some of the
    picture, and pure noise holds none. Captions that
    differ in one fact are pushed apart until `margin`, in units of the spread of all captions: learned from pictures
    alone a place fills most of that spread, and two props lie closer together than a mapper can tell."""

    scenes: int = 8000
    steps: int = 2600
    batch: int = 24
    learning_rate: float = 8e-4
    freeze_text_encoder_share: float = 0.4
    sentence_share: float = 0.3
    empty_share: float = 0.1
    min_snr_gamma: float = 5.0
    figure_weight: float = 1.0
    layout_weight: float = 1.0
    noise_offset: float = 0.0
    margin: float = 0.4
    margin_weight: float = 0.1
    ema_decay: float = 0.998
    text_width: int = 128
    text_layers: int = 2
    block_out_channels: tuple = (64, 128, 128)
    seed: int = 0


@dataclass(frozen=True)
class Scenes:
    """Pictures as scaled latents (N, 4, 16, 16), each with its full caption and a story's sentence.

    `figures` (N, 1, 16, 16) is 1 where a cell shows hero, prop or companion, else 0.
    """

    latents: Tensor
    figures: Tensor
    states: list[State]
    sentences: list[str]

    def texts(self, rows: list[int], recipe: DiffusionRecipe, draw: random.Random) -> list[str]:
        """A text for each row: mostly the caption, sometimes the sentence, sometimes nothing."""
        chosen = []
        for row in rows:
            chance = draw.random()
            if chance < recipe.empty_share:
                chosen.append("")
            elif chance < recipe.empty_share + recipe.sentence_share:
                chosen.append(self.sentences[row])
            else:
                chosen.append(self.states[row].caption())
        return chosen


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose merges cover the world's words; printable characters keep a token of their own."""
    corpus = [
        text for story in islice(stories(99), 3000) for s in story for text in (s.text, s.caption, s.request)
    ]
    corpus += [" ".join(string.printable)] * 3
    tokenizer = CLIPTokenizer().train_new_from_iterator(corpus, vocab_size=1536, show_progress=False)
    tokenizer.model_max_length = TOKENS
    return tokenizer


def build_text_encoder(recipe: DiffusionRecipe, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A small untrained CLIP text encoder, (B, 77) ids -> (B, 77, text_width)."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.text_width,
        intermediate_size=4 * recipe.text_width,
        projection_dim=recipe.text_width,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=1.0,
    )
    return CLIPTextModel(config)


def build_unet(recipe: DiffusionRecipe, latent_channels: int) -> UNet2DConditionModel:
    """A small untrained UNet over 16x16 latents."""
    levels = len(recipe.block_out_channels)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=recipe.block_out_channels,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        layers_per_block=1,
        cross_attention_dim=recipe.text_width,
        attention_head_dim=4,
    )


def build_pipeline(recipe: DiffusionRecipe, autoencoder: Path) -> StableDiffusionPipeline:
    """The whole untrained text-to-image pipeline around a trained autoencoder."""
    torch.manual_seed(recipe.seed)
    vae = AutoencoderTiny.from_pretrained(autoencoder)
    tokenizer = build_tokenizer()
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=build_text_encoder(recipe, tokenizer),
        tokenizer=tokenizer,
        unet=build_unet(recipe, vae.config.latent_channels),
        scheduler=DPMSolverMultistepScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            use_karras_sigmas=True,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def encode_scenes(vae: AutoencoderTiny, count: int, seed: int) -> Scenes:
    """Draws `count` scenes, half from stories, half with any state, and encodes them once."""
    draw = random.Random(f"pictures/{seed}")
    told = (scene for story in stories(seed) for scene in story)
    items: list[tuple[State, str]] = []
    while len(items) < count:
        scene = next(told)
        items.append((scene.state, scene.text))
        state = training_state(draw)
        items.append((state, state.caption()))
    latents, figures = [], []
    for first in range(0, count, 16):
        drawn = [render_with_figures(state, draw) for state, _ in items[first : first + 16]]
        latents.append(encode_pictures(vae, [picture for picture, _ in drawn]))
        figures += [torch.from_numpy(cells)[None].float() for _, cells in drawn]
    return Scenes(
        torch.cat(latents), torch.stack(figures), [item[0] for item in items], [item[1] for item in items]
    )


def encode_texts(pipeline: StableDiffusionPipeline, texts: Sequence[str]) -> Tensor:
    """(B, 77, C), as the pipeline itself encodes prompts."""
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    length = tokenizer.model_max_length
    ids = tokenizer(
        list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return encoder(ids.input_ids.to(encoder.device))[0]


def train_diffusion(recipe: DiffusionRecipe, autoencoder: Path, out: Path, start: Path | None = None) -> None:
    """Trains and writes the diffusers folder `out`; `start` goes on from an earlier folder's weights."""
    torch.manual_seed(recipe.seed)
    draw = random.Random(recipe.seed)
    vae = AutoencoderTiny.from_pretrained(autoencoder)
    pipeline = (
        StableDiffusionPipeline.from_pretrained(start, vae=vae, torch_dtype=torch.float32)
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
        rows = draw.choices(range(len(data.latents)), k=recipe.batch)
        conditioning = encode_texts(pipeline, data.texts(rows, recipe, draw))
        weights = 1 + (recipe.figure_weight - 1) * data.figures[rows]
        loss = noise_loss(unet, noise_scheduler, data.latents[rows], conditioning, weights, recipe)
        close = torch.zeros(())
        if next(text_encoder.parameters()).requires_grad:
            close = closeness(pipeline, [data.states[row] for row in rows], recipe.margin, draw)
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
    """The method's own diffusion loss at random timesteps, cells counted by `weights` (B, 1, h, w).

    What minimises it is the same for any weights, of cells or timesteps: they only say where to look first.
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
    pipeline: StableDiffusionPipeline, states: Sequence[State], margin: float, draw: random.Random
) -> Tensor:
    """How far captions with one fact changed fall short of `margin`, the mean squared distance in units of the spread.

    Two captions taken at random are 2 apart.
    """
    changed = [change_a_fact(state, draw) for state in states]
    encoded = encode_texts(pipeline, [state.caption() for state in (*states, *changed)])
    spread = encoded.detach().std(0).clamp(min=1e-2)
    here, there = encoded.chunk(2)
    return (margin - ((here - there) / spread).square().mean((1, 2))).relu().mean()


@torch.no_grad()
def save_pipeline(pipeline: StableDiffusionPipeline, average: EMAModel, out: Path) -> None:
    """Writes the folder with the averaged UNet, and a preview of fixed prompts beside it."""
    average.store(pipeline.unet.parameters())
    average.copy_to(pipeline.unet.parameters())
    pipeline.save_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    pictures = pipeline(list(PREVIEW), num_inference_steps=20, guidance_scale=3.0, generator=generator).images
    grid(pictures, 4).save(out.parent / f"{out.name}_preview.png")
    average.restore(pipeline.unet.parameters())


@dataclass(frozen=True)
class StorybookDiffusionRecipe:
    """The whole way: the autoencoder first, then text encoder and UNet. 0 steps leaves a part as it was found."""

    autoencoder: AutoencoderRecipe = AutoencoderRecipe()
    diffusion: DiffusionRecipe = DiffusionRecipe()


def train_storybook_diffusion(recipe: StorybookDiffusionRecipe, out: Path, start: Path | None = None) -> None:
    """Leaves the diffusers folder `out`; `start` is an earlier one whose weights are gone on from."""
    if start and not (start / "model_index.json").is_file():
        raise BadInputError(f"--from {start} is no diffusers folder (no model_index.json).")
    if not start and not (recipe.autoencoder.steps and recipe.diffusion.steps):
        raise BadInputError(
            "autoencoder.steps and diffusion.steps can be 0 only with --from, which says what to keep."
        )
    autoencoder = start / "vae" if start else None
    if recipe.autoencoder.steps:
        autoencoder = out.parent / f"{out.name}_autoencoder"
        train_autoencoder(recipe.autoencoder, autoencoder, start / "vae" if start else None)
    assert autoencoder is not None
    if recipe.diffusion.steps:
        train_diffusion(recipe.diffusion, autoencoder, out, start)
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(
            start, vae=AutoencoderTiny.from_pretrained(autoencoder)
        )
        pipeline.save_pretrained(out)
