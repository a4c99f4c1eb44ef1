"""How much memory the converted parts take, from their shapes: weights, and the keys and values of a full context.

What a forward pass needs besides is not counted.
"""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from minigpt5_core.conditioning import SPACES
from minigpt5_core.conditioning.mapper import build_mapper, reference_config
from minigpt5_core.vision.qformer import QFormerConfig, QFormerEncoder

BF16 = 2.0  # bytes a number
NF4 = 0.5 + 4 / 64  # 4 bits, and bitsandbytes' scale in float32 for every 64


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that each phase of a story holds: seeing pictures, writing, drawing."""

    precision: str
    seeing: float
    writing: float
    drawing: float

    @property
    def resident(self) -> float:
        """All phases at once."""
        return self.seeing + self.writing + self.drawing

    @property
    def staged(self) -> float:
        """The largest phase, with the others moved off the device."""
        return max(self.seeing, self.writing, self.drawing)

    def __str__(self) -> str:
        phases = (f"{name} {getattr(self, name) / 1e9:.1f}" for name in ("seeing", "writing", "drawing"))
        return (
            f"{self.resident / 1e9:.1f} GB with all of it resident, {self.staged / 1e9:.1f} GB phase "
            f"by phase ({', '.join(phases)})"
        )


def memory_plans(llm: LlamaConfig, vision: QFormerConfig) -> list[MemoryPlan]:
    """In bf16, and with the LLM's linear layers in 4 bits, for Stable Diffusion 2.1 and the published mapper."""
    with torch.device("meta"):
        model, encoder = LlamaForCausalLM(llm), QFormerEncoder(vision)
        drawing = [build_mapper(reference_config(SPACES["sd21"], llm.hidden_size)), *stable_diffusion_2_1()]
    linear = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    )
    rest = _numbers(model) - linear + keys_and_values(llm)
    seeing, drawn = BF16 * _numbers(encoder), BF16 * sum(map(_numbers, drawing))
    return [
        MemoryPlan(name, seeing, width * linear + BF16 * rest, drawn)
        for name, width in (("bf16", BF16), ("4-bit LLM", NF4))
    ]


def keys_and_values(llm: LlamaConfig) -> int:
    """Numbers that a full context keeps in every layer."""
    width = llm.num_key_value_heads * (llm.hidden_size // llm.num_attention_heads)
    return 2 * llm.num_hidden_layers * width * llm.max_position_embeddings


def stable_diffusion_2_1() -> tuple[nn.Module, nn.Module]:
    """Its UNet and autoencoder, fresh; on the meta device they take no memory."""
    unet = UNet2DConditionModel(
        sample_size=64,
        cross_attention_dim=SPACES["sd21"].width,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    return unet, vae


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
