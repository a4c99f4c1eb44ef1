"""The English texts are those of the schemas."""

import importlib.util
import json
from pathlib import Path


def test_the_english_locale_says_what_the_nodes_say(server):
    spec = importlib.util.spec_from_file_location("make_locales", Path(__file__).parent / "make_locales.py")
    make_locales = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_locales)
    found = json.loads(make_locales.ENGLISH.read_text(encoding="utf-8"))
    assert found == make_locales.english(server.get("/object_info"))
