"""All node classes that ComfyUI knows; a test puts in those that it needs."""

NODE_CLASS_MAPPINGS: dict[str, type] = {}
