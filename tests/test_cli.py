"""The command line: every stage from a shell, folder in, folder out; `--help` teaches; errors are one line."""

import json
import shlex
import shutil
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest
import torch

from dynamoe_hf import cli
from dynamoe_hf.card import render_card


STAGES = ("convert", "adapt", "train", "calibrate", "evaluate", "generate", "inspect", "bench", "report", "publish", "export",
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


def test_options_are_the_functions_parameters():
    """The command line cannot drift from the functions: same names, same defaults."""
    parser = cli.make_parser()
    commands = next(action for action in parser._actions if hasattr(action, "choices") and action.choices).choices
    assert tuple(commands) == STAGES
    for name, command in commands.items():
        parameters = dict(signature(command.get_default("stage")).parameters)
        if "settings" in parameters:  # fields of a dataclass
            arguments, _ = parameters.pop("arguments"), parameters.pop("settings")
            parameters |= signature(arguments.annotation.__args__[0]).parameters
        options = {action.dest: action for action in command._actions if action.dest not in ("help", "json")}
        assert set(options) == set(parameters), name
        for option, action in options.items():
            if action.required:
                assert parameters[option].default is parameters[option].empty
            else:
                assert action.default == parameters[option].default, f"{name} {option}"


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


@pytest.mark.parametrize("wrong", ["0", "-3", "2.5", "many"])
@pytest.mark.parametrize(
    "option",
    ["bench F --threads", "bench F --rounds", "convert B F --router-dim", "train F G --batch-size", "evaluate F --max-tokens"],
)
def test_counts_are_whole_and_at_least_one(option, wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*option.split()[:-1], f"{option.split()[-1]}={wrong}"])
    assert stop.value.code == 2
    assert f"expected a whole number of at least 1, found '{wrong}'" in capsys.readouterr().err


def test_too_little_memory_on_a_gpu(monkeypatch, capsys):
    def stage(folder):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB")

    monkeypatch.setattr(cli, "inspect_folder", stage)
    assert cli.main(["inspect", "folder"]) == 1
    message = capsys.readouterr().err
    assert "does not suffice: CUDA out of memory" in message and "CUDA_VISIBLE_DEVICES= dynamoe" in message


def test_installed_command():
    result = subprocess.run([sys.executable, "-m", "dynamoe_hf.cli", "--version"], capture_output=True, text=True)
    assert result.stdout.startswith("dynamoe 0.")
