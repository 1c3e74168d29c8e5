"""docs/extending.md: its examples run as they stand and change what they say, and nothing of them is left behind here."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from conftest import FAMILIES
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from dynamoe_hf.modeling import dense_base, mlp_backends
from dynamoe_hf.modeling.difficulty import SIMILARITIES
from dynamoe_hf.modeling.routing import ROUTERS


PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
EXAMPLES = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## |```).)*?```python\n(.*?)^```", PAGE, flags=re.M | re.S))
ADDED = {
    "A measure of difficulty": lambda: "largest_error" in SIMILARITIES,
    "A router": lambda: "confident" in ROUTERS,
    "A family of models": lambda: dense_base.LAYOUTS[-1].gate == "w1",
    "An execution": lambda: mlp_backends.EXECUTIONS[0].name == "loop",
}


@pytest.fixture
def tables(monkeypatch):
    """The tables of the package and of transformers; afterwards they are as before."""
    for module, name in ((dense_base, "LAYOUTS"), (mlp_backends, "EXECUTIONS")):
        monkeypatch.setattr(module, name, getattr(module, name))
    registered = [mapping._extra_content for mapping in (CONFIG_MAPPING, MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)]
    held = [(table, dict(table)) for table in (SIMILARITIES, ROUTERS, *registered)]
    yield
    for table, before in held:
        table.clear()
        table.update(before)


@pytest.mark.parametrize("title", ADDED)
def test_the_example_runs_as_it_stands(title, tables, tmp_path, monkeypatch):
    assert not ADDED[title](), "an example before this one was not undone"
    path = tmp_path / "extending_example.py"
    path.write_text(EXAMPLES[title])
    # As a module, since transformers looks for the module of a model's class.
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    assert ADDED[title]()


def test_nothing_is_left_behind():
    assert not any(added() for added in ADDED.values())


def test_every_section_has_one_example():
    assert list(EXAMPLES) == list(ADDED) == re.findall(r"^## (.+)", PAGE, flags=re.M)
    assert PAGE.count("```python\n") == len(EXAMPLES)


def test_the_page_names_what_exists():
    """Files, and tests of the suite, so that a moved test does not leave a promise behind."""
    root = Path(__file__).parent.parent
    for name in re.findall(r"`((?:tests|modeling|dynamoe_hf)/[\w/]+\.py)`", PAGE):
        assert (root / name).is_file(), f"{name} is not on disk"
    tests = "\n".join(path.read_text() for path in (root / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", PAGE):
        assert f"def {name}(" in tests, f"{name} is no test of the suite"


def test_the_page_lists_the_families_that_are_tested():
    listed = re.search(r"against their\s+dense base: (.*?)\.\s", PAGE, flags=re.S)[1]
    assert listed.replace("\n", " ").split(", ") == list(FAMILIES)
