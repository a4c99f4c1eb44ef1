"""A learned prefix (arXiv 2101.00190): keys and values that stand in front of every story, in each layer of the LLM.

PEFT's layout: `prompt_embeddings` (tokens, 2 * layers * width), a layer's keys before its values.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..errors import BadInputError
from ..tensor_files import read_whole

PROMPT = "prompt_embeddings"


@dataclass(frozen=True)
class Prefix:
    """`values` (2 * layers, heads, tokens, d): layer 0's keys, layer 0's values, layer 1's keys and so on.

    A cache is made on the device and in the dtype that `causal_lm` has at that time.
    """

    values: Tensor
    causal_lm: PreTrainedModel

    def __call__(self, rows: int) -> DynamicCache:
        """A cache for `rows` stories that holds the prefix and nothing else."""
        values = self.values.to(self.causal_lm.device, self.causal_lm.dtype)
        keys_and_values = values[:, None].expand(-1, rows, -1, -1, -1)
        return DynamicCache(list(zip(keys_and_values[::2], keys_and_values[1::2], strict=True)))


def read_prefix(file: Path, causal_lm: PreTrainedModel) -> Prefix:
    """The prefix in a file that PEFT wrote; BadInputError for one that was trained for another LLM."""
    heads, width = _key_shape(causal_lm)
    layers = causal_lm.config.get_text_config().num_hidden_layers
    tensors, _ = read_whole(file)
    found = tuple(tensors[PROMPT].shape) if PROMPT in tensors else None
    if found is None or len(found) != 2 or found[1] != 2 * layers * heads * width:
        raise BadInputError(
            f"{file}: its prefix is {found}, expected (tokens, {2 * layers * heads * width}): keys and values of "
            f"{layers} layers with {heads} heads of {width}. Give the LLM it was trained for."
        )
    values = tensors[PROMPT].view(found[0], 2 * layers, heads, width).permute(1, 2, 0, 3)
    return Prefix(values, causal_lm)


def _key_shape(causal_lm: PreTrainedModel) -> tuple[int, int]:
    """How many heads the keys have, and how wide each is: most LLMs have fewer key heads than query heads."""
    config = causal_lm.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
