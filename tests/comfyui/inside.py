"""Runs in ComfyUI's own Python, from its folder: our loaders' objects, computed with and written out as numbers.

python inside.py PACK OUT.safetensors models|adapter|packed|flow|fit IN.safetensors
"""

import asyncio
import importlib.util
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

pack_folder, out, job, given = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]  # what ComfyUI's own command line reads
sys.path.insert(0, ".")

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_management as management  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import nodes as comfyui_nodes  # noqa: E402, F401  # ComfyUI's own, before ours may be found under that name


def load_pack():
    """As ComfyUI loads it."""
    spec = importlib.util.spec_from_file_location("pack", Path(pack_folder) / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["pack"] = module
    spec.loader.exec_module(module)

    async def nodes():
        return await (await module.comfy_entrypoint()).get_node_list()

    return {node.define_schema().node_id: node for node in asyncio.run(nodes())}


def run(node, *arguments):
    return node.execute(*arguments).args


@torch.no_grad()
def models(nodes, given):
    """One forward of UNet, text encoder, decoder and encoder of the storybook."""
    model, clip, vae = run(nodes["MiniGPT5LoadDiffusers"], "storybook")
    management.load_models_gpu([model])
    scale = model.get_model_object("latent_format").scale_factor
    inner = model.model.diffusion_model
    tokens = clip.tokenize("a fox with a red balloon in the snow by day")
    return {
        "unet": inner(given["latents"], given["timesteps"], context=given["context"]),
        "text": clip.encode_from_tokens(tokens),
        "decoded": vae.decode(given["latents"] / scale),
        "encoded": vae.encode(given["pictures"]) * scale,
        "sigmas": model.get_model_object("model_sampling").sigmas,
    }


@torch.no_grad()
def adapter(nodes, given):
    """The LLM's logits plain, with the adapter, and plain again; the weights that the adapter touches."""
    (llm,) = run(nodes["MiniGPT5LoadLLM"], "SmolLM2-135M-Instruct", "float32", 8)
    (adapted,) = run(nodes["MiniGPT5LoadAdapter"], llm, "storybook", 1.0)
    results = {}
    weights = {}
    for name, loaded in (("plain", llm), ("adapted", adapted), ("again", llm)):
        management.load_models_gpu([loaded.patcher], force_full_load=True)
        results[f"{name}_logits"] = llm.frozen.causal_lm(given["ids"]).logits
        weights[name] = {key: value.clone() for key, value in llm.frozen.causal_lm.state_dict().items()}
    same = [torch.equal(weights["plain"][key], weights["again"][key]) for key in weights["plain"]]
    changed = [torch.equal(weights["plain"][key], weights["adapted"][key]) for key in weights["plain"]]
    return results | {"same_again": torch.tensor(same), "same_adapted": torch.tensor(changed)}


@torch.no_grad()
def packed(nodes, given):
    """The logits of the LLM in 4 bits: plain, with the adapter, and plain again."""
    (llm,) = run(nodes["MiniGPT5LoadLLM"], "SmolLM2-135M-Instruct", "4bit", 8)
    (adapted,) = run(nodes["MiniGPT5LoadAdapter"], llm, "storybook", 1.0)
    results = {}
    for name, loaded in (("plain", llm), ("adapted", adapted), ("again", llm)):
        management.load_models_gpu(loaded.patchers, force_full_load=True)
        frozen = loaded.frozen
        results[name] = frozen.logits(frozen.read(frozen.embed(given["ids"])).last_hidden_state)
    return results


@torch.no_grad()
def flow(nodes, given_values):
    """Latents that KSampler draws from vokens with transformer.safetensors and mapper.safetensors beside the input.

    And whether other.safetensors, a mapper of another space, was refused for that model.
    """
    from comfy_extras.nodes_flux import FluxGuidance
    from pack.minigpt5_core.conditioning.mapper_file import load_mapper
    from pack.nodes.sockets import LoadedMapper, Vokens

    folder = Path(given).parent
    model = comfy.sd.load_diffusion_model(str(folder / "transformer.safetensors"))
    vokens = Vokens(given_values["states"], "toy", "abc")

    def steer(name):
        mapper = LoadedMapper(*load_mapper(folder / name), name)
        return run(nodes["MiniGPT5VokensToConditioning"], vokens, mapper, 1, model)

    try:
        steer("other.safetensors")
        refused = False
    except ValueError as error:
        refused = "other.safetensors answers in the space" in str(error)
    positive, negative = steer("mapper.safetensors")
    if "guidance" in given_values:
        (positive,) = run(FluxGuidance, positive, given_values["guidance"].item())
    empty = {"samples": torch.zeros(1, 16, 8, 8)}
    cfg = given_values["cfg"].item()
    (drawn,) = comfyui_nodes.common_ksampler(model, 7, 3, cfg, "euler", "simple", positive, negative, empty)
    return {"latents": drawn["samples"], "refused": torch.tensor(refused)}


def random_clip(kind):
    """The text encoders of SD3 or Flux as ComfyUI loads them, in their full widths and three layers deep, of noise.

    The files hold no more than what each is known by.
    """
    short = {"num_layers": 3, "num_hidden_layers": 3}
    options = {f"{name}_model_config": short for name in ("t5xxl", "clip_l", "clip_g")}
    known_by = {
        "l": {"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(3072, 768)},
        "g": {"text_model.encoder.layers.30.mlp.fc1.weight": torch.zeros(5120, 1280)},
        "t5": {"encoder.block.23.layer.1.DenseReluDense.wi_1.weight": torch.zeros(10240, 4096)},
    }
    parts, family = {"sd3": ("lgt5", "SD3"), "flux": ("lt5", "FLUX")}[kind]
    files = [weights for name, weights in known_by.items() if name in parts]
    clip = comfy.sd.load_text_encoder_state_dicts(
        files, clip_type=getattr(comfy.sd.CLIPType, family), model_options=options
    )
    torch.manual_seed(0)
    for name, weight in clip.cond_stage_model.named_parameters():
        if weight.ndim < 2:
            weight.data.fill_(float(name.endswith("weight")))
        else:
            weight.data.normal_(
                std=0.02 if "embedding" in name or "shared" in name else weight[0].numel() ** -0.5
            )
    return clip


def fit(nodes, given_values):
    """Train Voken Mapper for SD3 or Flux, and what KSampler then draws in one step, with vokens and without."""
    import folder_paths
    from comfy_extras.nodes_flux import FluxGuidance
    from pack.nodes.sockets import Vokens

    kind = "flux" if "guidance" in given_values else "sd3"
    folder_paths.folder_names_and_paths["voken_mappers"] = ([str(Path(given).parent)], {".safetensors"})
    (llm,) = run(nodes["MiniGPT5LoadLLM"], "SmolLM2-135M-Instruct", "float32", 8)
    (llm,) = run(nodes["MiniGPT5LoadAdapter"], llm, "storybook", 1.0)
    train = nodes["MiniGPT5TrainMapper"]
    train.hidden = SimpleNamespace(unique_id=None)
    mapper, losses, _ = run(train, llm, random_clip(kind), "", "{caption}", kind, 20, 4, 1e-3, 0, 24)
    model = comfy.sd.load_diffusion_model(str(Path(given).parent / "transformer.safetensors"))
    vokens = Vokens(
        torch.randn(1, 8, 576, generator=torch.Generator().manual_seed(0)), llm.name, llm.weights_hash
    )
    positive, negative = run(nodes["MiniGPT5VokensToConditioning"], vokens, mapper, 1, model)
    if kind == "flux":
        positive, negative = (run(FluxGuidance, one, 3.5)[0] for one in (positive, negative))
    empty = {"samples": torch.zeros(1, 16, 8, 8)}
    drawn = [
        comfyui_nodes.common_ksampler(model, 7, 1, 1.0, "euler", "simple", one, one, empty)[0]["samples"]
        for one in (positive, negative)
    ]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{kind}: {mapper.header.space}, peak {peak:.2f} GB", file=sys.stderr)
    sizes = (mapper.mapper.config.tokens, mapper.mapper.config.width, mapper.mapper.config.pooled_width)
    return {
        "losses": torch.tensor(losses["loss"]),
        "sizes": torch.tensor(sizes),
        "with": drawn[0],
        "without": drawn[1],
    }


if __name__ == "__main__":
    jobs = {"models": models, "adapter": adapter, "packed": packed, "flow": flow, "fit": fit}
    values = jobs[job](load_pack(), load_file(given))
    save_file({name: value.float().contiguous() for name, value in values.items()}, out)
