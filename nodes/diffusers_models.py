"""A small Stable Diffusion in diffusers' layout as ComfyUI's own MODEL, CLIP and VAE.

ComfyUI recognises checkpoints by their sizes, and knows none this small. This is the one file that touches its model
internals. AutoencoderTiny of any width up to 64, UNet2DConditionModel of SD 1.x's kind, one CLIP text encoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from . import folders
from .compat import schema

VAE_WIDTH = 64  # of the AutoencoderTiny that ComfyUI builds
# Settings that are fixed in ComfyUI's UNet.
UNET_HABITS = {"norm_num_groups": 32, "act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0}
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
CLIP_TABLE = 49408  # rows of the token table that ComfyUI's CLIP builds


class LoadDiffusers(io.ComfyNode):
    """MODEL, CLIP and VAE from a diffusers folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MiniGPT5LoadDiffusers",
            display_name="Load Diffusers Model (MiniGPT-5)",
            category="MiniGPT-5/loaders",
            description=(
                "Loads the storybook's small diffusion model, or another Stable Diffusion of its kind in diffusers' "
                "layout. Ordinary checkpoints go through ComfyUI's own Load Checkpoint."
            ),
            search_aliases=["storybook", "checkpoint", "diffusers"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folders.diffusers_names(),
                    default=folders.STORYBOOK_DIFFUSERS,
                    display_name="model",
                    tooltip="The storybook's, which comes with the pack, or a folder in models/diffusers.",
                )
            ],
            outputs=[
                io.Model.Output("model", display_name="MODEL"),
                io.Clip.Output("clip", display_name="CLIP"),
                io.Vae.Output("vae", display_name="VAE"),
            ],
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None = None) -> bool | str:
        return folders.problem(folders.find_diffusers, model_name)

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None = None) -> str:
        return folders.fingerprint_chosen(model_name, folders.diffusers_names, _mark)

    @classmethod
    def execute(cls, model_name: str) -> io.NodeOutput:
        folder = folders.find_diffusers(model_name)
        return io.NodeOutput(_model(folder), _clip(folder), _vae(folder / "vae"))


def _mark(name: str) -> str:
    folder = folders.find_diffusers(name)
    return "".join(folders.fingerprint(folder / part) for part in PARTS)


def _config(folder: Path, file: str = "config.json") -> dict[str, Any]:
    from ..minigpt5_core.texts import read_json

    return read_json(folder / file)


def _weights(folder: Path) -> dict[str, Any]:
    """The folder's one safetensors file, in float32."""
    import comfy.utils

    files = sorted(folder.glob("[!.]*.safetensors"))
    if len(files) != 1:
        raise ValueError(
            f"{folder} holds {len(files)} .safetensors files, expected one. Save the model as one file."
        )
    return {name: weight.float() for name, weight in comfy.utils.load_torch_file(str(files[0])).items()}


def _refuse(folder: Path, config: dict[str, Any], known: dict[str, Any]) -> None:
    for name, expected in known.items():
        found = config.get(name, expected)
        if found not in (expected, None):
            raise ValueError(f"{folder}: {name} is {found!r}; this loader knows {expected!r} only.")


# MODEL


def unet_config(config: dict[str, Any]) -> dict[str, Any]:
    """ComfyUI's description of a UNet2DConditionModel."""
    widths = config["block_out_channels"]
    per_block, levels = config["layers_per_block"], len(widths)
    down = [int(kind == "CrossAttnDownBlock2D") for kind in config["down_block_types"]]
    up = [int(kind == "CrossAttnUpBlock2D") for kind in config["up_block_types"]]
    return {
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "num_res_blocks": [per_block] * levels,
        "channel_mult": [width // widths[0] for width in widths],
        "transformer_depth": [depth for depth in down for _ in range(per_block)],
        # from the last block to the first, as ComfyUI takes them off its end
        "transformer_depth_output": [depth for depth in reversed(up) for _ in range(per_block + 1)],
        "transformer_depth_middle": 1,
        "context_dim": config["cross_attention_dim"],
        "adm_in_channels": None,
        "use_linear_in_transformer": bool(config.get("use_linear_projection")),
        "use_spatial_transformer": True,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
        "legacy": False,
        "use_checkpoint": False,
        "image_size": 32,
    }


def _model(folder: Path) -> Any:
    import comfy.latent_formats
    import comfy.model_management as management
    import comfy.supported_models_base
    import comfy.utils
    from comfy.model_base import ModelType
    from comfy.model_patcher import ModelPatcher

    config = _config(folder / "unet")
    _refuse(
        folder / "unet",
        config,
        {"_class_name": "UNet2DConditionModel", "mid_block_type": "UNetMidBlock2DCrossAttn", **UNET_HABITS},
    )
    if isinstance(config["attention_head_dim"], list):
        raise ValueError(
            f"{folder / 'unet'}: attention_head_dim differs from level to level; one number is known here."
        )
    described = unet_config(config)
    scheduler = _config(folder / "scheduler", "scheduler_config.json")
    _refuse(folder / "scheduler", scheduler, {"beta_schedule": "scaled_linear"})
    autoencoder = _config(folder / "vae")

    class Latents(comfy.latent_formats.SD15):
        """Stable Diffusion's latents with a scale of their own."""

        def __init__(self) -> None:
            super().__init__(autoencoder["scaling_factor"])

    class Small(comfy.supported_models_base.BASE):
        """What ComfyUI must know of a model besides its UNet's sizes."""

        # diffusers calls the number of heads attention_head_dim
        unet_extra_config = {"num_heads": config["attention_head_dim"], "num_head_channels": -1}
        latent_format = Latents
        sampling_settings = {"linear_start": scheduler["beta_start"], "linear_end": scheduler["beta_end"]}

        def model_type(self, state_dict: dict, prefix: str = "") -> ModelType:
            predicts = scheduler.get("prediction_type", "epsilon")
            return ModelType.V_PREDICTION if predicts == "v_prediction" else ModelType.EPS

    small = Small(described)
    small.set_inference_dtype(management.unet_dtype(supported_dtypes=small.supported_inference_dtypes), None)
    model = small.get_model({}, "")
    names = comfy.utils.unet_to_diffusers(described)
    weights = _weights(folder / "unet")
    if strange := sorted(set(weights) - set(names)):
        raise ValueError(f"{folder / 'unet'}: {len(strange)} tensors have no place, such as {strange[0]}.")
    model.load_model_weights({names[name]: weight for name, weight in weights.items()}, "")
    return ModelPatcher(
        model, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )


# CLIP


def _clip(folder: Path) -> Any:
    import comfy.sd
    from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel, SDTokenizer
    from comfy.supported_models_base import ClipTarget

    config = _config(folder / "text_encoder")

    class Encoder(SDClipModel):
        """The text encoder at its own size."""

        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict | None = None) -> None:
            super().__init__(
                device=device,
                dtype=dtype,
                textmodel_json_config=dict(config),
                special_tokens={
                    "start": config["bos_token_id"],
                    "end": config["eos_token_id"],
                    "pad": config["pad_token_id"],
                },
                return_projected_pooled=False,
                model_options=model_options or {},
            )

    class Words(SDTokenizer):
        """The tokenizer of the folder."""

        def __init__(self, embedding_directory: Any = None, tokenizer_data: dict | None = None) -> None:
            super().__init__(
                str(folder / "tokenizer"),
                embedding_directory=embedding_directory,
                embedding_size=config["hidden_size"],
                tokenizer_data=tokenizer_data or {},
            )

    class Model(SD1ClipModel):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(clip_model=Encoder, **arguments)

    class Tokenizer(SD1Tokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: dict | None = None) -> None:
            super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=Words)

    clip = comfy.sd.CLIP(ClipTarget(Tokenizer, Model))
    missing, strange = clip.load_sd(_clip_weights(folder / "text_encoder"))
    if missing or strange:
        raise ValueError(
            f"{folder / 'text_encoder'} is no CLIP text encoder: {[*strange, *missing][0]} does not fit."
        )
    return clip


def _clip_weights(folder: Path) -> dict[str, Any]:
    """The text encoder's weights under ComfyUI's names, the token table filled up with zeros to ComfyUI's size."""
    import torch

    weights = {
        name if name.startswith("text_model.") else f"text_model.{name}": weight
        for name, weight in _weights(folder).items()
        if "position_ids" not in name
    }
    table = "text_model.embeddings.token_embedding.weight"
    if len(weights[table]) > CLIP_TABLE:
        raise ValueError(
            f"{folder} has {len(weights[table])} tokens; ComfyUI's CLIP holds {CLIP_TABLE} at most."
        )
    weights[table] = torch.nn.functional.pad(weights[table], (0, 0, 0, CLIP_TABLE - len(weights[table])))
    weights["text_projection.weight"] = torch.eye(weights[table].shape[1])  # not used by Stable Diffusion
    return weights


# VAE


def _vae(folder: Path) -> Any:
    import comfy.sd

    config = _config(folder)
    layers = {"num_encoder_blocks": [1, 3, 3, 3], "num_decoder_blocks": [3, 3, 3, 1], "act_fn": "relu"}
    _refuse(folder, config, {"_class_name": "AutoencoderTiny", "shift_factor": 0.0, **layers})
    vae = comfy.sd.VAE(sd=widen(_weights(folder), config["latent_channels"]))
    vae.throw_exception_if_invalid()
    return vae


def widen(weights: dict[str, Any], latent_channels: int) -> dict[str, Any]:
    """A narrow AutoencoderTiny under ComfyUI's names and as wide as ComfyUI's, filled up with zeros.

    It computes the same: there are only convolutions, ReLU and sums, so a channel of zeros stays zero and adds nothing.
    """
    import torch

    # ComfyUI's own, which change nothing
    wide = {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
    for name, weight in weights.items():
        side, _, layer, rest = name.split(".", 3)
        number = int(layer) + (side == "decoder")  # ComfyUI counts the clamp in front of the decoder
        ends = {3, latent_channels} if rest.startswith(("weight", "bias")) else set()
        target = [
            size if size in ends and _is_end(side, layer, axis) else VAE_WIDTH
            for axis, size in enumerate(weight.shape[:2])
        ]
        if any(size > wanted for size, wanted in zip(weight.shape[:2], target, strict=True)):
            raise ValueError(
                f"This AutoencoderTiny is wider ({max(weight.shape[:2])}) than ComfyUI's ({VAE_WIDTH})."
            )
        padding = [0, 0, 0, 0] if weight.ndim == 4 else []
        for size, wanted in reversed(list(zip(weight.shape[:2], target, strict=True))):
            padding += [0, wanted - size]
        wide[f"taesd_{side}.{number}.{rest}"] = torch.nn.functional.pad(weight, padding)
    return wide


def _is_end(side: str, layer: str, axis: int) -> bool:
    """Whether this axis of a layer's weight is the picture's or the latents' own, which keeps its size."""
    first, last = {"encoder": ("0", "14"), "decoder": ("0", "18")}[side]
    return (layer == first and axis == 1) or (layer == last and axis == 0)
