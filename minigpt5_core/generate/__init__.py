"""The LLM's replies: prompts in, text and voken states out (arXiv 2310.02239)."""

from .cache import StoryCache
from .decode import generate
from .prompt import Prompt, embed_prompt, position_keys
from .row import Reply
from .sampling import Pictures, Sampling, seeded_generator

__all__ = [
    "Pictures",
    "Prompt",
    "Reply",
    "Sampling",
    "StoryCache",
    "embed_prompt",
    "generate",
    "position_keys",
    "seeded_generator",
]
