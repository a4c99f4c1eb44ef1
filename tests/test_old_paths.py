"""What was importable from minigpt5_core before it had rooms still is, and is the same object as under its new name."""

import importlib
import pkgutil
import sys
from collections.abc import Iterator

import pytest

import minigpt5_core

# What each module defined, less the dead code that went.
NAMES = {
    "adapter": """
        ADAPTER_CONFIG ADAPTER_WEIGHTS VOKEN_ROWS VOKEN_IDS BOS_ID NO_LORA OTHER_LLM PREFIX ROWS UNUSED
        Adapter read_adapter read_header take_beside merge_adapter
    """,
    "beside": "Beside is_packed keep_layout",
    "cli": "BAD_INPUT INTERRUPTED PRESETS DRAWS_A_CAPTION EXAMPLE main",
    "conditioning": "Space SPACES Conditioning check_space",
    "config": "Stored MapperConfig build",
    "errors": "BadInputError CancelledError",
    "families": "FAMILIES OLDEST SINCE find_family family_of load_family",
    "families.base": "Placed Family SeeingFamily features placed stack_positions",
    "families.pictures": "PROCESSOR PREPROCESSOR read_processor resized middle_square normalised side_of",
    "families.qwen": "MOST_PIXELS QwenVL Qwen3VL fitting patches",
    "families.square": "SquareFamily Llava Idefics3 InternVL",
    "files": "whole_folder draft_of",
    "generate": """
        Pictures Sampling Prompt Reply StoryCache seeded_generator generate embed_prompt position_keys
    """,
    "gguf_files": "OLDEST MAGIC TOKENIZER OTHER_FILE read_gguf check_gguf is_whole",
    "llm": """
        UNREADABLE DTYPE MOST_SEEN FrozenLLM load_llm add_vokens load_adapter load_sight has_sight reading
    """,
    "llm_files": """
        PACKAGE NAME FILES LAYER_NAMES NAMES SPECIAL_TOKEN default_llm default_folder is_llm get_llm
        check_packages find_gguf convert
    """,
    "losses": "IGNORED voken_loss compute_snr diffusion_loss flow_loss caption_loss Statistics drop_states",
    "mapper": """
        Mapper ReferenceMapper StandardisedMapper CompactMapper ConnectorMapper MAPPERS build_mapper
        reference_config compact_config connector_config
    """,
    "metrics": "DRAWS Interval bootstrap bootstrap_difference frechet_distance",
    "pages": """
        STRIP HTML MARKDOWN LEFT_BY_FILE_MANAGERS PAGE MARGIN FONT_SIZE LINE PAGES_IN_A_ROW PAPER BACKGROUND
        INK picture_name write_story check_target read_pictures draw_strip wrap drawable render_markdown
        render_html
    """,
    "pipeline": """
        DIFFUSION_PRECISIONS log OnProgress Parts ToldScene StoryTeller prompt_arguments load check_device
        load_diffusion find_diffusion check_diffusion space_of
    """,
    "precision": "PRECISIONS holding",
    "prefix": "PROMPT Prefix read_prefix",
    "presets": "Preset PRESETS STORYBOOK DEFAULT",
    "prompts": """
        SYSTEM NEXT LOOK DESCRIBE PLAIN_TEMPLATE Turn Wording FittedPrompt chat_text chat_prompt CHAT
        fit_prompt
    """,
    "published": """
        PublishedTokenizer PublishedWeights our_name read_published build_published_mapper
    """,
    "published_prompts": """
        SEEING STORY_SYSTEM DIALOGUE_SYSTEM DRAW_SCENE NEXT_SCENE STOP HUMAN ASSISTANT KEPT vist_prompt
        cc3m_prompt clean_caption mmdialog_prompt VIST MMDIALOG CC3M
    """,
    "qformer": """
        MEAN DEVIATION BLOCK_EPS LAST_EPS QFormerConfig QFormerEncoder normalise white_square header
        load_qformer build_qformer
    """,
    "story": "FORMAT_VERSION FILE_NAME Scene Story load_story",
    "storybook": "STORYBOOK unknown_words",
    "versions": "INSTALLED has_transformers check_transformers",
    "vision": """
        KEYS ImageEncoderConfig ImageAdapterHeader ImageEncoder picture_tensor to_square save_image_adapter
        load_image_adapter
    """,
    "vokens": "PICTURE IMAGE_HERE SPECIAL plain voken_strings block_starts gather_voken_states",
    "weights": """
        FORMAT_VERSION IMAGE_ADAPTER QFORMER KEYS MapperHeader save_mapper load_mapper weight_files gguf_in
        hash_weights atomic_save read_tensors check_shapes
    """,
}
RENAMED = {
    "adapter.take_beside": "llm.adapter.split_quantized_lora",
    "beside.Beside": "llm.unmerged_lora.UnmergedLora",
    "beside.is_packed": "llm.unmerged_lora.is_quantized",
    "families.base.SeeingFamily": "llm.families.base.VisionFamily",
    "llm.has_sight": "llm.load.has_vision_files",
    "llm.load_sight": "llm.load.load_vision",
    "precision.holding": "llm.precision.dtype_and_quantization",
    "qformer.DEVIATION": "vision.qformer.STD",
}
MOVED = {name.name for name in pkgutil.iter_modules([f"{minigpt5_core.__path__[0]}/old_paths"])}


def new_modules() -> Iterator[str]:
    """All modules by their new names."""
    for found in pkgutil.walk_packages(minigpt5_core.__path__[:1], "minigpt5_core."):
        if found.name.split(".")[1] not in {*MOVED, "old_paths", "__main__"}:
            yield found.name


def pairs() -> list[tuple[str, str]]:
    return [(module, name) for module, names in NAMES.items() for name in names.split()]


@pytest.mark.parametrize(("module", "name"), pairs(), ids=lambda part: part)
def test_an_old_name_is_the_same_object_as_the_new_one(module, name):
    old = getattr(importlib.import_module(f"minigpt5_core.{module}"), name)
    if f"{module}.{name}" in RENAMED:
        place, name = RENAMED[f"{module}.{name}"].rsplit(".", 1)
        assert getattr(importlib.import_module(f"minigpt5_core.{place}"), name) is old
    else:
        new = [importlib.import_module(place) for place in new_modules()]
        assert any(getattr(place, name, None) is old for place in new)


def test_every_module_that_moved_is_among_these():
    assert {name.split(".")[0] for name in NAMES} >= MOVED


def test_old_paths_lead_on_inside_comfyui_too(pack):
    """There the package's name is a path, and the core a second copy."""
    new, old = pack.part("minigpt5_core.llm.precision"), pack.part("minigpt5_core.precision")
    assert old.PRECISIONS is new.PRECISIONS
    assert sys.modules[f"{new.__name__.removesuffix('.llm.precision')}.precision"] is old
    base = pack.part("minigpt5_core.families.base")
    assert base.Family is pack.part("minigpt5_core.llm.families.base").Family
