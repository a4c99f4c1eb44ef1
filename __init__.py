"""MiniGPT-5 for ComfyUI: this folder is a custom node pack; its nodes will be listed in `nodes`."""
