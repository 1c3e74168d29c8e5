"""The command line: every stage from a shell, folder in, folder out; `--help` teaches; errors are one line."""

import dataclasses
import importlib
import json
import shlex
import shutil
import subprocess
import sys
import time
from inspect import signature
from pathlib import Path
from typing import get_args

import pytest
import torch

from dynamoe_hf import arguments, benchmark, cli, evaluate, importance, publish
from dynamoe_hf.arguments import field_helps
from dynamoe_hf.card import render_card
from dynamoe_hf.modeling.difficulty import SIMILARITIES
from dynamoe_hf.modeling.routing import ROUTERS


STAGES = ("plan", "convert", "adapt", "train", "calibrate", "evaluate", "generate", "serve", "inspect", "bench", "report", "publish", "export",
          "demo")  # fmt: skip


@pytest.fixture(scope="module")
def folders(dense_folder, tmp_path_factory):
    """The whole way on a tiny model, through the command line."""
    root = tmp_path_factory.mktemp("cli")
    small = ["--max-tokens", "1024", "--block-size", "64"]
    assert cli.main(["convert", str(dense_folder), str(root / "converted"), *small]) == 0
    training = ["--max-tokens", "8192", "--block-size", "64", "--router-learning-rate", "1e-2"]
    assert cli.main(["train", str(root / "converted"), str(root / "trained"), *training]) == 0
    assert (
        cli.main(["calibrate", str(root / "trained"), "--budgets", "0.6,0.8", "--max-tokens", "4096", "--block-size", "64"])
        == 0
    )
    return root


def test_the_whole_way(folders, dense_folder, capsys):
    trained = str(folders / "trained")
    small = ["--max-tokens", "2048", "--block-size", "64"]
    arguments = [
        "evaluate",
        trained,
        "--budget",
        "0.6,0.8",
        "--base",
        str(dense_folder),
        "--baselines",
        "static",
        "random",
        *small,
    ]
    assert cli.main(arguments) == 0
    table = capsys.readouterr().out
    assert "budget 0.6" in table
    assert "static" in table
    assert cli.main([*arguments, "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [entry["setting"] for entry in entries] == ["budget 0.6", "budget 0.8"]
    assert abs(entries[0]["mean_share"] - 0.6) < 0.02

    assert cli.main(["generate", trained, "with", "--budget", "0.6", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.strip()
    assert cli.main(["inspect", trained]) == 0
    screen = capsys.readouterr().out
    assert len(screen.splitlines()) < 24, "one screen"
    assert "60% at" in screen
    assert cli.main(["inspect", trained, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == 3
    assert cli.main(["export", trained, str(folders / "small"), "--width", "0.5"]) == 0
    capsys.readouterr()
    assert cli.main(["report", trained, "--budget", "0.6"]) == 0
    written = capsys.readouterr().out.split()
    assert any(path.endswith("index.html") for path in written)


def test_the_card_tells_how_to_make_the_model_again(dense_folder, text_file, tmp_path, monkeypatch):
    """Its commands, run elsewhere, give the same weights: the adaptation before the training, and routers fitted on few tokens, too."""
    small = ["--text", "text.txt", "--max-tokens", "512", "--block-size", "32"]
    stages = [
        ["convert", dense_folder.name, "converted", *small],
        ["adapt", "converted", "adapted", *small],
        ["train", "adapted", "trained", *small, "--router-tokens", "256", "--seed", "3"],
        ["calibrate", "trained", "--text", "text.txt", "--max-tokens", "4096", "--block-size", "64", "--budgets", "0.6"],
        ["evaluate", "trained", *small, "--budget", "0.6", "--base", dense_folder.name],
    ]

    def at(place):
        (tmp_path / place).mkdir()
        (tmp_path / place / dense_folder.name).symlink_to(dense_folder)
        shutil.copy(text_file, tmp_path / place / "text.txt")
        monkeypatch.chdir(tmp_path / place)

    at("here")
    for stage in stages:
        assert cli.main(stage) == 0, stage
    card = render_card(tmp_path / "here" / "trained", local_files_only=True).text
    assert "Trained: layers, at full width alone." in card and "Then: 512 tokens of text.txt" in card
    commands = [shlex.split(line) for line in card.split("```bash")[1].split("```")[0].splitlines() if line.strip()]
    assert [command[1] for command in commands] == ["convert", "train", "train", "calibrate", "evaluate"]
    at("elsewhere")
    for command in commands:
        assert cli.main(command[1:]) == 0, command
    for name in ("model.safetensors", "config.json", "calibration.json", "results.json"):
        assert Path("trained", name).read_bytes() == (tmp_path / "here" / "trained" / name).read_bytes(), name


def test_training_shows_the_losses_that_it_has(folders, capsys):
    record = json.loads((folders / "trained" / "training.json").read_text())
    cli.show_training(record)
    screen = capsys.readouterr().out
    assert record["history"][-1]["width_loss"] > 0 == record["history"][-1]["router_loss"], "routers have the last word"
    assert f"{record['history'][-1]['width_loss']:.4f}" in screen
    assert "router_loss" not in screen
    assert record["history"][0]["hidden_loss"] > 0 == record["history"][0]["width_loss"]


@pytest.mark.parametrize("stage", STAGES)
def test_help_teaches_by_example(stage, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([stage, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"dynamoe {stage}" in text.split("example:")[1]


@pytest.mark.parametrize("name", STAGES)
def test_options_are_the_functions_parameters(name, capsys):
    """The command line, the dataclass of a stage and its function cannot drift apart: same names, same defaults."""
    assert tuple(cli.STAGES) == STAGES
    stage = cli.STAGES[name]
    function = getattr(importlib.import_module(f"dynamoe_hf.{stage.module}"), stage.function)
    parameters = signature(function).parameters
    told = cli.parse(name, [f"a {positional}" for positional in stage.positionals])
    for positional in stage.positionals:
        assert parameters[positional].default is (None if positional in stage.optional else parameters[positional].empty)
        assert told.pop(positional) == f"a {positional}"
    assert told.pop("json", False) is False
    if stage.arguments is None:
        assert list(parameters) == list(stage.positionals) and told == {}
        return
    assert list(parameters) == [*stage.positionals, "arguments", "settings"]
    assert parameters["arguments"].annotation == stage.arguments | None
    assert parameters["arguments"].default is None
    assert told == dataclasses.asdict(stage.arguments()), "the flags' defaults"
    fields = [field.name for field in dataclasses.fields(stage.arguments)]
    assert set(stage.exclusive) <= set(fields)
    assert all(field_helps(stage.arguments)[field] for field in fields), "a field without help"
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    screen = capsys.readouterr().out
    for field in fields:
        assert f"--{ {'train_parts': 'train'}.get(field, field).replace('_', '-') } " in screen


def test_choices_are_those_of_the_code():
    assert set(get_args(arguments.Importance)) == set(importance.IMPORTANCES)
    assert set(get_args(arguments.Similarity)) == set(SIMILARITIES)
    assert set(get_args(arguments.RouterType)) == set(ROUTERS)
    assert get_args(arguments.Baseline) == evaluate.BASELINES and get_args(arguments.Layout) == publish.LAYOUTS
    assert all(name in field_helps(arguments.BenchArguments)["shapes"] for name in benchmark.SHAPES)


def test_settings_by_name_or_as_one_object():
    given = arguments.CalibrateArguments(max_tokens=64)
    assert arguments.resolve(arguments.CalibrateArguments, given, {"batch_size": 2}) == arguments.CalibrateArguments(
        max_tokens=64, batch_size=2
    )
    assert given.batch_size == arguments.CalibrateArguments.batch_size, "what the caller gave was changed"
    with pytest.raises(TypeError, match=r"must be CalibrateArguments, found tuple.*by name"):
        arguments.resolve(arguments.CalibrateArguments, (0.5,), {})
    with pytest.raises(TypeError, match=r"has no budget\. Its settings are budgets, lowest_density, threshold_ramp"):
        arguments.resolve(arguments.CalibrateArguments, None, {"budget": 0.5})


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("calibrate F --budgets 0.5,0.75", {"budgets": (0.5, 0.75)}),
        ("evaluate F --budget=0.5 --baselines static label", {"budget": (0.5,), "baselines": ["static", "label"]}),
        ("evaluate --text a.txt b.txt --json F", {"text": ["a.txt", "b.txt"], "json": True, "folder": "F"}),
        ("train F G --text a.txt b.txt", {"text": ["a.txt", "b.txt"]}),
        ("train F G --sensitivity-range 0.2 1", {"sensitivity_range": (0.2, 1.0)}),
        ("train F G --train lora --bf16 --harm token", {"train_parts": "lora", "bf16": True, "harm": "token"}),
        ("train F G --dataset a/b:c --router-tokens 0", {"dataset": "a/b:c", "router_tokens": 0}),
        ("convert B F --widths 0,0.5,1 --router-dim 8", {"widths": (0.0, 0.5, 1.0), "router_dim": 8}),
        ("generate F --chat", {"chat": True, "prompt": None}),
        ("generate F words --budget 0.5 --chat", {"budget": 0.5, "chat": True, "prompt": "words"}),
        ("publish F a/b --variants 0.5,0.6 --dry-run", {"variants": (0.5, 0.6), "dry_run": True}),
    ],
)
def test_forms_of_values(words, expected):
    name, *rest = words.split()
    told = cli.parse(name, rest)
    assert {field: told[field] for field in expected} == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("evaluate F --budget 0.5 --force-expert 1", "--budget and --force-expert are not allowed together"),
        ("generate F words --budget 0.5 --sensitivity 0.5", "--budget and --sensitivity are not allowed together"),
        ("evaluate F --budget half", "expected numbers divided by commas, such as 0.5,0.75, found 'half'"),
        ("calibrate F --budgets 0.5,", "expected numbers divided by commas, such as 0.5,0.75, found '0.5,'"),
        ("train F G --text", "expected one file or more, found none"),
        ("train F G --harm none", "--harm"),
        ("train F G --no-bf16", "--no-bf16"),
        ("train F", "OUT"),
        ("trian F G", "There is no stage 'trian'. Did you mean 'train'?"),
        ("", "A stage is missing."),
    ],
)
def test_usage_errors(words, message, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # tyro wraps its boxes
    with pytest.raises(SystemExit) as stop:
        sys.exit(cli.main(words.split()))
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "/nowhere"], "neither a model folder nor a model on the Hub"),
        (["train", "/nowhere", "/tmp/never"], "neither a model folder"),
        (["generate", "/nowhere", " "], "prompt is empty"),
        (["export", "/nowhere", "/"], "exists already"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("dynamoe: ")
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train F G --learning-rate nan", "`learning_rate` must be a finite number above 0, found nan"),
        ("adapt F G --learning-rate inf", "`learning_rate` must be a finite number above 0, found inf"),
        ("train F G --seed -1", "`seed` must be a whole number"),
        ("train F G --sensitivity-range 0.9 0.1", "`sensitivity_range` must rise"),
        ("train F G --kd-loss-coef -1", "`kd_loss_coef` must be"),
    ],
)
def test_settings_that_are_refused_are_one_line(words, message, capsys):
    """The dataclasses look at their numbers when they are made, before the stage begins."""
    assert cli.main(words.split()) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"dynamoe: {message}") and told.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        cli.main([*words.split(), "--debug"])


@pytest.mark.parametrize("wrong", ["0", "-3", "2.5", "many"])
@pytest.mark.parametrize(
    "option",
    ["bench F --threads", "bench F --rounds", "convert B F --router-dim", "train F G --batch-size", "evaluate F --max-tokens"],
)
def test_counts_are_whole_and_at_least_one(option, wrong, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # tyro wraps its boxes
    with pytest.raises(SystemExit) as stop:
        cli.main([*option.split()[:-1], f"{option.split()[-1]}={wrong}"])
    assert stop.value.code == 2
    assert f"expected a whole number of at least 1, found '{wrong}'" in capsys.readouterr().err


def test_too_little_memory_on_a_gpu(monkeypatch, capsys):
    def stage(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB")

    monkeypatch.setattr("dynamoe_hf.folder.inspect_folder", stage)
    assert cli.main(["inspect", "folder"]) == 1
    message = capsys.readouterr().err
    assert "does not suffice: CUDA out of memory" in message and "CUDA_VISIBLE_DEVICES= dynamoe" in message


def test_installed_command():
    result = subprocess.run([sys.executable, "-m", "dynamoe_hf.cli", "--version"], capture_output=True, text=True)
    assert result.stdout.startswith("dynamoe 0.")


@pytest.fixture(scope="module")
def console_script(tmp_path_factory):
    """What pip writes for the entry point of setup.cfg."""
    script = tmp_path_factory.mktemp("bin") / "dynamoe"
    script.write_text("import sys\nfrom dynamoe_hf.cli import main\nsys.exit(main())\n")
    return [sys.executable, str(script)]


@pytest.mark.parametrize(
    ("words", "code"), [("--help", 0), ("train --help", 0), ("--version", 0), ("train F G --batch-size 0", 2), ("trian", 2)]
)
@pytest.mark.parametrize("start", ["script", "module"])
def test_help_and_usage_errors_answer_at_once(words, code, start, console_script):
    command = console_script if start == "script" else [sys.executable, "-m", "dynamoe_hf.cli"]
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        result = subprocess.run([*command, *words.split()], capture_output=True, text=True)
        seconds.append(time.perf_counter() - started)
        assert result.returncode == code
        told, silent = (result.stderr, result.stdout) if code else (result.stdout, result.stderr)
        assert told and not silent, result
        assert "torch" not in told and "Warning" not in told
    assert min(seconds) < 0.5, seconds


@pytest.mark.parametrize("words", ["--help", "evaluate --help", "--version"])
def test_help_imports_neither_torch_nor_transformers(words):
    program = (
        "import sys\nsys.argv[0] = 'dynamoe'\nfrom dynamoe_hf.cli import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'peft', 'numpy'} & set(sys.modules)\n    assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", program, *words.split()], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_stages_begin_without_the_noise_of_their_imports(folders, console_script):
    result = subprocess.run([*console_script, "inspect", str(folders / "trained")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "layers" in result.stdout and result.stderr == ""


def test_other_messages_of_the_quietened_loggers_are_heard(caplog):
    import logging

    cli.quieten_imports()
    logging.getLogger("torchao").warning("Failed to load kernels.so: no such file")
    logging.getLogger("torch.utils._pytree").warning(
        "%s is an Enum subclass and is now natively supported by torch.compile", int
    )
    logging.getLogger("torchao").warning("Something else")
    logging.getLogger("torch.utils._pytree").warning("Something else of %s", int)
    assert [record.getMessage() for record in caplog.records] == ["Something else", "Something else of <class 'int'>"]
