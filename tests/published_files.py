"""The published files at any size, with random weights: their names and shapes, as the published code saved them.

Sizes here differ from those in the fixtures of the published code (tests/fixtures/parity.tar.xz) wherever they can.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor
from transformers import LlamaConfig

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """Toy sizes; FULL are the published ones."""

    vocabulary: int = 320
    llm_width: int = 24
    llm_hidden: int = 40
    llm_layers: int = 2
    llm_heads: int = 3
    width: int = 128  # the storybook's, so that its own model can draw
    feed_forward: int = 96
    rank: int = 4
    vit_width: int = 20
    vit_hidden: int = 44
    vit_blocks: int = 3
    vit_heads: int = 5
    patch: int = 7
    size: int = 28
    queries: int = 6
    qformer_width: int = 18
    qformer_hidden: int = 30
    qformer_layers: int = 5
    qformer_heads: int = 3


FULL = Sizes(
    32000, 4096, 11008, 32, 32, 1024, 4096, 8, 1408, 6144, 40, 16, 14, 224, 32, 768, 3072, 12, 12
)  # fmt: skip


def mapper(sizes: Sizes) -> Shapes:
    width, wide = sizes.width, sizes.feed_forward
    shapes: Shapes = {}
    for side in ("encoder", "decoder"):
        attentions = ("self_attn",) if side == "encoder" else ("self_attn", "multihead_attn")
        norms = ("norm1", "norm2") if side == "encoder" else ("norm1", "norm2", "norm3")
        for layer in range(4):
            stem = f"llm_to_t2i_mapping.{side}.layers.{layer}"
            for attention in attentions:
                shapes |= {
                    f"{stem}.{attention}.in_proj_weight": (3 * width, width),
                    f"{stem}.{attention}.in_proj_bias": (3 * width,),
                }
                shapes |= linear(f"{stem}.{attention}.out_proj", width, width)
            shapes |= linear(f"{stem}.linear1", width, wide) | linear(f"{stem}.linear2", wide, width)
            for name in norms:
                shapes |= norm(f"{stem}.{name}", width)
        shapes |= norm(f"llm_to_t2i_mapping.{side}.norm", width)
    return shapes


def stage1(sizes: Sizes) -> Shapes:
    table = (sizes.vocabulary + 9, sizes.llm_width)
    return {
        "t2i_decoder_prompt": (1, 77, sizes.width),
        "model.llama_model.model.embed_tokens.weight": table,
        "model.llama_model.lm_head.weight": table,
        **mapper(sizes),
        **linear("fc.0", sizes.llm_width, sizes.width),
        **linear("fc.2", sizes.width, sizes.width),
    }


def stage2(sizes: Sizes) -> Shapes:
    table, stem = (sizes.vocabulary + 9, sizes.llm_width), "model.llama_model.base_model.model"
    shapes: Shapes = {f"{stem}.model.embed_tokens.modules_to_save.default.weight": table}
    shapes[f"{stem}.lm_head.modules_to_save.default.weight"] = table
    for layer in range(sizes.llm_layers):
        for projection in ("q_proj", "v_proj"):
            name = f"{stem}.model.layers.{layer}.self_attn.{projection}"
            shapes[f"{name}.lora_A.default.weight"] = (sizes.rank, sizes.llm_width)
            shapes[f"{name}.lora_B.default.weight"] = (sizes.llm_width, sizes.rank)
    return shapes | mapper(sizes)


def llama(sizes: Sizes) -> Shapes:
    width, table = sizes.llm_width, (sizes.vocabulary, sizes.llm_width)
    shapes: Shapes = {"model.embed_tokens.weight": table, "lm_head.weight": table}
    for layer in range(sizes.llm_layers):
        stem = f"model.layers.{layer}"
        shapes |= {f"{stem}.self_attn.{side}_proj.weight": (width, width) for side in "qkvo"}
        shapes[f"{stem}.self_attn.rotary_emb.inv_freq"] = (width // sizes.llm_heads // 2,)
        shapes |= {f"{stem}.mlp.{side}_proj.weight": (sizes.llm_hidden, width) for side in ("gate", "up")}
        shapes[f"{stem}.mlp.down_proj.weight"] = (width, sizes.llm_hidden)
        shapes |= {f"{stem}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (width,)}


def vit(sizes: Sizes) -> Shapes:
    width = sizes.vit_width
    shapes: Shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, (sizes.size // sizes.patch) ** 2 + 1, width),
        "patch_embed.proj.weight": (width, 3, sizes.patch, sizes.patch),
        "patch_embed.proj.bias": (width,),
    }
    for block in range(sizes.vit_blocks):
        stem = f"blocks.{block}"
        shapes |= {f"{stem}.attn.qkv.weight": (3 * width, width)}
        shapes |= {f"{stem}.attn.q_bias": (width,), f"{stem}.attn.v_bias": (width,)}
        shapes |= norm(f"{stem}.norm1", width) | norm(f"{stem}.norm2", width)
        shapes |= linear(f"{stem}.attn.proj", width, width)
        shapes |= linear(f"{stem}.mlp.fc1", width, sizes.vit_hidden)
        shapes |= linear(f"{stem}.mlp.fc2", sizes.vit_hidden, width)
    return shapes


def qformer(sizes: Sizes) -> Shapes:
    """With its text branch and another language model's projection, as LAVIS's files are."""
    width = sizes.qformer_width
    shapes: Shapes = {
        "query_tokens": (1, sizes.queries, width),
        "Qformer.bert.embeddings.word_embeddings.weight": (50, width),
        "Qformer.bert.embeddings.position_embeddings.weight": (16, width),
        **norm("ln_vision", sizes.vit_width),
        **norm("Qformer.bert.embeddings.LayerNorm", width),
        **linear("Qformer.cls.predictions.transform.dense", width, width),
        **linear("t5_proj", width, 11),
    }
    for layer in range(sizes.qformer_layers):
        stem = f"Qformer.bert.encoder.layer.{layer}"
        seen = {"attention": width} | ({} if layer % 2 else {"crossattention": sizes.vit_width})
        for attention, source in seen.items():
            shapes |= linear(f"{stem}.{attention}.self.query", width, width)
            shapes |= linear(f"{stem}.{attention}.self.key", source, width)
            shapes |= linear(f"{stem}.{attention}.self.value", source, width)
            shapes |= linear(f"{stem}.{attention}.output.dense", width, width)
            shapes |= norm(f"{stem}.{attention}.output.LayerNorm", width)
        for branch in ("", "_query"):
            shapes |= linear(f"{stem}.intermediate{branch}.dense", width, sizes.qformer_hidden)
            shapes |= linear(f"{stem}.output{branch}.dense", sizes.qformer_hidden, width)
            shapes |= norm(f"{stem}.output{branch}.LayerNorm", width)
    return shapes


def projection(sizes: Sizes) -> Shapes:
    return linear("llama_proj", sizes.qformer_width, sizes.llm_width)


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def empty(shapes: Shapes) -> dict[str, Tensor]:
    """Shapes alone, which take no memory."""
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def filled(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    """Random weights, large enough that every one of them shows in a result."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def llama_config(sizes: Sizes) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=sizes.vocabulary, hidden_size=sizes.llm_width, intermediate_size=sizes.llm_hidden,
        num_hidden_layers=sizes.llm_layers, num_attention_heads=sizes.llm_heads, tie_word_embeddings=False,
        rms_norm_eps=1e-6, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=None,
    )  # fmt: skip


def write_tokenizer(file: Path, vocabulary: int) -> None:
    """A sentencepiece model of LLaMA's kind: BPE, nothing normalised, unknown letters as bytes."""
    words = "the fox walks to a lake and bear sits down reads deep in forest with Human Assistant Img"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([words, words.upper(), f"###{words}:  </{words}>"]),
        model_writer=model, vocab_size=vocabulary, model_type="bpe", normalization_rule_name="identity",
        remove_extra_whitespaces=False, byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    file.write_bytes(model.getvalue())


def write_published(folder: Path, sizes: Sizes) -> None:
    """All six downloads and the two checkpoints."""
    vicuna = folder / "vicuna"
    vicuna.mkdir(parents=True)
    llama_config(sizes).save_pretrained(vicuna)
    write_tokenizer(vicuna / "tokenizer.model", sizes.vocabulary)
    weights = list(filled(llama(sizes), 1).items())
    for part, half in enumerate((weights[:5], weights[5:]), 1):
        torch.save(dict(half), vicuna / f"pytorch_model-0000{part}-of-00002.bin")
    torch.save(filled(vit(sizes), 2), folder / "eva_vit_g.pth")
    torch.save({"model": filled(qformer(sizes), 3)}, folder / "qformer.pth")
    torch.save({"model": filled(projection(sizes), 4), "epoch": 3}, folder / "projection.pth")
    torch.save({"state_dict": filled(stage1(sizes), 5), "epoch": 1}, folder / "stage1.ckpt")
    torch.save({"state_dict": filled(stage2(sizes), 6), "epoch": 1}, folder / "stage2.ckpt")
