"""Compares this code with what the published code computed, tensor by tensor:

    python tests/parity.py DIR

DIR holds llama/, sd/, stage1/ and stage2/, each stage with its checkpoint and expected.safetensors. Prints one line
per tensor: name, maximum absolute error, tolerance, ok. Exits 1 if any is out, 2 if DIR cannot be read. Every size
comes from the files. Checkpoints and models are converted first, and only what was converted is loaded: as the main
job loads it, and for the gradients through PEFT.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPTextModel, CLIPTokenizer

from minigpt5_core.conditioning.mapper import Mapper
from minigpt5_core.conditioning.mapper_file import load_mapper
from minigpt5_core.errors import BadInputError
from minigpt5_core.generate import Prompt, Sampling, embed_prompt, generate
from minigpt5_core.llm import FrozenLLM, load_adapter, load_llm, load_vision
from minigpt5_core.losses import IGNORED, caption_loss, compute_snr, diffusion_loss, voken_loss
from minigpt5_core.published import our_name
from minigpt5_core.vokens import IMAGE_HERE, block_starts, gather_voken_states

TOLERANCE = 1e-4  # absolute, for values; ids and labels must be equal
NEW_TOKENS = 40


@dataclass
class Stage:
    """One stage's fixture and our models, loaded from what its checkpoint was converted to."""

    folder: Path
    converted: Path
    expected: dict[str, Tensor]
    samples: list[dict]
    sizes: dict[str, int]
    llm: FrozenLLM
    mapper: Mapper

    @property
    def diffusion(self) -> Path:
        return self.folder.parent / "sd"

    @property
    def ids(self) -> list[tuple[list[int], list[int]]]:
        """Source and target of each sample."""
        encode = self.llm.encode
        return [(encode(sample["source"]), encode(sample["target"])) for sample in self.samples]

    def prompts(self, rows: list[list[int]]) -> list[Prompt]:
        """The rows behind one bos id, the pictures as the LLM sees them dealt to their slots in order."""
        image_id = self.llm.tokenizer.convert_tokens_to_ids(IMAGE_HERE)
        images = iter(see(self))
        prompts = []
        for row in rows:
            slots = row.count(image_id)
            taken = [image for _, image in zip(range(slots), images, strict=False)]
            if len(taken) < slots:
                raise BadInputError(
                    f"{self.folder}: fewer rows in vision.pixel_values than <ImageHere> slots."
                )
            prompts.append(Prompt([self.llm.bos_id, *row], taken, image_id))
        return prompts


def load_stage(folder: Path, converted: Path) -> Stage:
    """Converts the published files into the folder `converted`, and loads our models from there."""
    with safe_open(folder / "expected.safetensors", framework="pt") as opened:
        names, header = opened.keys(), opened.metadata()
        expected = {name: opened.get_tensor(name) for name in names if not name.startswith("in.input_images")}
    sizes = json.loads(header["sizes"])
    convert(folder, converted, sizes)
    llm = load_vision(load_llm(converted / "llm", sizes["vokens"]), converted / "llm")
    llm = load_adapter(llm, converted / "minigpt5" / "adapter")
    mapper, _ = load_mapper(converted / "minigpt5" / "mapper.safetensors")
    return Stage(folder, converted, expected, json.loads(header["samples"]), sizes, llm, mapper)


def convert(folder: Path, converted: Path, sizes: dict[str, int]) -> None:
    """The stage's LLM with its sight into llm/, its checkpoint into minigpt5/."""
    from trainer.convert.minigpt4 import Sizes, Sources, convert_minigpt4
    from trainer.convert.minigpt5 import Heads, convert_minigpt5

    vision, projection = folder / "vision_qformer_lavis.pth", folder / "minigpt4_proj.pth"
    convert_minigpt4(
        Sources(folder.parent / "llama", vision, vision, projection),
        converted / "llm",
        Sizes(sizes["vit_heads"], sizes["qformer_heads"], sizes["vokens"]),
    )
    first, checkpoint = folder / "stage1.ckpt", folder / "model.ckpt"
    stages = (first, checkpoint) if first.exists() else (checkpoint, None)
    heads = Heads(sizes["mapper_heads"], sizes["lora_alpha"], sizes["vokens"])
    convert_minigpt5(
        *stages, converted / "minigpt5", str(sizes["bos_id"]), llm=converted / "llm", heads=heads
    )


@torch.no_grad()
def see(stage: Stage) -> Tensor:
    """The fixture's pictures in the LLM's input space, (images, K, L)."""
    return stage.llm.image_encoder(stage.expected["vision.pixel_values"])


def compute_batch(stage: Stage) -> dict[str, Tensor]:
    """The two samples as the published collator joins and pads them."""
    pad = stage.sizes["pad_id"]
    rows = [torch.tensor(source + target) for source, target in stage.ids]
    labels = [torch.tensor(published_labels(*pair, stage.llm.voken_ids)) for pair in stage.ids]
    masks = [torch.ones_like(row) for row in rows]
    return {
        "in.input_ids": pad_sequence(rows, batch_first=True, padding_value=pad),
        "in.attention_mask": pad_sequence(masks, batch_first=True),
        "in.labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def compute_training(stage: Stage) -> dict[str, Tensor]:
    """One training step's values, its loss with the graph that leads to the trained parameters."""
    hidden, labels = run_llm(stage)
    starts = (labels == stage.llm.voken_ids[0]).nonzero().tolist()
    states = gather_voken_states(hidden, [(row, start) for row, start in starts], stage.sizes["vokens"])
    rows = torch.tensor([row for row, _ in starts])
    values = {
        "out.voken_states": states,
        "out.fc": stage.mapper.fc(states),
        "out.mapping": stage.mapper(states).tokens,
    }
    values["out.text_loss"] = voken_loss(stage.llm.logits(hidden)[:, :-1], labels[:, 1:])
    values |= compute_image_loss(stage, values["out.mapping"], rows)
    if all(sample["caption"] is not None for sample in stage.samples):
        values["out.caption_loss"] = caption_loss(values["out.mapping"], encode_captions(stage)[rows])
    return values | {"out.loss": total_loss(values)}


def total_loss(values: dict[str, Tensor]) -> Tensor:
    """The sum of the losses that are there, each times the weight that a stage's recipe gives it by default."""
    from trainer.training.config import LossConfig

    own = LossConfig()
    weights = {"text": own.text_weight, "image": own.image_weight, "caption": own.caption_weight}
    losses = {name: values.get(f"out.{name}_loss") for name in weights}
    return torch.stack([weights[name] * loss for name, loss in losses.items() if loss is not None]).sum()


def published_labels(source: list[int], target: list[int], voken_ids: list[int]) -> list[int]:
    """Labels of one training row: the target without the inner vokens of its first block.

    [IMG0] and, by a slip that belongs to the checkpoints, the last voken stay supervised.
    """
    labels = list(target)
    for start in block_starts(target, voken_ids)[:1]:
        inner = len(voken_ids) - 2
        labels[start + 1 : start + 1 + inner] = [IGNORED] * inner
    return [IGNORED] * len(source) + labels


def run_llm(stage: Stage) -> tuple[Tensor, Tensor]:
    """Last-layer states (B, S, L) of the batch with its pictures in place, and the labels (B, S) to match."""
    prompts = stage.prompts([source + target for source, target in stage.ids])
    embedded = [embed_prompt(stage.llm, prompt) for prompt in prompts]
    labels = []
    for pair, row in zip(stage.ids, embedded, strict=True):
        own = published_labels(*pair, stage.llm.voken_ids)
        supervised = len(pair[1])  # pictures stand in the source only, so the target's labels end the row
        labels.append(torch.tensor([IGNORED] * (len(row) - supervised) + own[len(own) - supervised :]))
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in embedded], batch_first=True)
    inputs = pad_sequence(embedded, batch_first=True)
    hidden = stage.llm.decoder(inputs_embeds=inputs, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden, pad_sequence(labels, batch_first=True, padding_value=IGNORED)


def compute_image_loss(stage: Stage, mapping: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """The latents of the target pictures, and min-SNR's loss of their predicted noise."""
    vae = AutoencoderKL.from_pretrained(stage.diffusion, subfolder="vae").float().requires_grad_(False)
    unet = (
        UNet2DConditionModel.from_pretrained(stage.diffusion, subfolder="unet").float().requires_grad_(False)
    )
    scheduler = PNDMScheduler.from_pretrained(stage.diffusion, subfolder="scheduler")
    pictures = stage.expected["in.output_image"][rows]
    latents = vae.encode(pictures).latent_dist.mode() * vae.config.scaling_factor
    noise, timesteps = stage.expected["in.noise"], stage.expected["in.timesteps"]
    noisy = scheduler.add_noise(latents, noise, timesteps)
    prediction = unet(noisy, timesteps, mapping).sample
    loss = diffusion_loss(prediction, noise, compute_snr(scheduler.alphas_cumprod, timesteps))
    return {"out.latents_scaled": latents, "out.image_loss": loss}


def encode_captions(stage: Stage) -> Tensor:
    """What the diffusion model's own text encoder makes of the captions, (B, T, C)."""
    tokenizer = CLIPTokenizer.from_pretrained(stage.diffusion, subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(stage.diffusion, subfolder="text_encoder").float()
    captions = [sample["caption"] for sample in stage.samples]
    length = tokenizer.model_max_length
    inputs = tokenizer(
        captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        return encoder(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).last_hidden_state


def compute_gradients(stage: Stage) -> dict[str, Tensor]:
    """Gradients of the loss under the published names; of the embedding and the head only the added rows."""
    stage, adapted = trainable(stage)
    names = [name.removeprefix("grad.") for name in stage.expected if name.startswith("grad.")]
    parameters = {}
    for name in names:
        side, ours = our_name(name)
        parameter = stage.mapper.get_parameter(ours) if side == "mapper" else adapted[peft_name(name)]
        parameters[name] = parameter.requires_grad_(True)
    loss = compute_training(stage)["out.loss"]
    gradients = dict(zip(names, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    return {
        f"grad.{name}": gradient[-len(stage.expected[f"grad.{name}"]) :]
        for name, gradient in gradients.items()
    }


def trainable(stage: Stage) -> tuple[Stage, dict[str, nn.Parameter]]:
    """The stage with its adapter in PEFT's layers instead of merged, and their parameters by PEFT's names."""
    plain = load_llm(stage.converted / "llm", stage.sizes["vokens"])
    adapted = PeftModel.from_pretrained(
        plain.causal_lm, stage.converted / "minigpt5" / "adapter", is_trainable=True
    ).eval()
    llm = replace(stage.llm, causal_lm=adapted.get_base_model())
    return replace(stage, llm=llm), dict(adapted.named_parameters())


def peft_name(published: str) -> str:
    """Stage 2 was saved from PEFT's layers, stage 1 from the plain model."""
    name = published.removeprefix("model.llama_model.")
    if name.startswith("base_model."):
        return name
    return f"base_model.model.{name.removesuffix('.weight')}.modules_to_save.default.weight"


def compute_generation(stage: Stage, kind: str) -> dict[str, Tensor]:
    """Greedy decoding of sample 0 and what the diffusion pipeline is given for its first picture."""
    lead, end = int(stage.expected[f"gen.{kind}.tokens"][0]), stage.sizes["eos_id"]
    sampling = Sampling(
        temperature=0,
        repetition_penalty=2.0,
        max_new_tokens=NEW_TOKENS,
        pictures="first" if kind == "forced" else "when_asked",
        max_pictures=NEW_TOKENS,
        stop_ids=(end,),
        penalised_prefix=(lead,),
        stray_vokens=True,
    )
    [reply] = generate(stage.llm, stage.prompts([stage.ids[0][0]]), sampling, [0])
    ended = [end] if reply.stopped == "end" else []
    values = {"tokens": torch.tensor([lead, *reply.ids, *ended])}
    if len(reply.voken_states):
        with torch.no_grad():
            values["voken_states"] = reply.voken_states[:1]
            values["prompt_embeds"] = stage.mapper(reply.voken_states[:1]).tokens
            values["negative_prompt_embeds"] = stage.mapper.negative().tokens
    return {f"gen.{kind}.{name}": value for name, value in values.items()}


def compute(stage: Stage) -> Iterator[dict[str, Tensor]]:
    """Everything the fixture fixes, part by part."""
    yield compute_batch(stage)
    yield {"vision.image_embeds": see(stage)}
    with torch.no_grad():
        yield compute_training(stage)
    yield compute_gradients(stage)
    for kind in ("forced", "free"):
        yield compute_generation(stage, kind)


def compare(name: str, expected: Tensor, found: Tensor | None) -> tuple[float, float]:
    """Maximum absolute error and tolerance; infinite for a tensor that is missing or of another shape."""
    tolerance = tolerance_of(name, expected)
    if found is None or found.shape != expected.shape:
        return float("inf"), tolerance
    error = (found.detach().double() - expected.double()).abs().max().item()
    return (error if error == error else float("inf")), tolerance


def tolerance_of(name: str, expected: Tensor) -> float:
    """0 for ids, 1e-4 for values; a small gradient must also be right to a thousandth of its largest entry."""
    if not expected.is_floating_point():
        return 0.0
    if name.startswith("grad."):
        return min(TOLERANCE, max(1e-7, 1e-3 * expected.abs().max().item()))
    return TOLERANCE


def check_stage(stage: Stage) -> bool:
    """Prints one line per expected result; true if all are within tolerance."""
    found: dict[str, Tensor] = {}
    for part in compute(stage):
        found |= part
    all_right = True
    for name in sorted(name for name in stage.expected if name.startswith(RESULTS)):
        error, tolerance = compare(name, stage.expected[name], found.get(name))
        right = error <= tolerance
        all_right &= right
        print(
            f"{stage.folder.name}  {name}  error {error:.2e}  tolerance {tolerance:.0e}  {'ok' if right else 'OUT'}"
        )
    return all_right


RESULTS = (
    "out.",
    "grad.",
    "gen.",
    "vision.image_embeds",
    "in.input_ids",
    "in.attention_mask",
    "in.labels",
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="llama/, sd/ and the stages' folders")
    folder = parser.parse_args().folder
    transformers.logging.disable_progress_bar()
    stages = sorted(path.parent for path in folder.glob("stage*/expected.safetensors"))
    if not stages:
        print(
            f"{folder} holds no stage*/expected.safetensors. Give the folder of the fixtures.",
            file=sys.stderr,
        )
        return 2
    try:
        with tempfile.TemporaryDirectory() as converted:
            results = [check_stage(load_stage(stage, Path(converted) / stage.name)) for stage in stages]
    except (BadInputError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))  # the trainer is never installed: it runs from the root
    raise SystemExit(main())
