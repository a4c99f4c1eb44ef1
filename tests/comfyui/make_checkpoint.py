"""Runs in ComfyUI's own Python, from its folder: a random checkpoint of the full size of SD 1.5, SD 2.1 or SDXL.

python make_checkpoint.py sd15|sd21|sdxl OUT.safetensors

Names and shapes come from ComfyUI's own modules on the meta device; the values are made and written piece by piece, so
that the 6.9 GB of an SDXL never stand in memory.
"""

import inspect
import json
import math
import sys
from pathlib import Path

kind, out = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]  # what ComfyUI's own command line reads
sys.path.insert(0, ".")

import comfy.options  # noqa: E402, TID251

comfy.options.enable_args_parsing()

import comfy.supported_models  # noqa: E402, TID251
import torch  # noqa: E402
from comfy.ldm.models.autoencoder import AutoencoderKL  # noqa: E402, TID251

HALF = torch.float16
NOISE = 1_000_003  # a prime, so that no row of a weight begins where another row does
COMMON = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "use_spatial_transformer": True, "legacy": False,
    "use_checkpoint": False, "use_temporal_resblock": False, "dtype": HALF,
}  # fmt: skip
SIZES = {
    "sd15": {
        "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1,
    },
    "sdxl": {
        "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "num_classes": "sequential",
    },
}  # fmt: skip
SIZES["sd21"] = SIZES["sd15"]
AUTOENCODER = {
    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
    "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip


def tensors():
    """Every tensor under the name it has in a checkpoint; those on the meta device have yet to get their values."""
    supported = {
        "sd15": comfy.supported_models.SD15, "sd21": comfy.supported_models.SD20, "sdxl": comfy.supported_models.SDXL,
    }[kind]  # fmt: skip
    config = supported(COMMON | SIZES[kind] | supported.unet_config)
    model = config.get_model({}, "", device="meta")
    text_encoder = config.clip_target().clip(device="meta", dtype=HALF)
    with torch.device("meta"):
        autoencoder = AutoencoderKL(ddconfig=AUTOENCODER, embed_dim=4)
    parts = [text_encoder.state_dict(), autoencoder.state_dict()]
    if "unet_state_dict" in inspect.signature(model.state_dict_for_saving).parameters:  # later than 0.8
        parts.insert(0, model.diffusion_model.state_dict())
    return model.state_dict_for_saving(*parts)


def deviation(name, shape):
    """Of a weight's values: what comes out of a layer is as large as what went in."""
    return 0.02 if "embedding" in name else 1 / math.sqrt(math.prod(shape[1:]))


def pieces(name, tensor, noise, place):
    """The bytes of a tensor in float16: norms 1, biases 0, anything else noise, from another place for each."""
    if not tensor.is_meta:
        yield as_bytes(tensor.to(HALF))
    elif tensor.ndim < 2:
        yield as_bytes(torch.full(tensor.shape, float(name.endswith("weight")), dtype=HALF))
    else:
        count = tensor.numel()
        part = (noise[place : place + min(count, NOISE)] * deviation(name, tensor.shape)).to(HALF)
        yield from [as_bytes(part)] * (count // len(part))
        yield as_bytes(part[: count % len(part)])


def as_bytes(tensor):
    return tensor.contiguous().numpy().tobytes()


def write(path, values):
    """One safetensors file: the header's length, the header, the tensors."""
    header, end = {}, 0
    for name, tensor in values.items():
        begin, end = end, end + tensor.numel() * HALF.itemsize
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    noise = torch.randn(2 * NOISE, generator=torch.Generator().manual_seed(0))
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for index, (name, tensor) in enumerate(values.items()):
            for piece in pieces(name, tensor, noise, index * 389 % NOISE):
                file.write(piece)


if __name__ == "__main__":
    write(Path(out), tensors())
