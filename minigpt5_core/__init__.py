"""MiniGPT-5: a frozen LLM's generative vokens drive a diffusion model (arXiv 2310.02239)."""

import os

# Modules that moved are still found under their old names: each has a file in old_paths/ that says where it is now.
__path__.append(os.path.join(__path__[0], "old_paths"))
