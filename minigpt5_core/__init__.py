"""MiniGPT-5: a frozen LLM's generative vokens drive a diffusion model (arXiv 2310.02239)."""
