"""The nodes: the only place that knows ComfyUI."""
