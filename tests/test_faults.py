"""Runs that are killed, told to stop, or meet a full disk, a bad path or a diverging loss: nothing that was done is lost, or wrong."""

import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import tiny_dense
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM

from dynamoe_hf import (
    DynaMoETrainer,
    adapt_model,
    calibrate_budgets,
    cli,
    convert_model,
    evaluate_model,
    export_dense,
    train_model,
)
from dynamoe_hf.benchmark import bench_folder
from dynamoe_hf.folder import load_model, new_folder, read_json, write_json
from dynamoe_hf.generate import generate_text
from dynamoe_hf.publish import publish_model
from dynamoe_hf.report import report_folder
from dynamoe_hf.router_fit import fit_routers


SAVE_STEPS = 2
STAGES = {"train": train_model, "adapt": adapt_model}


@pytest.fixture(scope="module")
def converted(dense_folder, tmp_path_factory):
    """A converted tiny Llama. Treat it as read-only."""
    out = tmp_path_factory.mktemp("converted") / "model"
    convert_model(dense_folder, out, max_tokens=512, block_size=64)
    return out


@pytest.fixture(scope="module")
def trained(converted):
    """A trained and calibrated folder. Treat it as read-only."""
    out = converted.with_name("trained")
    train_model(converted, out, max_tokens=8192, block_size=64, router_learning_rate=1e-2)
    calibrate_budgets(out, budgets=[0.6], max_tokens=4096, block_size=64)
    return out


@pytest.fixture
def settings(text_file, monkeypatch):
    """Of runs of six steps, whose fits are short."""
    monkeypatch.setattr("dynamoe_hf.train.fit_routers", partial(fit_routers, steps=20))
    return {"text": str(text_file), "max_tokens": 6 * 64, "block_size": 16, "batch_size": 4, "save_steps": SAVE_STEPS}


def in_child(action, seconds=None, number=signal.SIGKILL) -> int:
    """Run `action` in a process of its own, which gets a signal after some `seconds`, and return its wait status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            action()
            status = 0
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, number)
    return os.waitpid(child, 0)[1]


def log_steps(patch, log):
    """Write a line to a file for each step that is made."""
    original = DynaMoETrainer.training_step

    def step(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        with open(log, "a") as file:
            file.write("step\n")
        return loss

    patch.setattr(DynaMoETrainer, "training_step", step)


def die_at(place: int):
    """End this process at its n-th operation that gives a file its place, deletes files or waits for the disk; count them at -1."""
    calls = [0]

    def watched(original):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == place:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for module, name in ((os, "replace"), (os, "fsync"), (os, "unlink"), (shutil, "rmtree"), (torch, "save")):
        setattr(module, name, watched(getattr(module, name)))
    return calls


def same_weights(one, other):
    ours, theirs = (load_model(folder).state_dict() for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def finish(stage, converted, out, settings, whole, log):
    """Go on with a run that was killed, if it had not written its model, and compare it with an undisturbed one."""
    expected = read_json(whole / "training.json")
    if not out.exists():
        kept = (out.with_name(f"{out.name}.checkpoints") / "run.json").is_file()
        record = STAGES[stage](converted, out, resume=kept, **settings)
        assert {**record, "seconds": 0} == {**expected, "seconds": 0}
        assert not list(out.parent.glob(".*")), "leftovers"
    assert same_weights(out, whole)
    assert len(log.read_text().splitlines()) <= expected["steps"] + SAVE_STEPS, (
        "more work was lost than between two checkpoints"
    )
    shutil.rmtree(out.parent)
    log.unlink()


@pytest.fixture
def undisturbed(converted, settings, tmp_path):
    def run(stage):
        STAGES[stage](converted, tmp_path / "whole", **settings)
        return tmp_path / "whole"

    return run


def operations(stage, converted, settings, tmp_path):
    """How many operations on files a run has."""

    def count():
        calls = die_at(-1)
        STAGES[stage](converted, tmp_path / "counted", **settings)
        (tmp_path / "count").write_text(str(calls[0]))

    assert in_child(count) == 0
    return int((tmp_path / "count").read_text())


@pytest.mark.parametrize(
    ("stage", "kills"), [("train", 4), ("adapt", 4), *(pytest.param(stage, 20, marks=pytest.mark.slow) for stage in STAGES)]
)
def test_killed_while_files_are_written(stage, kills, converted, settings, undisturbed, tmp_path, monkeypatch):
    """At moments all over a run at which a file gets its place: the run goes on from what is whole, and ends as undisturbed."""
    whole, log, out = undisturbed(stage), tmp_path / "log", tmp_path / "runs" / "out"
    count = operations(stage, converted, settings, tmp_path)
    log_steps(monkeypatch, log)
    for index in range(kills):
        place = 1 + round((index + 0.5) * count / kills)

        def killed(place=place):
            die_at(place)
            STAGES[stage](converted, out, **settings)

        log.write_text("")
        assert os.WTERMSIG(in_child(killed)) == signal.SIGKILL, place
        finish(stage, converted, out, settings, whole, log)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random_moments(stage, converted, settings, undisturbed, tmp_path, monkeypatch):
    """Twenty times, saves included: each run is resumed and ends as an undisturbed one."""
    whole, log, out, dice = undisturbed(stage), tmp_path / "log", tmp_path / "runs" / "out", random.Random(0)
    started = time.monotonic()
    in_child(partial(STAGES[stage], converted, tmp_path / "timed", **settings))
    seconds, killed = time.monotonic() - started, 0
    log_steps(monkeypatch, log)
    for _ in range(20):
        log.write_text("")
        out.parent.mkdir()
        killed += in_child(partial(STAGES[stage], converted, out, **settings), dice.uniform(0, seconds)) != 0
        finish(stage, converted, out, settings, whole, log)
    assert killed > 10


def stopped_at(patch, step, action):
    """Do something behind a step of a run."""
    original, steps = DynaMoETrainer.training_step, []

    def training_step(self, *args, **kwargs):
        steps.append(None)
        loss = original(self, *args, **kwargs)
        if len(steps) == step:
            action()
        return loss

    patch.setattr(DynaMoETrainer, "training_step", training_step)


def words_of(stage, source, out, settings):
    """The words of a command line for a stage of some steps."""
    size = ["--max-tokens", "384", "--block-size", "16", "--batch-size", "4"]
    return [stage, str(source), str(out), "--text", settings["text"], *size]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop(number, converted, settings, undisturbed, tmp_path, monkeypatch, capsys):
    """The run ends behind the step, which is kept, with one line that says how to go on."""
    whole, out = undisturbed("adapt"), tmp_path / "runs" / "out"
    words = words_of("adapt", converted, out, settings)
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        stopped_at(patch, 3, lambda: os.kill(os.getpid(), number))
        assert cli.main(words) == 130
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("dynamoe: Interrupted.") and "up to step 3" in told and "`--resume`" in told
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in out.parent.iterdir()] == ["out.checkpoints"]
    assert cli.main([*words, "--resume"]) == 0
    assert same_weights(out, whole)


def test_stopped_where_no_step_is_made(converted, settings, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr("dynamoe_hf.train.fit_thresholds", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    assert (
        cli.main(["train", str(converted), str(out), "--text", settings["text"], "--max-tokens", "384", "--block-size", "16"])
        == 130
    )
    assert "up to step 0" in capsys.readouterr().err
    monkeypatch.setattr("dynamoe_hf.convert.load_dense", lambda *args: os.kill(os.getpid(), signal.SIGINT))
    assert cli.main(["convert", str(converted), str(tmp_path / "c")]) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out.checkpoints"]


def interrupted(converted, out, settings, patch, step=5):
    """An adaptation that was killed behind a step, with the checkpoints of steps 2 and 4."""

    def run():
        with pytest.MonkeyPatch.context() as inner:
            stopped_at(inner, step, lambda: os.kill(os.getpid(), signal.SIGKILL))
            adapt_model(converted, out, **settings)

    assert os.WTERMSIG(in_child(run)) == signal.SIGKILL


@pytest.mark.parametrize("damage", ["model.safetensors", "optimizer.pt", "trainer_state.json", "digests.json", "all"])
def test_a_damaged_checkpoint_is_left_out(damage, converted, settings, undisturbed, tmp_path, monkeypatch, caplog):
    whole, out = undisturbed("adapt"), tmp_path / "out"
    interrupted(converted, out, settings, monkeypatch)
    folder = tmp_path / "out.checkpoints" / "0-adapt"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    for step in (2, 4) if damage == "all" else (4,):
        file = folder / f"checkpoint-{step}" / ("model.safetensors" if damage == "all" else damage)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with caplog.at_level(logging.WARNING, "dynamoe_hf.run"):
        adapt_model(converted, out, resume=True, **settings)
    assert "checkpoint-4 is damaged and left out" in caplog.text
    assert ("beginning of the phase" if damage == "all" else "checkpoint-2.") in caplog.text
    assert same_weights(out, whole)


def test_a_full_disk(converted, settings, undisturbed, tmp_path, monkeypatch, capfd):
    """From the fourth step on no file can be larger than some kilobytes: the second checkpoint fails, and the first one stays."""
    whole, out = undisturbed("adapt"), tmp_path / "out"

    def fill():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    def run():
        with pytest.MonkeyPatch.context() as patch:
            stopped_at(patch, 4, fill)
            os._exit(40 + cli.main([*words_of("adapt", converted, out, settings), "--save-steps", "2"]))

    assert os.waitstatus_to_exitcode(in_child(run)) == 41
    told = capfd.readouterr().err
    assert "checkpoint-4 cannot be written" in told and "Make room on the disk" in told and "Traceback" not in told
    assert [path.name for path in (tmp_path / "out.checkpoints" / "0-adapt").iterdir()] == ["checkpoint-2"]
    assert not out.exists() and not list(tmp_path.glob(".*"))
    adapt_model(converted, out, resume=True, **settings)
    assert same_weights(out, whole)


def bad_paths(root: Path):
    """What OUT can be, and what is said of it."""
    (root / "file").write_text("")
    (root / "there").mkdir()
    (root / "dangling").symlink_to(root / "nowhere")
    return {
        f"{root}/there/": "exists already",
        f"{root}/dangling": "exists already",
        f"{root}/file/out": "cannot be written",
        f"{root}/{'o' * 250}": "cannot be written",
        f"{root}/there/..": "exists already",
        f"{root}/held/": "Another run is writing",
    }


def test_out_is_tried_before_the_work(converted, dense_folder, settings, tmp_path, monkeypatch):
    """In every stage that writes a folder, before it loads a model; the lock of another run holds too."""

    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded before OUT was tried")

    for place in ("convert.load_dense", "convert.load_model", "run.load_model", "publish.load_model"):
        monkeypatch.setattr(f"dynamoe_hf.{place}", loaded)
    stages = [convert_model, export_dense, partial(adapt_model, **settings), partial(train_model, **settings)]
    stages.append(lambda folder, out: publish_model(converted, "user/name", dry_run=True, out=out))
    paths = bad_paths(tmp_path)
    before = sorted(tmp_path.iterdir())
    for stage in stages:
        for out, message in paths.items():
            with FileLock(tmp_path / ".held.lock"), pytest.raises(OSError, match=message):
                stage(converted, out)
    assert sorted(path for path in tmp_path.iterdir() if path.name != ".held.lock") == before


def test_a_model_folder_is_tried_before_the_work(trained, text_file, tmp_path, monkeypatch):
    """In every stage that adds records to it, while another run holds it."""

    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded before the folder was tried")

    for place in ("calibrate", "evaluate", "benchmark", "report"):
        monkeypatch.setattr(f"dynamoe_hf.{place}.load_model", loaded)
    folder = shutil.copytree(trained, tmp_path / "folder")
    write_json(folder / "results.json", {"evaluations": [{"text": "topics", "setting": "full width"}]})
    stages = [calibrate_budgets, partial(evaluate_model, text=text_file), bench_folder, report_folder]
    for stage in stages:
        with FileLock(folder / ".lock"), pytest.raises(BlockingIOError, match="Another run is writing"):
            stage(folder)
    with pytest.raises(ValueError, match="writes into a model folder on this machine: found user/name"):
        calibrate_budgets("user/name")


def test_a_trailing_slash_is_no_other_folder(converted, settings, tmp_path):
    adapt_model(converted, f"{tmp_path}/out/", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_dead_processes_alone_are_removed(tmp_path):
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    for name in (f".out.{dead}.partial", f".out.{os.getppid()}.partial", f".other.{dead}.partial"):
        (tmp_path / name).mkdir()
    with new_folder(tmp_path / "out"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"out", f".out.{os.getppid()}.partial", f".other.{dead}.partial"}


@pytest.mark.parametrize("stage", STAGES)
def test_divergence_stops_a_run(stage, converted, settings, tmp_path, capsys):
    """Nothing is written of it, and what was kept before is whole."""
    with pytest.raises(FloatingPointError, match=r"Training diverged: found .* step \d+"):
        STAGES[stage](converted, tmp_path / "out", **{**settings, "learning_rate": 1e35})
    assert not (tmp_path / "out").exists()
    for checkpoint in (tmp_path / "out.checkpoints").glob("*/checkpoint-*"):
        load_model(checkpoint)
        assert "NaN" not in (checkpoint / "trainer_state.json").read_text()


def test_a_gradient_that_is_not_finite_stops_a_run(converted, settings, tmp_path, monkeypatch):
    """With a finite loss, in the second batch of a step."""
    original, calls = DynaMoETrainer.compute_loss, []

    def compute_loss(self, model, *args, **kwargs):
        calls.append(None)
        loss = original(self, model, *args, **kwargs)
        if len(calls) == 4:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(DynaMoETrainer, "compute_loss", compute_loss)
    with pytest.raises(FloatingPointError, match="found a gradient of (nan|inf) in step 2, batch 2 of 2"):
        adapt_model(converted, tmp_path / "out", **{**settings, "gradient_accumulation_steps": 2, "batch_size": 2})


def with_nan(folder, out):
    """A copy of a folder with one number that is none, and no digests."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    record = read_json(out / "conversion.json")
    record.pop("weights")
    write_json(out / "conversion.json", record)
    return out


def test_no_stage_takes_weights_that_are_not_finite(converted, settings, text_file, tmp_path):
    folder = with_nan(converted, tmp_path / "nan")
    stages = [
        lambda: evaluate_model(folder, text=text_file, block_size=64),
        lambda: generate_text(folder, "words"),
        lambda: export_dense(folder, tmp_path / "dense"),
        lambda: publish_model(folder, "user/name", dry_run=True, out=tmp_path / "published"),
        lambda: calibrate_budgets(folder, text=text_file, block_size=64),
        lambda: train_model(folder, tmp_path / "trained", **settings),
    ]
    for stage in stages:
        with pytest.raises(ValueError, match=r"NaN or infinite numbers in `model.layers.1.mlp.up_proj.weight`"):
            stage()


def test_json_holds_no_nan(tmp_path):
    write_json(tmp_path / "record.json", {"loss": float("nan"), "bounds": [1.0, float("inf")]})
    assert json.loads((tmp_path / "record.json").read_text(), parse_constant=pytest.fail) == {
        "loss": None,
        "bounds": [1.0, None],
    }


OTHERS = {"learning_rate": 1e-3, "seed": 1, "batch_size": 2, "block_size": 8, "max_tokens": 128, "bf16": True}


def test_a_run_is_resumed_as_what_it_began(converted, settings, tmp_path, monkeypatch):
    """Another setting, text or model is refused by name, with what it was; the run goes on with the old ones afterwards."""
    text = tmp_path / "text.txt"
    shutil.copy(settings["text"], text)
    settings["text"] = str(text)
    interrupted(converted, tmp_path / "out", settings, monkeypatch)
    resume = partial(adapt_model, out=tmp_path / "out", resume=True)
    for name, value in OTHERS.items():
        with pytest.raises(ValueError, match=rf"found another {name} \(.* before, {value} now\)"):
            resume(converted, **{**settings, name: value})
    content = text.read_text()
    text.write_text(content + " more")
    with pytest.raises(ValueError, match="found another text"):
        resume(converted, **settings)
    text.write_text(content)
    other = tmp_path / "other"
    shutil.copytree(converted, other)
    with pytest.raises(ValueError, match="found another from"):
        resume(other, **settings)
    assert resume(converted, **settings)["settings"]["learning_rate"] == 6e-5


def broken_bases(dense_folder):
    """What a base can be, by what is said of it."""

    def config(folder, **fields):
        write_json(folder / "config.json", {**read_json(folder / "config.json"), **fields})

    def cut(name):
        return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)

    def mpt(folder):
        sizes = {"vocab_size": 128, "d_model": 32, "n_layers": 2, "n_heads": 4}
        AutoModelForCausalLM.from_config(AutoConfig.for_model("mpt", **sizes)).save_pretrained(folder)

    def few_words(folder):
        tiny_dense(vocab_size=64).save_pretrained(folder)

    return {
        "is quantised, and a dense base must have plain weights: found gptq": partial(
            config, quantization_config={"quant_method": "gptq"}
        ),
        "has model type `foreign`": partial(config, model_type="foreign"),
        "is not a valid JSON": cut("config.json"),
        "has no tokenizer that can be loaded": cut("tokenizer.json"),
        "found token id 12. and a vocabulary of 64": few_words,
        "MptForCausalLM cannot be converted: its MLPs are not at": mpt,
    }


def test_errors_of_other_types_are_one_line(dense_folder, tmp_path, capfd):
    for message, change in broken_bases(dense_folder).items():
        base = shutil.copytree(dense_folder, tmp_path / "base")
        change(base)
        capfd.readouterr()
        assert cli.main(["convert", str(base), str(tmp_path / "out"), "--max-tokens", "512", "--block-size", "64"]) == 1
        told = capfd.readouterr().err
        lines = [line for line in told.splitlines() if line.startswith("dynamoe: ")]
        assert len(lines) == 1 and re.search(message, lines[0]) and "Traceback" not in told, told
        assert [path.name for path in tmp_path.iterdir()] == ["base"]
        shutil.rmtree(base)


def test_a_traceback_is_shown_where_it_is_asked_for(monkeypatch, capsys):
    def stage(*args):
        raise KeyError("weights\nand more")

    monkeypatch.setattr("dynamoe_hf.folder.inspect_folder", stage)
    assert cli.main(["inspect", "folder"]) == 1
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and "found KeyError" in told and "--debug" in told
    with pytest.raises(KeyError):
        cli.main(["inspect", "folder", "--debug"])


def test_a_text_about_which_a_model_says_nothing(converted, text_file, tmp_path):
    """Weights that are finite, and logits whose loss is no perplexity: no NaN in the results, and none written."""
    model = load_model(converted)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e30)
    folder = tmp_path / "loud"
    shutil.copytree(converted, folder)
    model.save_pretrained(folder)
    record = read_json(folder / "conversion.json")
    write_json(folder / "conversion.json", {**record, "weights": {}})
    with pytest.raises(ValueError, match="says nothing about this text: found a loss of"):
        evaluate_model(folder, text=text_file, block_size=64, max_tokens=512)
    assert not (folder / "results.json").exists()


@pytest.mark.parametrize("fails", [True, False])
def test_data_that_fails_or_ends_midway(fails, converted, settings, undisturbed, tmp_path, monkeypatch):
    """Of a stream. What was trained before it failed is kept, and one that is shorter is read again."""
    words = [f"Document {number}, with some words in it." for number in range(40)]
    good = [True]

    def documents(*args):
        for number, document in enumerate(words):
            if number == 8 and not good[0]:
                raise OSError("the connection broke")
            yield document

    monkeypatch.setattr("dynamoe_hf.run.documents_for", documents)
    settings = {**settings, "text": None, "dataset": "stream"}
    if not fails:
        del words[8:]
        record = adapt_model(converted, tmp_path / "out", **settings)
        assert record["steps"] == 6 and record["tokens"] == 384, "a shorter stream is repeated"
        return
    adapt_model(converted, tmp_path / "whole", **settings)
    good[0] = False
    with pytest.raises(OSError, match="the connection broke"):
        adapt_model(converted, tmp_path / "out", **settings)
    assert (tmp_path / "out.checkpoints" / "0-adapt" / "checkpoint-2").is_dir()
    good[0] = True
    adapt_model(converted, tmp_path / "out", resume=True, **settings)
    assert same_weights(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("stage", ["convert", "calibrate", "publish"])
def test_other_stages_killed_at_random_moments(stage, converted, dense_folder, trained, tmp_path):
    """What they write is there whole or not at all, and the next run needs no help and leaves nothing behind."""
    folder, out, dice = tmp_path / "runs" / "folder", tmp_path / "runs" / "out", random.Random(0)
    shutil.copytree(trained, folder)
    config = (folder / "config.json").read_bytes()
    stages = {
        "convert": lambda: convert_model(dense_folder, out, max_tokens=512, block_size=64),
        "calibrate": lambda: calibrate_budgets(folder, budgets=[0.7], lowest_density=1, max_tokens=2048, block_size=64),
        "publish": lambda: publish_model(folder, "user/name", dry_run=True, out=out),
    }
    started = time.monotonic()
    assert in_child(stages[stage]) == 0
    seconds = time.monotonic() - started
    for _ in range(3):
        shutil.rmtree(out, ignore_errors=True)
        (folder / "config.json").write_bytes(config)
        in_child(stages[stage], dice.uniform(0, seconds))
        if out.exists():
            assert (out / "conversion.json").is_file() if stage == "convert" else (out / "name-0.6" / "README.md").is_file()
            shutil.rmtree(out)
        load_model(folder)
        stages[stage]()
        assert not list((tmp_path / "runs").rglob(".*"))
