"""A second small diffusion model for the proof that a mapper can be fitted to one it was not made with.

    python -m benchmarks.foreign_model train MODEL [--steps 2400] [--scenes 6000] [--seed 5] [--bf16]
    python -m benchmarks.foreign_model fit MODEL MAPPER.safetensors [--steps 3000] [--scenes 2000] [--seed 0]
    python -m trainer evaluate --recipe trainer/recipes/storybook_evaluate.toml --stories 40 --out runs/foreign \
      --set diffusion=MODEL --set mapper=MAPPER.safetensors --set 'systems=["vokens", "oracle"]' --set feed_back=false

It draws the storybook's world, but its text side has nothing in common with the storybook's: two text encoders side by
side, as in SDXL, of other widths, depths and another seed, with a tokenizer and a vocabulary of their own, and a pooled
vector. They are trained here from nothing. The UNet begins with the storybook's weights wherever a tensor's shape is
the same, all but the layers that read the text: drawing need not be learned twice for a proof about reading.

`fit` does what Train Voken Mapper does in ComfyUI: the storybook's LLM and adapter read its captioned stories, the
model's text encoders answer to the captions, and a new mapper learns the one from the other. It sees no picture.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from minigpt5_core.conditioning import Space
from minigpt5_core.conditioning.fit import FitSettings, Targets, fit_mapper
from minigpt5_core.conditioning.mapper_file import MapperHeader, save_mapper
from minigpt5_core.diffusion import load_diffusion
from minigpt5_core.llm import load_adapter, load_llm
from minigpt5_core.llm.files import default_llm
from minigpt5_core.llm.weights import hash_weights
from minigpt5_core.story.captioned import CAPTIONED, open_captioned, read_captioned
from minigpt5_core.story.states import read_voken_states
from trainer.common.images import grid
from trainer.diffusion import load_text_encoders
from trainer.storybook.models.diffusion import noise_loss
from trainer.storybook.models.diffusion_data import encode_scenes
from trainer.storybook.models.diffusion_model import DiffusionRecipe
from trainer.storybook.world.source import PREVIEWS
from trainer.storybook.world.stories import change_a_fact, stories
from trainer.training.optimise import optimise

STORYBOOK = Path(__file__).parents[1] / "storybook" / "diffusers"
WIDTHS, LAYERS, POOLED = (80, 112), 3, 96
RECIPE = DiffusionRecipe(learning_rate=6e-4, figure_weight=4.0, layout_weight=10.0, noise_offset=0.2)


def tokenizer_of(seed: int) -> CLIPTokenizer:
    """A CLIP tokenizer of other merges than the storybook's: of fewer words, from other stories."""
    corpus = [text for story in islice(stories(seed), 400) for s in story for text in (s.text, s.caption)]
    tokenizer = CLIPTokenizer().train_new_from_iterator(corpus, vocab_size=900, show_progress=False)
    tokenizer.model_max_length = 77
    return tokenizer


def clip_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    """Of a text encoder of that width."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=POOLED,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def foreign_pipeline(seed: int) -> StableDiffusionXLPipeline:
    """The untrained model: text encoders from nothing, the storybook's autoencoder, a UNet of which most is known."""
    torch.manual_seed(seed)
    storybook = load_diffusion(STORYBOOK)
    tokenizer = tokenizer_of(seed)
    unet = UNet2DConditionModel.from_config(
        dict(storybook.unet.config)
        | {
            "cross_attention_dim": sum(WIDTHS),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": POOLED + 6 * 8,
        }
    )
    known, own = storybook.unet.state_dict(), unet.state_dict()
    unet.load_state_dict(
        {name: known.get(name) if _same(known.get(name), new) else new for name, new in own.items()}
    )
    return StableDiffusionXLPipeline(
        vae=storybook.vae,
        text_encoder=CLIPTextModel(clip_config(tokenizer, WIDTHS[0])),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer, WIDTHS[1])),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=storybook.scheduler,
        add_watermarker=False,
        force_zeros_for_empty_prompt=False,
    )


def _same(known: Tensor | None, new: Tensor) -> bool:
    return known is not None and known.shape == new.shape


def encode(pipeline: StableDiffusionXLPipeline, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokens (B, 77, C) and the pooled vector (B, P), as the pipeline encodes prompts; with gradients."""
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
    ids = pipeline.tokenizer(
        list(texts), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    answers = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    return torch.cat([answer.hidden_states[-2] for answer in answers], -1), answers[1].text_embeds


def apart(pipeline: StableDiffusionXLPipeline, states: Sequence, margin: float, rng: random.Random) -> Tensor:
    """How much nearer than `margin` a caption is to the same with one fact changed, in units of the spread."""
    changed = [change_a_fact(state, rng) for state in states]
    tokens, pooled = encode(pipeline, [state.caption() for state in (*states, *changed)])
    near = []
    for answer in (tokens, pooled[:, None]):
        std = answer.detach().std(0).clamp(min=1e-2)
        one, other = answer.chunk(2)
        near.append((margin - ((one - other) / std).square().mean((1, 2))).relu().mean())
    return near[0] + near[1]


def train(out: Path, steps: int, seed: int, scenes: int, bf16: bool) -> None:
    """Trains text encoders and UNet together for a third of the steps, then the UNet alone."""
    pipeline = foreign_pipeline(seed)
    recipe = replace(RECIPE, steps=steps, seed=seed, batch=16)
    rng = random.Random(seed)
    data = encode_scenes(pipeline.vae, scenes, seed)
    noise = DDPMScheduler.from_config(pipeline.scheduler.config)
    texts = (pipeline.text_encoder, pipeline.text_encoder_2)
    parameters = [
        one for part in (pipeline.unet, *texts) for one in part.requires_grad_(True).train().parameters()
    ]
    optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, steps, pct_start=0.05)

    def step_loss(step: int) -> dict[str, Tensor]:
        if step == steps // 3:
            for part in texts:
                part.requires_grad_(False)
        rows = rng.choices(range(len(data.latents)), k=recipe.batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            tokens, pooled = encode(pipeline, data.texts(rows, recipe, rng))
            sizes = torch.tensor([[128, 128, 0, 0, 128, 128]] * len(rows), dtype=torch.float32)
            extra = {"text_embeds": pooled, "time_ids": sizes}
            unet = partial(pipeline.unet, added_cond_kwargs=extra)
            weights = 1 + (recipe.figure_weight - 1) * data.figures[rows]
            loss = noise_loss(unet, noise, data.latents[rows], tokens, weights, recipe)
        close = torch.zeros(())
        if step < steps // 3:
            close = apart(pipeline, [data.states[row] for row in rows], recipe.margin, rng)
        return {"loss": loss, "close": close}

    optimise(
        optimizer,
        schedule,
        step_loss,
        steps=steps,
        samples=recipe.batch,
        save=lambda: save(pipeline, out),
        save_every=400,
        weights={"close": recipe.margin_weight},
    )


@torch.no_grad()
def save(pipeline: StableDiffusionXLPipeline, out: Path) -> None:
    """Writes the diffusers folder, and a preview of fixed prompts beside it."""
    pipeline.save_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    pictures = pipeline(
        list(PREVIEWS), height=128, width=128, num_inference_steps=12, guidance_scale=3.0, generator=generator
    ).images
    grid(pictures, 4).save(out.parent / f"{out.name}_preview.png")


@torch.no_grad()
def fit(model: Path, out: Path, steps: int, scenes: int, seed: int) -> None:
    """Fits a mapper to the text encoders of `model`, from captions alone."""
    llm = load_adapter(load_llm(default_llm()), STORYBOOK.parent / "loras" / "storybook")
    captions: list[str] = []
    told = []
    for story in read_captioned(open_captioned(STORYBOOK.parent / CAPTIONED)):
        if len(captions) >= scenes:
            break
        told.append(story)
        captions += [scene.caption for scene in story if scene.caption]
    found = dict(read_voken_states(llm, told))
    states = torch.cat([found[index] for index in range(len(told))])
    encoders = load_text_encoders(model)
    different = list(dict.fromkeys(captions))
    targets = Targets(encoders.encode([""]))
    for first in range(0, len(different), 64):
        targets.add(encoders.encode(different[first : first + 64]))
    place = {caption: row for row, caption in enumerate(different)}
    rows = [place[caption] for caption in captions]
    with torch.enable_grad():
        fitted = fit_mapper(states, targets, FitSettings(steps=steps, seed=seed), rows=rows, on_step=say)
    (tokens, width), pooled = targets.token_shape, targets.pooled_width
    trained = {"stage": "mapper", "steps": steps, "seed": seed, "data": "storybook", "scenes": len(states)}
    folder = default_llm()
    header = MapperHeader(
        Space("foreign", tokens, width, pooled), folder.name, llm.width, hash_weights(folder), trained
    )
    save_mapper(out, fitted.mapper, header)


def say(step: int, loss: float) -> bool:
    """Every hundredth loss."""
    if step % 100 == 0:
        print(f"step {step}, loss {loss:.3f}", flush=True)
    return False


def main() -> None:
    """Trains the model, or fits a mapper to it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("out", type=Path)
    training.add_argument("--steps", type=int, default=2400)
    training.add_argument("--scenes", type=int, default=6000)
    training.add_argument("--seed", type=int, default=5)
    training.add_argument("--bf16", action="store_true", help="autocast, for CPUs with AMX or a fast bf16")
    fitting = commands.add_parser("fit")
    fitting.add_argument("model", type=Path)
    fitting.add_argument("out", type=Path)
    fitting.add_argument("--steps", type=int, default=3000)
    fitting.add_argument("--scenes", type=int, default=2000)
    fitting.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args())
    {"train": train, "fit": fit}[given.pop("command")](**given)


if __name__ == "__main__":
    main()
