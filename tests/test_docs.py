"""The documentation does what it says: code blocks run, commands parse, the page of the command line is that of the parsers."""

import importlib
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import tiny_dense, tiny_tokenizer

import dynamoe_hf
from dynamoe_hf import calibrate_budgets, cli, convert_model, evaluate_model, train_model


ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted((DOCS / "howto").glob("*.md"))]
FENCE = re.compile(r"^(?P<mark>(?:<!-- not run: (?P<reason>.+?) -->\n)?)```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
# Blocks that cannot run here, by page. Whoever adds one says why above it, and counts it here.
NOT_RUN = {
    "docs/index.md": ["installs the package"],
    "docs/tutorial.md": ["installs the package", "downloads from the Hub", "downloads from a package registry"],
}
CHAT = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    code: str
    reason: str | None  # why it is not run

    @property
    def place(self):
        return f"{name_of(self.page)}:{self.line}"


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks_of(page):
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        yield Block(page, line, match["language"], match["code"], match["reason"])


def commands_of(block):
    """The `dynamoe` commands of a block as argument lists, without prompts and comments."""
    if block.language not in ("", "bash", "console", "sh", "shell"):
        return []
    lines = [line.removeprefix("$ ") for line in block.code.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("dynamoe ")]


COMMANDS = [
    pytest.param(command, id=f"{block.place} {' '.join(command[:1])}")
    for page in PAGES
    for block in blocks_of(page)
    for command in commands_of(block)
]
# The tutorial has a test of its own, and so has the guide to extending, which changes tables of the package: test_extending.py.
OWN_TEST = ("tutorial.md", "extending.md")
RUNNABLE = [page for page in PAGES if page.name not in OWN_TEST and any(b.language == "python" for b in blocks_of(page))]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """What a reader has: a dense model, a text in three parts, and the folders that the pages name. Treat it as read-only."""
    root = tmp_path_factory.mktemp("docs")
    tiny_dense(num_hidden_layers=1, max_position_embeddings=1024).save_pretrained(root / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(root / "base")
    import pydoc_data.topics

    text = "\f".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore").decode()
    for index, name in enumerate(("train.txt", "calibration.txt", "heldout.txt", "corpus.txt", "mytext.txt")):
        (root / name).write_text(text[index * 40_000 : (index + 1) * 40_000])
    small = {"block_size": 64, "max_tokens": 4096}
    convert_model(root / "base", root / "converted", **small)
    train_model(root / "converted", root / "trained", train_parts="routers", **small)
    calibrate_budgets(root / "trained", budgets=[0.5, 0.75, 0.9], **small)
    evaluate_model(root / "trained", budget=0.75, block_size=64, max_tokens=1024)
    shutil.copytree(root / "trained", root / "USER" / "NAME")  # a Hub id that is a folder here
    return root


@pytest.fixture
def reader(library, tmp_path, monkeypatch):
    """A folder of the reader's own, with all of that in it, as the current one."""
    shutil.copytree(library, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_page(page, run_commands=False):
    """All blocks of a page in order, the Python ones in one namespace."""
    namespace = {"__name__": "docs_page"}
    ran = 0
    for block in blocks_of(page):
        if block.reason:
            continue
        if block.language == "python":
            # Line numbers of a traceback are those of the page.
            code = "\n" * (block.line - 1) + block.code
            exec(compile(code, name_of(page), "exec"), namespace)
            ran += 1
        elif run_commands:
            for command in commands_of(block):
                assert cli.main(command) == 0, f"{block.place}: dynamoe {shlex.join(command)}"
                ran += 1
    return ran


@pytest.mark.parametrize("page", RUNNABLE, ids=name_of)
def test_python_blocks_run(page, reader):
    for module in ("torchao", "trl", "peft"):
        if f"from {module}" in page.read_text(encoding="utf-8"):
            pytest.importorskip(module)
    assert run_page(page) > 0


def test_the_tutorial_runs_from_its_first_line_to_its_last(library, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="the tutorial draws a report")
    shutil.copytree(library / "base", tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    assert run_page(DOCS / "tutorial.md", run_commands=True) >= 12
    assert (tmp_path / "trained" / "report" / "index.html").is_file()
    printed = capsys.readouterr().out
    assert "budget 0.75" in printed and "75%: The with statement" in printed


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, capsys):
    if command[0] in ("STAGE", "--help", "--version"):
        return
    assert command[0] in cli.STAGES, f"there is no stage {command[0]!r}"
    if "--help" not in command:
        assert cli.parse(*(command[0], command[1:]))


def test_blocks_that_are_not_run_are_known():
    found = {name_of(page): [block.reason for block in blocks_of(page) if block.reason] for page in PAGES}
    assert {page: reasons for page, reasons in found.items() if reasons} == NOT_RUN


def test_every_mark_stands_right_above_a_block():
    for page in PAGES:
        marks = page.read_text(encoding="utf-8").count("<!-- not run:")
        assert marks == sum(block.reason is not None for block in blocks_of(page)), f"a mark of {page.name} has no block"


def test_the_page_of_the_command_line_is_that_of_the_parsers():
    specification = importlib.util.spec_from_file_location("make_cli", DOCS / "make_cli.py")
    make_cli = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(make_cli)
    assert (DOCS / "cli.md").read_text(encoding="utf-8") == make_cli.page(), "run `python docs/make_cli.py`"
    assert all(f"## dynamoe {name}\n" in make_cli.page() for name in cli.STAGES)


def test_the_reference_has_every_public_name_and_the_arguments_of_every_stage():
    named = set(re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(encoding="utf-8"), flags=re.M))
    public = {f"dynamoe_hf.{name}" for name in dynamoe_hf.__all__ if name != "__version__"}
    stages = [stage.arguments for stage in cli.STAGES.values() if stage.arguments is not None]
    assert public | {f"{kind.__module__}.{kind.__name__}" for kind in stages} <= named
    for name in named:
        target = dynamoe_hf
        for part in name.split(".")[1:]:
            target = getattr(target, part) if hasattr(target, part) else importlib.import_module(f"{target.__name__}.{part}")
        assert target.__doc__, f"{name} has no docstring"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1].split("\nnot_in_nav:")[0]
    listed = set(re.findall(r"[\w/-]+\.md", navigation))
    assert listed == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}


@pytest.mark.parametrize("picture", sorted((DOCS / "pictures").glob("*.svg")), ids=lambda path: path.name)
def test_drawings_are_legible_without_the_network(picture):
    text = picture.read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text and "<title" in text and "<desc" in text
    assert 'viewBox="0 0 360 ' in text, "text of 13 units must stay 13 pixels where the screen has 360"
    assert not re.search(r"href=\"http|url\(http|@import", text)
    assert min(int(size) for size in re.findall(r"font: (\d+)px", text)) >= 12


def build_site(folder, out):
    """`make docs` without its installation. The trap: `--quiet` would count no warnings, and `--strict` pass everything."""
    pytest.importorskip("mkdocs", reason="needs the site's generator: `make docs`, or pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    assert " ".join(command[2:5]) in (ROOT / "Makefile").read_text() and "--quiet" not in command
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_the_network(tmp_path):
    result = build_site(ROOT, tmp_path / "site")
    assert result.returncode == 0, result.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        loaded = re.findall(r"<(?:script|img|link)[^>]+(?:src|href)=\"(https?://[^\"]+)", page.read_text(encoding="utf-8"))
        assert not loaded, f"{page.name} loads from the network"


@pytest.mark.slow
def test_a_wrong_link_or_anchor_fails_the_build(tmp_path):
    for name in ("docs", "dynamoe_hf", "modeling", "benchmarks/results"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with open(tmp_path / "docs" / "index.md", "a") as page:
        page.write("\n[one](concepts.md#nowhere) [two](missing.md) [three](../benchmarks/results/missing.json)\n")
    result = build_site(tmp_path, tmp_path / "site")
    assert result.returncode != 0
    assert all(target in result.stderr for target in ("#nowhere", "missing.md", "benchmarks/results/missing.json"))
