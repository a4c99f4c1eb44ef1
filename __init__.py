"""MiniGPT-5 for ComfyUI: this folder is a custom node pack."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():  # type: ignore[no-untyped-def]
    from .nodes import MiniGPT5Extension  # here, so that pytest can import this file without ComfyUI

    return MiniGPT5Extension()
