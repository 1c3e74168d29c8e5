"""The house: imports one way, the README's map is what is on disk, public names are what they say."""

import ast
import re
from pathlib import Path

import dynamoe_hf


ROOT = Path(__file__).parent.parent
# A file may import only names to its left.
ORDER = ["_version", "arguments", "modeling", "folder", "card", "data", "label", "convert", "losses", "router_fit", "trainer", "train",
         "calibrate", "evaluate", "benchmark", "report", "publish", "generate", "demo", "cli"]  # fmt: skip


def test_imports_go_one_way():
    files = {path.stem for path in (ROOT / "dynamoe_hf").glob("*.py")} - {"__init__"}
    assert files | {"modeling"} == set(ORDER)
    for name in files:
        for node in ast.walk(ast.parse((ROOT / "dynamoe_hf" / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                target = node.module.split(".")[0]
                assert ORDER.index(target) < ORDER.index(name), f"{name}.py imports {target}, which stands to its right"


def test_readme_map_is_what_is_on_disk():
    section = (ROOT / "README.md").read_text().split("## Map")[1].split("```")[1]
    named = set(re.findall(r"^\s*([\w./]+\.(?:py|md|cfg|toml|txt)|Makefile|LICENSE)\s", section, flags=re.M))
    on_disk = {path.name for folder in ("modeling", "dynamoe_hf") for path in (ROOT / folder).glob("*.py")}
    on_disk |= {path.name for folder in ("examples", "benchmarks") for path in (ROOT / folder).glob("*.py")}
    missing = on_disk - named - {"_version.py"}
    assert not missing, f"not in the README's map: {missing}"
    everything = {path.name for path in ROOT.rglob("*") if ".venv" not in path.parts}
    assert named <= everything, f"in the README's map, not on disk: {named - everything}"


def test_public_names():
    for name in dynamoe_hf.__all__:
        assert getattr(dynamoe_hf, name).__doc__ or name == "__version__", f"{name} has no docstring"


def test_every_public_function_says_what_it_does():
    for folder in ("modeling", "dynamoe_hf"):
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                    shows = path.stem == "cli"  # its functions print; their names say so
                    assert ast.get_docstring(node) or shows, f"{path.name}: {node.name} has no docstring"


def test_no_path_of_a_machine_is_committed():
    for path in ROOT.rglob("*"):
        if path.suffix in {".py", ".md", ".cfg", ".toml", ".json"} and not {".venv", "runs", "build"} & set(path.parts):
            text = path.read_text()
            assert "/work/" not in text or path == Path(__file__), f"{path} names a path of one machine"
