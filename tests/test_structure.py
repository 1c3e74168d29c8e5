"""The house: imports one way, CONTRIBUTING's map is what is on disk, sizes are bounded, public names are what they say."""

import ast
import re
from pathlib import Path

import pytest

import dynamoe_hf


ROOT = Path(__file__).parent.parent
# A file may import only names to its left.
ORDER = {
    "modeling": ["difficulty", "checks", "sparsity", "dense_base", "moe_base", "nested_mlp_triton", "engine_layers", "routing",
                 "configuration_dynamoe", "mlp_backends", "quantized_slices", "onednn_weights", "packed_weights", "fast_decode", "request_dials", "tensor_parallel", "nested_mlp", "nested_moe", "outputs", "self_draft", "modeling_dynamoe", "__init__"],
    "dynamoe_hf": ["_version", "arguments", "training_arguments", "modeling", "integrity", "disk", "processes", "folder", "tables", "card", "data", "observe", "kept_sums", "importance", "label", "convert",
                   "gguf_tokenizer", "gguf_file", "export", "losses", "plan",
                   "threshold_fit", "trainable", "trainer", "router_fit", "self_text", "run", "train", "calibrate", "evaluate", "benchmark", "plots", "report", "publish", "generate",
                   "serve_transformers", "serve", "vllm_plugin", "vllm_metrics", "vllm_dials", "vllm_model", "demo", "flags", "screens", "cli", "__init__"],
}  # fmt: skip
FILES = {folder: [name for name in names if name != "modeling"] for folder, names in ORDER.items()}
TRANSFORMERS_SIGNATURES = {
    ("modeling/modeling_dynamoe.py", "forward"),
    ("modeling/configuration_dynamoe.py", "__init__"),
}
FUNCTION_LINES, PARAMETERS, FILE_LINES = 60, 10, {"modeling/nested_mlp_triton.py": 600}


def trees():
    """(path from the root, parsed) of each file of the house."""
    for folder in ORDER:
        for path in sorted((ROOT / folder).glob("*.py")):
            yield f"{folder}/{path.name}", ast.parse(path.read_text())


@pytest.mark.parametrize("folder", ORDER)
def test_imports_go_one_way(folder):
    order = ORDER[folder]
    assert {path.stem for path in (ROOT / folder).glob("*.py")} == set(FILES[folder])
    for name in FILES[folder]:
        for node in ast.walk(ast.parse((ROOT / folder / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                target = node.module.split(".")[0]
                assert order.index(target) < order.index(name), f"{name}.py imports {target}, which stands to its right"


def test_modeling_knows_nothing_of_the_package():
    for name, tree in trees():
        if name.startswith("modeling/"):
            for node in ast.walk(tree):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                    assert not any(module.startswith("dynamoe_hf") for module in names), f"{name} imports the package"


def map_of(page):
    """The files that the map of a page names, by folder, in its order."""
    files, folder = {}, None
    for line in (ROOT / page).read_text().split("## Map")[1].split("```")[1].splitlines():
        if top := re.match(r"(\w+)/", line):
            folder = files.setdefault(top[1], [])
        elif file := re.match(r"  (\w+)\.py ", line):
            folder.append(file[1])
    return files


def test_map_is_what_is_on_disk():
    files = map_of("CONTRIBUTING.md")
    for folder in ("modeling", "dynamoe_hf", "examples", "benchmarks"):
        on_disk = {path.stem for path in (ROOT / folder).glob("*.py")}
        assert set(files[folder]) == on_disk, f"{folder}/: {set(files[folder]) ^ on_disk} is only on the map, or only on disk"
    for folder, names in FILES.items():
        assert files[folder] == names, f"the map of {folder}/ is not in the order of imports"
    named = {folder + "/" for folder in files}
    for line in (ROOT / "CONTRIBUTING.md").read_text().split("## Map")[1].split("```")[1].splitlines():
        named |= set(re.findall(r"^ *([\w./]+) ", line))
    everything = {
        path.name + "/" * path.is_dir() for path in ROOT.rglob("*") if not any(part.startswith(".venv") for part in path.parts)
    }
    assert named <= everything, f"on the map, not on disk: {named - everything}"


def test_short_map_has_the_same_order():
    section = (ROOT / "README.md").read_text().split("## Map")[1].split("```")[1]
    for folder, names in FILES.items():
        listed = re.search(rf"^{folder}/ +[^:]*:([^\n]*(?:\n +[^\n]*)*)", section, flags=re.M)[1]
        assert re.findall(r"\w+", listed) == [name for name in names if not name.startswith("_")]


# What is exempt has its reason here: the signature is somebody else's.
EXEMPT_DECORATORS = re.compile(r"jit|torch\.library\.custom_op|\.register_fake")


def parameters(function):
    arguments = function.args
    return len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs) + bool(arguments.vararg) + bool(arguments.kwarg)


def test_functions_are_short():
    long = [
        f"{name}: {node.name}, {node.end_lineno - node.lineno + 1} lines"
        for name, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= FUNCTION_LINES
    ]
    assert not long, f"over {FUNCTION_LINES} lines: {long}"


def test_functions_have_few_parameters():
    many = []
    for name, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and parameters(node) > PARAMETERS:
                of_triton_or_torch = any(EXEMPT_DECORATORS.search(ast.unparse(mark)) for mark in node.decorator_list)
                # transformers calls these by keyword: a model's inputs, a config's fields.
                of_transformers = (name, node.name) in TRANSFORMERS_SIGNATURES
                if not (of_triton_or_torch or of_transformers):
                    many.append(f"{name}: {node.name}, {parameters(node)}")
    assert not many, f"over {PARAMETERS} parameters: {many}. Hand a dataclass over."


def test_files_are_short():
    lines = {name: len((ROOT / name).read_text().splitlines()) for name, _ in trees()}
    long = {name: count for name, count in lines.items() if count > FILE_LINES.get(name, 450)}
    assert not long, f"too many lines: {long}"


def test_few_files_know_the_type_of_a_router():
    """A new router is one class in `ROUTERS`; whoever asks a model for its router's type must be changed with it."""
    folders = ("modeling", "dynamoe_hf", "benchmarks", "examples")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".md", ".html"}]
    known = sorted(str(path.relative_to(ROOT)) for path in paths if "router_type" in path.read_text())
    assert len(known) <= 6, f"{len(known)} files: {known}. Ask `config.has_dial`, or the router itself."


def test_public_names():
    for name in dynamoe_hf.__all__:
        assert getattr(dynamoe_hf, name).__doc__ or name == "__version__", f"{name} has no docstring"


def test_every_public_function_says_what_it_does():
    for name, tree in trees():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                shows = name == "dynamoe_hf/screens.py"  # its functions print; their names say so
                assert ast.get_docstring(node) or shows, f"{name}: {node.name} has no docstring"


def test_no_path_of_a_machine_is_committed():
    for path in ROOT.rglob("*"):
        if path.suffix in {".py", ".md", ".cfg", ".toml", ".json"} and not {
            ".venv",
            ".venv-vllm",
            ".venv-oldest",
            "runs",
            "build",
        } & set(path.parts):
            text = path.read_text()
            assert "/work/" not in text or path == Path(__file__), f"{path} names a path of one machine"
