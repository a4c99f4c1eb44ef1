"""Toys of every family: tiny configurations of transformers' own classes, chat templates, image processors.

An older transformers has not all of these classes, so that each is imported where it is used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from transformers import LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen2Config

from minigpt5_core.versions import has_transformers

SIDE = 28  # of a picture that needs no resampling

# As the families' own: messages in parts, some of which put pictures first or end a reply by no mark.
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'] | upper }}: {% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
IDEFICS3_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}<image>{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
TEXT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\\n' + message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Toy:
    """A family's parts: special tokens, of which the first is the image's, and how pictures are written and scaled.

    `processor` makes the family's image processor; one without is a text-only LLM.
    """

    config: Callable[[PreTrainedTokenizerFast, dict[str, Any]], PretrainedConfig]
    processor: Callable[[], Any] | None
    template: str
    tokens: tuple[str, ...]
    written: str  # a picture in text, * standing for its tokens


def llava(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> Any:
    from transformers import CLIPVisionConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE,
        patch_size=14,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )


def idefics3(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> Any:
    from transformers import Idefics3Config, Idefics3VisionConfig

    return _idefics3(Idefics3Config, Idefics3VisionConfig, tokenizer, text)


def smolvlm(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> Any:
    from transformers import SmolVLMConfig, SmolVLMVisionConfig

    return _idefics3(SmolVLMConfig, SmolVLMVisionConfig, tokenizer, text)


def _idefics3(whole: type, eyes: type, tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> Any:
    vision = eyes(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=7,
    )  # fmt: skip
    return whole(
        vision_config=vision,
        text_config=LlamaConfig(**text),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )


def internvl(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> Any:
    from transformers import InternVLConfig, InternVLVisionConfig

    vision = InternVLVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=7,
    )  # fmt: skip
    return InternVLConfig(
        vision_config=vision.to_dict(),
        text_config=Qwen2Config(**text),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )


def qwen2_vl(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLTextConfig
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

    vision = Qwen2VLVisionConfig(
        embed_dim=16, hidden_size=32, mlp_ratio=2, depth=2, num_heads=2, patch_size=7
    )
    return Qwen2VLConfig(
        vision_config=vision.to_dict(),
        text_config=Qwen2VLTextConfig(**text, **mrope([1, 1, 2])).to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
    )


def qwen2_5_vl(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

    vision = Qwen2_5_VLVisionConfig(
        hidden_size=16, out_hidden_size=32, intermediate_size=32, depth=2, num_heads=2, patch_size=7,
        window_size=28, fullatt_block_indexes=[1],
    )  # fmt: skip
    return Qwen2_5_VLConfig(
        vision_config=vision.to_dict(),
        text_config=Qwen2_5_VLTextConfig(**text, **mrope([1, 1, 2])).to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
    )


def qwen3_vl(tokenizer: PreTrainedTokenizerFast, text: dict[str, Any]) -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLTextConfig
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

    vision = Qwen3VLVisionConfig(
        hidden_size=16, out_hidden_size=32, intermediate_size=32, depth=3, num_heads=2, patch_size=7,
        num_position_embeddings=16, deepstack_visual_indexes=[0, 1],
    )  # fmt: skip
    rope = mrope([2, 1, 1], mrope_interleaved=True)
    return Qwen3VLConfig(
        vision_config=vision.to_dict(),
        text_config=Qwen3VLTextConfig(**text, head_dim=8, **rope).to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
    )


def mrope(section: list[int], **settings: Any) -> dict[str, Any]:
    """Rotary positions of three axes, in the words of transformers 5 or of those before."""
    rope = {"rope_type": "default", "mrope_section": section, **settings}
    if has_transformers("5"):
        return {"rope_parameters": rope | {"rope_theta": 10000.0}}
    return {"rope_scaling": rope | {"type": "mrope"}, "rope_theta": 10000.0}


def image_processor(family: str, name: str, **settings: Any) -> Callable[[], Any]:
    """What makes one that needs no torchvision: since transformers 5 a class of its own."""

    def made() -> Any:
        pil = has_transformers("5")
        module = f"transformers.models.{family}.image_processing_{'pil_' if pil else ''}{family}"
        return getattr(import_module(module), f"{name}{'Pil' if pil else ''}")(**settings)

    return made


FEWEST, MOST = (
    14 * 14,
    4 * SIDE * SIDE,
)  # pixels, which transformers 5 and those before call by different names
PIXELS = (
    {"size": {"shortest_edge": FEWEST, "longest_edge": MOST}}
    if has_transformers("5")
    else {"min_pixels": FEWEST, "max_pixels": MOST}
)
QWEN = {
    "processor": image_processor("qwen2_vl", "Qwen2VLImageProcessor", patch_size=7, **PIXELS),
    "template": CHATML_TEMPLATE,
    "tokens": ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>"),
    "written": "<|vision_start|>*<|vision_end|>",
}
IDEFICS3 = {
    "processor": image_processor(
        "idefics3",
        "Idefics3ImageProcessor",
        do_image_splitting=False,
        size={"longest_edge": SIDE},
        max_image_size={"longest_edge": SIDE},
    ),
    "template": IDEFICS3_TEMPLATE,
    "tokens": ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    "written": "<fake_token_around_image><global-img>*<fake_token_around_image>",
}
TOYS = {
    "llama": Toy(
        lambda tokenizer, text: LlamaConfig(**text, initializer_range=0.3), None, TEXT_TEMPLATE, (), ""
    ),
    "llava": Toy(
        llava,
        image_processor("clip", "CLIPImageProcessor", size={"shortest_edge": SIDE}, crop_size=SIDE),
        LLAVA_TEMPLATE,
        ("<image>",),
        "*",
    ),
    "idefics3": Toy(idefics3, **IDEFICS3),
    "smolvlm": Toy(smolvlm, **IDEFICS3),
    "internvl": Toy(
        internvl,
        image_processor("got_ocr2", "GotOcr2ImageProcessor", size={"height": SIDE, "width": SIDE}),
        CHATML_TEMPLATE,
        ("<IMG_CONTEXT>", "<img>", "</img>"),
        "<img>*</img>",
    ),
    "qwen2_vl": Toy(qwen2_vl, **QWEN),
    "qwen2_5_vl": Toy(qwen2_5_vl, **QWEN),
    "qwen3_vl": Toy(qwen3_vl, **QWEN),
}
