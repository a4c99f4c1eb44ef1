"""The field's metrics on real stories, as they should be computed and as the MiniGPT-5 paper's script computes them."""
