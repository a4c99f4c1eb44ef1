"""Where model files are found: ComfyUI's folders, with the pack's own storybook among them."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import folder_paths

PACK = Path(__file__).resolve().parent.parent
STORYBOOK = PACK / "storybook"
STORYBOOK_DIFFUSERS = STORYBOOK_ADAPTER = "storybook"
DEFAULT_LLM = "SmolLM2-135M-Instruct"
ADAPTER_FILE = "adapter_model.safetensors"


def register() -> None:
    """Adds our folders to ComfyUI's lists; those that extra_model_paths.yaml has made are kept."""
    models = Path(folder_paths.models_dir)
    _merge("LLM", [models / "LLM", STORYBOOK / "LLM"], {""})
    _merge("voken_mappers", [models / "voken_mappers", STORYBOOK / "voken_mappers"], {".safetensors"})
    _merge("loras", [STORYBOOK / "loras"], folder_paths.supported_pt_extensions)


def _merge(key: str, ours: list[Path], extensions: set[str]) -> None:
    paths, known = folder_paths.folder_names_and_paths.get(key, ([], set()))
    more = [str(path) for path in ours if str(path) not in paths]
    folder_paths.folder_names_and_paths[key] = ([*paths, *more], set(known) | extensions)


def llm_names() -> list[str]:
    """Hugging Face folders and GGUF files in the LLM folders; the default LLM is always offered."""
    return sorted({DEFAULT_LLM, *_names("LLM", _is_llm)})


def mapper_names() -> list[str]:
    """Mapper files."""
    return _listed("voken_mappers")


def adapter_names() -> list[str]:
    """PEFT folders among the LoRAs."""
    files = map(Path, _listed("loras"))
    return sorted(file.parent.as_posix() for file in files if file.name == ADAPTER_FILE)


def diffusers_names() -> list[str]:
    """Diffusers folders, the storybook's first."""
    return [STORYBOOK_DIFFUSERS, *sorted(_names("diffusers", _is_diffusers))]


def find_llm(name: str) -> Path | None:
    """The LLM's folder or GGUF file, or None for the default LLM where no LLM folder holds it."""
    found = _find("LLM", name, _is_llm)
    if found is None and name != DEFAULT_LLM:
        wanted = "a Hugging Face folder with config.json and safetensors weights, or a .gguf file,"
        raise missing("LLM", "LLM", name, wanted)
    return found


def find_mapper(name: str) -> Path:
    """The mapper's file."""
    path = _full_path("voken_mappers", name)
    if path is None:
        raise missing("mapper", "voken_mappers", name, "the mapper file that python -m trainer made")
    return Path(path)


def find_adapter(name: str) -> Path:
    """The adapter's folder."""
    path = _full_path("loras", f"{name}/{ADAPTER_FILE}")
    if path is None:
        raise missing("adapter", "loras", name, "the adapter folder that python -m trainer made")
    return Path(path).parent


def find_diffusers(name: str) -> Path:
    """The diffusers folder."""
    if name == STORYBOOK_DIFFUSERS:
        return STORYBOOK / "diffusers"
    found = _find("diffusers", name, _is_diffusers)
    if found is None:
        raise missing("diffusers model", "diffusers", name, "a diffusers folder with model_index.json")
    return found


def spellings(name: str) -> tuple[str, str]:
    """A name as it is, and as it is on this system where Windows has written it with backslashes."""
    return name, name.replace("\\", "/")


def _full_path(key: str, name: object) -> str | None:
    if not isinstance(name, str):  # over a link anything may come
        return None
    found = (folder_paths.get_full_path(key, spelling) for spelling in spellings(name))
    return next((path for path in found if path is not None), None)


def _listed(key: str) -> list[str]:
    """ComfyUI's list without what is hidden, such as the ._ files of a Mac."""
    names = folder_paths.get_filename_list(key)
    return [name for name in names if not any(part.startswith(".") for part in Path(name).parts)]


def missing(what: str, key: str, name: object, wanted: str) -> ValueError:
    """The error for a file that is not there: every folder that was searched, and what belongs where."""
    if not name:
        return ValueError(f"No {what} is chosen. Choose one in the node.")
    paths = folder_paths.get_folder_paths(key)
    searched = "\n".join(f"  {path}" for path in paths)
    return ValueError(
        f"The {what} {name!r} is in none of these folders:\n{searched}\n"
        f"Put {wanted} into {paths[0]} under that name (make the folder if there is none), or choose another in the "
        "node. Only the storybook's own comes with the pack."
    )


def problem(find: Callable[[str], object], name: str | None) -> bool | str:
    """What ComfyUI's validation expects for a name: True, or what is wrong with it.

    None stands for a name that comes over a link: it is not known before the graph runs, the node refuses a wrong one.
    """
    if name is None:
        return True
    try:
        find(name)
    except ValueError as error:
        return str(error)
    return True


def fingerprint(path: Path | None) -> str:
    """A text that changes when a file, or a file in a folder, changes."""
    if path is None:
        return "default"
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    marks = [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.is_file()]
    # hashed: ComfyUI keeps it in the metadata of pictures, where a path would say whose machine this is
    return hashlib.sha256(f"{path} {marks}".encode()).hexdigest()


def fingerprint_chosen(name: str | None, names: Callable[[], list[str]], mark: Callable[[str], str]) -> str:
    """The mark of the file that is chosen; of all there are where the name comes over a link (None), not known yet."""
    if name is not None:
        return mark(name)
    return hashlib.sha256("".join(map(mark, names())).encode()).hexdigest()


def _is_llm(path: Path) -> bool:
    if path.suffix == ".gguf" and path.is_file():
        return True
    return (path / "config.json").is_file() or len(list(path.glob("[!.]*.gguf"))) == 1


def _is_diffusers(path: Path) -> bool:
    return (path / "model_index.json").is_file()


def _names(key: str, wanted: Callable[[Path], bool]) -> set[str]:
    roots = [Path(root) for root in folder_paths.get_folder_paths(key)]
    paths = (path for root in roots if root.is_dir() for path in root.iterdir())
    return {path.name for path in paths if not path.name.startswith(".") and wanted(path)}


def _find(key: str, name: object, wanted: Callable[[Path], bool]) -> Path | None:
    # a name is a folder's or a file's own, never a way out of its place
    if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
        return None
    paths = (Path(root) / name for root in folder_paths.get_folder_paths(key))
    return next(filter(wanted, paths), None)
