"""Worlds that anybody can write: a TOML file, or an LLM, becomes stories with a caption a scene, and no picture."""
