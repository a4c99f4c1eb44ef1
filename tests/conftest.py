"""Real classes at toy size: a two-layer LLaMA with a byte-level tokenizer and a chat template.

And this pack loaded as ComfyUI loads it, with stand-ins (tests/comfy_stand_ins) in ComfyUI's place.
"""

import asyncio
import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from minigpt5_core.llm import FrozenLLM, add_vokens
from tests.chromium import CHROMIUM, FLAGS
from trainer.common.recipe import make_recipe

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

ROOT = Path(__file__).parents[1]
STAND_INS = Path(__file__).parent / "comfy_stand_ins"
PACK_NAME = "/comfyui/custom_nodes/comfyui-minigpt5"  # ComfyUI names a pack's module by its path


def make_tiny_tokenizer(special: Sequence[str] = ("<|im_start|>",)) -> PreTrainedTokenizerFast:
    """A token a byte, and the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )
    fast.add_special_tokens({"additional_special_tokens": list(special)})
    return fast


def make_tiny_parts(
    seed: int = 0, context: int = 512, tied: bool = True
) -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM]:
    """A LLaMA 32 wide with random weights large enough that its choices differ from token to token."""
    fast = make_tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        eos_token_id=fast.eos_token_id,
        bos_token_id=None,
        pad_token_id=fast.pad_token_id,
    )
    torch.manual_seed(seed)
    return fast, LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Callable[[Sequence[str]], PreTrainedTokenizerFast]:
    """Makes one with special tokens."""
    return make_tiny_tokenizer


@pytest.fixture
def tiny_llm() -> FrozenLLM:
    return add_vokens(*make_tiny_parts(), 8)


@pytest.fixture(scope="session")
def tiny_llm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("llm") / "tiny"
    for part in make_tiny_parts(context=4096):  # a token a letter: a story needs more
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def untied_llm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an output head of its own."""
    folder = tmp_path_factory.mktemp("llm") / "untied"
    for part in make_tiny_parts(context=4096, tied=False):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_diffusion_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-image model of the storybook's classes, made by its trainer in two steps."""
    from trainer.storybook.models import diffusion_model
    from trainer.storybook.models.autoencoder import AutoencoderRecipe
    from trainer.storybook.models.diffusion import (
        DiffusionRecipe,
        StorybookDiffusionRecipe,
        train_storybook_diffusion,
    )

    def bundled_tokenizer() -> CLIPTokenizer:  # training one needs transformers 5
        return CLIPTokenizer.from_pretrained(ROOT / "storybook" / "diffusers" / "tokenizer")

    folder = tmp_path_factory.mktemp("diffusion") / "tiny"
    recipe = StorybookDiffusionRecipe(
        AutoencoderRecipe(width=8, steps=2, batch=2),
        DiffusionRecipe(scenes=8, steps=2, batch=2, block_out_channels=(32, 32), text_layers=1),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion_model, "build_tokenizer", bundled_tokenizer)
        train_storybook_diffusion(recipe, folder)
    return folder


class Pack:
    """The pack as ComfyUI holds it: its module and its node classes by id.

    Its core is a second copy beside `minigpt5_core`: compare values, never classes.
    """

    def __init__(self) -> None:
        spec = importlib.util.spec_from_file_location(PACK_NAME, ROOT / "__init__.py")
        self.module = importlib.util.module_from_spec(spec)
        sys.modules[PACK_NAME] = self.module
        spec.loader.exec_module(self.module)
        self.nodes = {node.GET_SCHEMA().node_id: node for node in asyncio.run(self._node_list())}

    async def _node_list(self) -> list[type]:
        return await (await self.module.comfy_entrypoint()).get_node_list()

    def part(self, name: str) -> ModuleType:
        """One of its modules, such as "nodes.folders"."""
        return importlib.import_module(f"{PACK_NAME}.{name}")

    def run(self, node_id: str, hidden: dict[str, Any] | None = None, **inputs: Any) -> Any:
        """Runs a node as ComfyUI does; widgets that are not named keep their default, as in a fresh graph."""
        node = self.nodes[node_id]
        schema = node.GET_SCHEMA()
        widgets = {end.id: end.default for end in schema.inputs if hasattr(end, "default")}
        needed = {end.id for end in schema.inputs if not end.optional}
        given = widgets | inputs
        assert needed <= set(given) <= {end.id for end in schema.inputs}
        told = {name: (hidden or {}).get(name.name) for name in schema.hidden}
        return node.PREPARE_CLASS_CLONE(told).EXECUTE_NORMALIZED(**given)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], ModuleType]]:
    """Stands in for ComfyUI, whose folders are in tmp_path / "comfyui": host("folder_paths") is that module."""
    monkeypatch.syspath_prepend(STAND_INS)
    importlib.import_module("folder_paths").use(tmp_path / "comfyui")
    yield importlib.import_module
    gone = {PACK_NAME, *(path.stem for path in STAND_INS.iterdir())}
    for name in [name for name in sys.modules if name.split(".")[0] in gone]:
        del sys.modules[name]


@pytest.fixture
def load_pack(host: Callable[[str], ModuleType]) -> type[Pack]:
    """Loads the pack, for a test that changes its host before."""
    return Pack


@pytest.fixture
def pack(load_pack: type[Pack]) -> Pack:
    return load_pack()


@pytest.fixture(scope="session")
def trained(
    tiny_llm_folder: Path, tiny_diffusion_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str]]:
    """An aligned run and an image adapter trained with it, each in a few steps."""
    from tests.stages import train_align
    from trainer.stages.align import AlignRecipe
    from trainer.storybook.models.image_adapter import ImageAdapterRecipe, train_image_adapter

    folder = tmp_path_factory.mktemp("trained")
    llm = Path(shutil.copytree(tiny_llm_folder, folder / "llm"))
    parts = {"llm": str(llm), "diffusion": str(tiny_diffusion_folder)}
    train_align(make_recipe(AlignRecipe, **parts, captions=8, steps=1, batch=2), folder / "align")
    recipe = ImageAdapterRecipe(
        **parts, adapter=str(folder / "align" / "adapter"), mapper=str(folder / "align" / "mapper.safetensors"),
        tokens=4, word_steps=2, word_batch=2, story_steps=1, story_batch=1, caption_batch=1, pictures=2,
    )  # fmt: skip
    train_image_adapter(recipe, folder / "sight")
    return folder, parts


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real Chromium for all tests of a file."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()
