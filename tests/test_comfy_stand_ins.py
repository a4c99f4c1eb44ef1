"""The stand-ins against a real ComfyUI's source, where there is one: what they take, it takes too."""

import ast
import dataclasses
import os
from pathlib import Path

import pytest

STAND_INS = Path(__file__).parent / "comfy_stand_ins"
COMFYUI = Path(os.environ.get("COMFYUI_PATH", "~/comfy/ComfyUI")).expanduser()
IO = COMFYUI / "comfy_api" / "latest" / "_io.py"
FUNCTIONS = {
    "comfy/utils.py": [
        "set_progress_bar_global_hook",
        "ProgressBar.__init__",
        "ProgressBar.update_absolute",
        "ProgressBar.update",
        "load_torch_file",
        "common_upscale",
    ],
    "comfy/model_management.py": [
        "load_models_gpu",
        "text_encoder_device",
        "text_encoder_offload_device",
        "text_encoder_dtype",
        "get_torch_device",
        "free_memory",
        "throw_exception_if_processing_interrupted",
    ],
    "comfy/model_patcher.py": ["ModelPatcher.__init__", "ModelPatcher.clone", "ModelPatcher.add_patches"],
    "comfy/lora.py": ["load_lora"],
    "comfy/sd.py": ["VAE.__init__", "VAE.throw_exception_if_invalid"],
    "comfy_execution/graph_utils.py": [
        "GraphBuilder.__init__",
        "GraphBuilder.node",
        "GraphBuilder.finalize",
        "Node.out",
        "is_link",
    ],
    "folder_paths.py": [
        "get_output_directory",
        "get_input_directory",
        "get_temp_directory",
        "get_folder_paths",
        "get_filename_list",
        "get_full_path",
        "get_save_image_path",
    ],
}
SOCKETS = ["Int", "Float", "String", "Combo", "Image", "Latent", "Conditioning", "Model", "Clip", "Vae"]
pytestmark = pytest.mark.skipif(not IO.is_file(), reason=f"no ComfyUI at {COMFYUI}: set COMFYUI_PATH")


def find(tree: ast.AST, name: str) -> ast.AST | None:
    """The class or function of a dotted name."""
    for part in name.split("."):
        tree = next((node for node in getattr(tree, "body", []) if getattr(node, "name", "") == part), None)
    return tree


def arguments(function: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in function.args.args]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", FUNCTIONS)
def test_a_function_takes_what_comfyuis_takes(file):
    ours, theirs = parse(STAND_INS / file), parse(COMFYUI / file)
    for name in FUNCTIONS[file]:
        mine, real = arguments(find(ours, name)), arguments(find(theirs, name))
        assert mine == real[: len(mine)], name


@pytest.mark.parametrize("end", ["Input", "Output"])
@pytest.mark.parametrize("socket", SOCKETS)
def test_a_socket_takes_what_comfyuis_takes(host, socket, end):
    theirs = parse(IO)
    real = find(theirs, f"{socket}.{end}.__init__") or find(theirs, f"{end}.__init__")
    mine = dataclasses.fields(getattr(getattr(host("comfy_api.latest").io, socket), end))
    assert {field.name for field in mine} <= set(arguments(real))


def test_a_schema_takes_what_comfyuis_takes(host):
    known = {node.target.id for node in find(parse(IO), "Schema").body if isinstance(node, ast.AnnAssign)}
    assert {field.name for field in dataclasses.fields(host("comfy_api.latest").io.Schema)} <= known


def test_a_node_output_takes_what_comfyuis_takes():
    ours = find(parse(STAND_INS / "comfy_api" / "latest" / "io.py"), "NodeOutput.__init__")
    real = find(parse(IO), "NodeOutput.__init__")
    assert {argument.arg for argument in ours.args.kwonlyargs} <= {
        argument.arg for argument in real.args.kwonlyargs
    }
    assert ours.args.vararg and real.args.vararg
