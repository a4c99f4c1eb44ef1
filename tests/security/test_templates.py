"""Chat templates are somebody else's programs: they run in transformers' sandbox, and nothing of ours runs another."""

import ast
from pathlib import Path

import jinja2
import pytest

from minigpt5_core.story.prompts import Turn, chat_text

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    path for room in ("minigpt5_core", "nodes", "trainer") for path in sorted((ROOT / room).rglob("*.py"))
]
# what runs or fetches something, unless it is told not to
LOADERS = ("pickle.load", "pickle.loads", "np.load", "numpy.load", "yaml.load", "joblib.load", "torch.jit.load",
           "torch.hub.load", "os.system", "os.popen", "urlopen", "load_dataset", "snapshot_download",
           "hf_hub_download", "eval", "exec", "jinja2.Template", "Template", "Environment", "extractall",
           "webdataset.WebDataset", "load_state_dict_from_url")  # fmt: skip


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append.__self__.__class__.__base__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch PWNED') }}",
        "{{ raise_exception.__globals__['__builtins__']['__import__']('os').system('touch PWNED') }}",
        "{% set x = messages.append({'role': 'user', 'content': 'x'}) %}",
        "{% include '/etc/passwd' %}",
        "{% import '/etc/passwd' as a %}",
    ],
)
def test_a_template_reaches_nothing(tiny_llm, tmp_path, monkeypatch, template):
    monkeypatch.chdir(tmp_path)
    tiny_llm.tokenizer.chat_template = "told" + template
    try:
        said = chat_text(tiny_llm, [Turn("Mia the fox.")])
    except Exception as error:  # jinja's own, or our sentence about it
        known = (jinja2.TemplateError, TypeError)  # TypeError: there is no loader to include anything by
        assert isinstance(error, known) or isinstance(error.__cause__, known) or isinstance(error, ValueError)
    else:
        assert said == "told"  # undefined, so nothing
    assert not list(tmp_path.iterdir())


def calls(file):
    """(name as written, keywords) of every call in a file; a ** is the keyword None."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: word.value for word in node.keywords}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_of_ours_runs_or_fetches_what_data_says(file):
    for name, keywords in calls(file):
        assert name not in LOADERS, f"{name} in {file.name}"
        if name == "torch.load":
            assert ast.unparse(keywords["weights_only"]) == "True"
        owner, _, method = name.rpartition(".")
        if method == "from_pretrained" and not owner.startswith("Peft"):  # PEFT's come behind check_peft
            assert {"local_files_only", None} & set(keywords), f"{name} in {file.name} may fetch"
            if (
                owner.startswith("Auto")
                and owner != "AutoencoderTiny"
                or owner in ("kind", "kind.model_class")
            ):
                assert {"trust_remote_code", None} & set(keywords), f"{name} in {file.name} may ask for code"
