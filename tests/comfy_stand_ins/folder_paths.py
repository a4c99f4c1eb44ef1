"""ComfyUI's folders; `use` says below which folder they are."""

import os
from pathlib import Path

supported_pt_extensions = {".ckpt", ".pt", ".pt2", ".bin", ".pth", ".safetensors", ".pkl", ".sft"}
folder_names_and_paths: dict[str, tuple[list[str], set[str]]] = {}
models_dir = ""
_base = Path()


def use(base: Path) -> None:
    """Starts anew with models, output, input and temp in `base`, none of which need be there."""
    global models_dir, _base
    _base, models_dir = base, str(base / "models")
    folder_names_and_paths.clear()
    folder_names_and_paths["loras"] = ([str(base / "models" / "loras")], supported_pt_extensions)
    folder_names_and_paths["diffusers"] = ([str(base / "models" / "diffusers")], {"folder"})


def get_output_directory() -> str:
    return str(_base / "output")


def get_input_directory() -> str:
    return str(_base / "input")


def get_temp_directory() -> str:
    return str(_base / "temp")


def get_folder_paths(folder_name: str) -> list[str]:
    return list(folder_names_and_paths[folder_name][0])


def get_filename_list(folder_name: str) -> list[str]:
    """Files at any depth, links followed, named from their folder on; no extensions means all."""
    folders, extensions = folder_names_and_paths[folder_name]
    found = set()
    for folder in folders:
        for place, _, names in os.walk(folder, followlinks=True):
            found |= {os.path.relpath(os.path.join(place, name), folder) for name in names}
    return sorted(name for name in found if not extensions or Path(name).suffix.lower() in extensions)


def get_full_path(folder_name: str, filename: str) -> str | None:
    """The first file of that name; a name cannot lead out of its folder."""
    inside = os.path.relpath(os.path.join("/", filename), "/")
    paths = (os.path.join(folder, inside) for folder in get_folder_paths(folder_name))
    return next((path for path in paths if os.path.isfile(path)), None)


def get_save_image_path(
    filename_prefix: str, output_dir: str, image_width: int = 0, image_height: int = 0
) -> tuple[str, str, int, str, str]:
    """(folder, name, number after the last one that is there, folder from the output folder on, prefix)."""
    subfolder, name = os.path.split(os.path.normpath(filename_prefix))
    folder = os.path.join(output_dir, subfolder)
    if os.path.commonpath((output_dir, os.path.abspath(folder))) != output_dir:
        raise Exception("Saving image outside the output folder is not allowed.")  # the bare class, as there
    os.makedirs(folder, exist_ok=True)
    rests = [there[len(name) + 1 :] for there in os.listdir(folder) if there.startswith(f"{name}_")]
    numbers = [int(rest.split("_")[0]) for rest in rests if rest.split("_")[0].isdigit()]
    return folder, name, max(numbers, default=0) + 1, subfolder, filename_prefix
