"""`import dynamoe_hf`: lazy, and yet enough for the Auto classes; and what a folder needs where it is not installed."""

import json
import os
import subprocess
import sys

import pytest
from conftest import tiny_dense, tiny_tokenizer
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

import dynamoe_hf
from dynamoe_hf.convert import convert_model
from dynamoe_hf.export import export_dense


TEXT = "with open(path) as file:"


@pytest.fixture(scope="module")
def folder(dense_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("package") / "converted"
    convert_model(dense_folder, out, importance="activation", max_tokens=512, block_size=64)
    return out


def run(program, *args, name=None):
    """A program in a process of its own; `name` is that of its file."""
    command = [sys.executable, "-c", program] if name is None else [sys.executable, str(name)]
    if name is not None:
        name.write_text(program)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [*command, *map(str, args)], capture_output=True, text=True, cwd="/", env=environment, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.mark.parametrize("first", ["dynamoe_hf", "transformers"])
@pytest.mark.parametrize("name", [None, "dynamoe.py", "train.py"])
def test_importing_the_package_registers_the_model(folder, first, name, tmp_path):
    """Whichever is imported first, and whatever the program is called: the Auto class finds the model and asks nothing."""
    second = {"dynamoe_hf": "transformers", "transformers": "dynamoe_hf"}[first]
    program = (
        f"import sys, {first}, {second}\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert isinstance(model, dynamoe_hf.DynaMoEForCausalLM), type(model)\n"
        "assert 'dynamoe_hf.train' not in sys.modules and 'datasets' not in sys.modules\n"
    )
    assert run(program, folder, name=name and tmp_path / name).stdout == ""


def test_public_names_load_when_they_are_used():
    assert {*dynamoe_hf._MODULES, "__version__"} == set(dynamoe_hf.__all__) <= set(dir(dynamoe_hf))
    for name in dynamoe_hf.__all__:
        assert getattr(dynamoe_hf, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'convert_models'"):
        dynamoe_hf.convert_models  # noqa: B018
    run("from dynamoe_hf import *\nassert callable(convert_model) and isinstance(DynaMoEConfig, type)")


# Where the package cannot be imported. `AutoTokenizer` reads the config first, whatever class tokenizer_config.json names, and asks on the
# terminal whether to run the config's code. Told no, it goes on without the config, and the folder must be enough for it.
LOAD_TOKENIZER = """
import json, sys
sys.modules["dynamoe_hf"] = None
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)
assert not [name for name in sys.modules if name.startswith("transformers_modules")], "the folder's code was run"
print(json.dumps([type(tokenizer).__name__, tokenizer(sys.argv[2])["input_ids"]]))
"""


def llama_tokenizer():
    """A tokenizer of a class with its own rules, which a folder must name: it cannot be told from the config's type."""
    letters = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, **{chr(code): code - 29 for code in range(33, 127)}}
    return LlamaTokenizer(vocab=letters, merges=[])


@pytest.mark.parametrize("kind", [tiny_tokenizer, llama_tokenizer])
def test_tokenizer_needs_no_remote_code_and_no_question(kind, tmp_path):
    tokenizer = kind()
    tiny_dense().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    small = {"importance": "activation", "max_tokens": 512, "block_size": 64}
    convert_model(tmp_path / "dense", tmp_path / "converted", **small)
    export_dense(tmp_path / "converted", tmp_path / "exported", width=0.5)
    for name in ("converted", "exported"):
        assert json.loads((tmp_path / name / "tokenizer_config.json").read_text())["tokenizer_class"]
        loaded, ids = json.loads(run(LOAD_TOKENIZER, tmp_path / name, TEXT).stdout)
        assert loaded == type(tokenizer).__name__
        assert ids == tokenizer(TEXT)["input_ids"]
    by_class = PreTrainedTokenizerFast.from_pretrained(tmp_path / "converted")
    assert by_class(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
