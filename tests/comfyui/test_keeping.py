"""Scenes are kept whatever way of caching ComfyUI runs with, and let go of when it is asked to free memory."""

import os
import shutil
from pathlib import Path

import pytest

from .conftest import comfyui
from .test_server import scenes_that_ran

MODES = [
    ("--cache-classic",),
    ("--cache-lru", "10"),
    ("--cache-ram",),
    ("--high-ram",),
    ("--cache-none",),
]
SHIPPED = Path(__file__).parents[2] / "storybook" / "voken_mappers" / "storybook.safetensors"


@pytest.fixture(params=[(), *MODES], ids=lambda mode: "".join(mode) or "default")
def cached(request, server, start_server):
    """A server in each mode; the tests' common one is in the default."""
    if not request.param:
        return server
    if request.param[0] not in (comfyui() / "comfy" / "cli_args.py").read_text(encoding="utf-8"):
        pytest.skip(f"this ComfyUI has no {request.param[0]}")
    caching = (comfyui() / "comfy_execution" / "caching.py").read_text(encoding="utf-8")
    if request.param == ("--cache-none",) and "class DependencyAwareCache" in caching:
        pytest.skip("this ComfyUI runs no node that expands with --cache-none (KeyError at its first child)")
    return start_server(*request.param)


def test_scenes_are_kept_and_the_same_comes_out(cached, graph):
    def run(**changes):
        result = cached.run(graph(seed=91, **changes))
        assert result.status == "success", result.error
        pages.append(result.outputs["view"]["minigpt5_pages"])
        return scenes_that_ran(result)

    pages = []
    assert run(scenes=2) == [1, 2]
    assert run(scenes=2) == []  # pressed again unchanged: the Interleaver itself may come from the cache
    assert run(scenes=3) == [3]
    assert run(scenes=3, instructions="\nGive Mia a red balloon.") == [2, 3]
    assert run(scenes=3) == []  # taken back
    assert run(scenes=1) == []
    assert pages[0] == pages[1] == pages[2][:2] and pages[4] == pages[2] and pages[5] == pages[2][:1]
    assert pages[3][1] != pages[2][1]

    cached.free()
    assert run(scenes=3) == [1, 2, 3]
    assert pages[-1] == pages[2]


def test_another_mapper_or_more_steps_draw_again_and_tell_only_what_saw_the_picture(cached, graph):
    mapper = cached.base / "models" / "voken_mappers" / "kept.safetensors"
    mapper.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(SHIPPED, mapper)

    def run(**changes):
        prompt = graph(scenes=1, seed=92, **changes)
        prompt["mapper"]["inputs"]["mapper_name"] = mapper.name
        ran = cached.run(prompt).ran
        return [part for part in ("turn", "sampler") if any(node.endswith(f"_{part}") for node in ran)]

    assert run() == ["turn", "sampler"]
    assert run(steps=5) == ["sampler"]
    shutil.copyfile(SHIPPED, f"{mapper}.new")
    os.replace(f"{mapper}.new", mapper)
    assert run(steps=5) == ["sampler"]
    assert run(steps=5) == []
