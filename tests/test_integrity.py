"""What a folder holds is what was written: its weights, its code, its records, its card."""

import json
import os
import random
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynamoe_hf import (
    calibrate_budgets,
    cli,
    convert_model,
    evaluate_model,
    export_dense,
    publish_model,
    report_folder,
    train_model,
)
from dynamoe_hf.card import render_card
from dynamoe_hf.folder import load_model, load_tokenizer, read_json, write_json
from dynamoe_hf.integrity import digest_of, digests_of


@pytest.fixture(scope="module")
def trained(dense_folder, tmp_path_factory):
    """A trained, calibrated and evaluated folder. Treat it as read-only."""
    root = tmp_path_factory.mktemp("integrity")
    convert_model(dense_folder, root / "converted", max_tokens=512, block_size=64)
    train_model(root / "converted", root / "trained", max_tokens=8192, block_size=64, router_learning_rate=1e-2)
    calibrate_budgets(root / "trained", budgets=[0.6], max_tokens=4096, block_size=64)
    evaluate_model(root / "trained", budget=[0.6], max_tokens=512, block_size=64)
    return root / "trained"


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of it to change."""
    return shutil.copytree(trained, tmp_path / "folder")


def flip(path, place, bit=0):
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(content)


def test_records_hold_the_digests_of_the_weights(trained):
    for folder, record in ((trained, "training.json"), (trained.with_name("converted"), "conversion.json")):
        assert read_json(folder / record)["weights"] == {"model.safetensors": digest_of(folder / "model.safetensors")}
    assert "weights" not in read_json(trained / "conversion.json"), "those of the converted folder"


def test_a_flipped_bit_is_noticed_by_every_stage(folder, tmp_path, capsys):
    """In the last byte, where no reader of the format would see it; a folder without digests loads as before."""
    flip(folder / "model.safetensors", -1)
    out = tmp_path / "out"
    stages = [
        ["evaluate", folder], ["generate", folder, "words"], ["bench", folder], ["report", folder], ["calibrate", folder],
        ["train", folder, out], ["adapt", folder, out], ["export", folder, out], ["inspect", folder, "--verify"],
        ["publish", folder, "user/name", "--dry-run", "--out", out],
    ]  # fmt: skip
    for stage in stages:
        assert cli.main([str(word) for word in stage]) == 1
        told = capsys.readouterr().err
        assert "not those that were written" in told and "model.safetensors" in told and "Copy the folder again" in told, stage
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    record = read_json(folder / "training.json")
    record.pop("weights")
    write_json(folder / "training.json", record)
    load_model(folder)


def test_inspect_verifies(folder, capsys):
    assert cli.main(["inspect", str(folder), "--verify"]) == 0
    assert "weight files: 1 as recorded (SHA-256)" in capsys.readouterr().out
    assert cli.main(["inspect", str(folder)]) == 0
    assert "verified" not in capsys.readouterr().out


def test_swapped_shards_are_noticed(folder):
    """And a file beside the shards, which transformers would load instead of them."""
    whole = (folder / "model.safetensors").read_bytes()
    model = load_model(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    write_json(folder / "training.json", {**read_json(folder / "training.json"), "weights": digests_of(folder)})
    load_model(folder)
    one, other, *_ = sorted(folder.glob("model-*.safetensors"))
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1]), other.write_bytes(contents[0])
    with pytest.raises(ValueError, match=f"not those that were written.*{one.name}, {other.name}"):
        load_model(folder)
    one.write_bytes(contents[0]), other.write_bytes(contents[1])
    (folder / "model.safetensors").write_bytes(whole)
    with pytest.raises(ValueError, match=r"or one too many, for model\.safetensors"):
        load_model(folder)


def edit_json(dice, path):
    """Another value, no value, or another character somewhere."""
    text = path.read_text()
    kind = dice.choice(("character", "cut", "value", "key"))
    if kind == "character":
        place = dice.randrange(len(text))
        text = text[:place] + dice.choice('{}[]",:0x') + text[place + 1 :]
    elif kind == "cut":
        text = text[: dice.randrange(len(text))]
    else:
        content = json.loads(text)
        name = dice.choice(sorted(content))
        content[name] = dice.choice((None, -1, "x", [], {}, 1e40))
        text = json.dumps({key: value for key, value in content.items() if kind == "value" or key != name})
    path.write_text(text)


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def rename(dice, path):
    rewrite(path, lambda tensors: tensors.update({"other": tensors.pop(dice.choice(sorted(tensors)))}))


def reshape(dice, path):
    def change(tensors):
        name = dice.choice([name for name in sorted(tensors) if tensors[name].ndim == 2])
        tensors[name] = tensors[name][:-1].clone()

    rewrite(path, change)


def swap(dice, path):
    def change(tensors):
        one, other = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in dice.sample(range(3), 2))
        tensors[one], tensors[other] = tensors[other], tensors[one]

    rewrite(path, change)


WEIGHTS = "model.safetensors"
JSON = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "training.json", "conversion.json",
        "calibration.json", "results.json")  # fmt: skip
MUTATIONS = {
    "bit of a weight": lambda dice, folder: flip(folder / WEIGHTS, -1 - dice.randrange(60_000), dice.randrange(8)),
    "bit of the header": lambda dice, folder: flip(folder / WEIGHTS, dice.randrange(3000), dice.randrange(8)),
    "cut off": lambda dice, folder: os.truncate(folder / WEIGHTS, dice.randrange((folder / WEIGHTS).stat().st_size)),
    "renamed tensor": lambda dice, folder: rename(dice, folder / WEIGHTS),
    "other shape": lambda dice, folder: reshape(dice, folder / WEIGHTS),
    "swapped tensors": lambda dice, folder: swap(dice, folder / WEIGHTS),
    "file of another model": lambda dice, folder: shutil.copy(folder.parent / "other.safetensors", folder / WEIGHTS),
    "no file": lambda dice, folder: (folder / WEIGHTS).unlink(),
    **{f"edited {name}": lambda dice, folder, name=name: edit_json(dice, folder / name) for name in JSON},
}


def try_out(folder, expected, log):
    """In a process of its own: what the command line says, and whether weights that it takes are those of `expected`. -> exit code."""
    with open(log, "w", buffering=1) as sys.stderr:
        signal.alarm(60)
        if code := cli.main(["generate", str(folder), "words", "--max-new-tokens", "2"]):
            return code
        found = load_model(folder).state_dict()
        same = len(found) == len(expected) and all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    return 0 if same else 2


@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_mutated_folders(count, trained, tmp_path, capsys):
    """Refused in one line, or harmless: no crash, no hang, no wrong weights without a word."""
    shutil.copy(trained.with_name("converted") / WEIGHTS, tmp_path / "other.safetensors")
    expected, dice, table, log = load_model(trained).state_dict(), random.Random(count), Counter(), tmp_path / "log"
    for index in range(count):
        kind = list(MUTATIONS)[index % len(MUTATIONS)]
        folder = shutil.copytree(trained, tmp_path / "folder")
        MUTATIONS[kind](dice, folder)
        child = os.fork()
        if child == 0:
            code = 70
            try:
                code = try_out(folder, expected, log)
            finally:
                os._exit(code)
        code, told = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), log.read_text()
        assert code in (0, 1), f"{kind}: exit code {code}\n{told}\n{(folder / 'config.json').read_text()}"
        lines = [line for line in told.splitlines() if line.startswith("dynamoe: ")]
        assert "Traceback" not in told and len(lines) == code, f"{kind}: {told}"
        assert code == 1 or "edited" in kind, f"{kind} was not noticed"
        table[kind, "refused" if code else "harmless"] += 1
        shutil.rmtree(folder)
    with capsys.disabled():
        for (kind, outcome), number in sorted(table.items()):
            sys.stdout.write(f"\n  {kind:28} {outcome:9} {number}")


RECORDS = {
    "results.json": ({"evaluations": 3}, {"evaluations": [{"perplexity": "x"}]}),
    "calibration.json": ({"budgets": [1]},),
    "conversion.json": ({"calibration": 7},),
    "training.json": ({"phases": 7},),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_that_tell_nothing_are_noticed_before_the_work(name, folder, tmp_path, capsys, monkeypatch):
    """A training would end with a card that cannot be written."""
    worked = []
    for module in ("evaluate", "train", "benchmark", "report"):
        monkeypatch.setattr(f"dynamoe_hf.{module}.load_tokenizer", worked.append, raising=False)
    monkeypatch.setattr("dynamoe_hf.run.load_tokenizer", worked.append)
    stages = [["train", folder, tmp_path / "out"], ["evaluate", folder], ["bench", folder], ["report", folder]]
    for record in RECORDS[name]:
        write_json(folder / name, record)
        for stage in stages:
            assert cli.main([str(word) for word in stage]) == 1
            assert f"The records of {folder} are damaged" in capsys.readouterr().err, stage
    assert not worked
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.complex64])
def test_weights_that_are_no_floating_point_numbers_are_refused(dtype, folder, dense_folder, tmp_path):
    """transformers casts them: to ones and zeros, or steps of a quantiser whose scales are gone. Old bases hold masks, which nobody reads."""
    for source, stage in ((folder, load_model), (dense_folder, lambda base: convert_model(base, tmp_path / "out"))):
        copy = shutil.copytree(source, tmp_path / "copy")
        rewrite(copy / WEIGHTS, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].to(dtype)}))
        for name in ("training.json", "conversion.json"):
            if record := read_json(copy / name):
                write_json(copy / name, {key: value for key, value in record.items() if key != "weights"})
        with pytest.raises(ValueError, match=r"no floating-point numbers: found model\.norm\.weight in"):
            stage(copy)
        shutil.rmtree(copy)
    write_json(folder / "training.json", {**read_json(folder / "training.json"), "weights": ["model.safetensors"]})
    with pytest.raises(ValueError, match="records of .* are damaged: found .'model.safetensors'. in `weights`"):
        load_model(folder)


def test_a_pickle_in_place_of_weights_is_not_run(folder, tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (folder / WEIGHTS).unlink()
    write_json(
        folder / "training.json", {key: v for key, v in read_json(folder / "training.json").items() if key != "weights"}
    )
    torch.save({"model.norm.weight": Code()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="A weight file of .* is damaged"):
        load_model(folder)
    assert not (tmp_path / "ran").exists()


def test_code_of_a_base_does_not_come_along(dense_folder, tmp_path, capsys):
    """Users of the folder trust its code: a tokenizer's or a config's that is elsewhere must not be named in it."""
    base = shutil.copytree(dense_folder, tmp_path / "base")
    pipelines = {"custom_pipelines": {"text-generation": {"impl": "else/where--p.P", "pt": ["AutoModelForCausalLM"]}}}
    for name, fields in (
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "else/where--tok.Tok"]}}),
        ("config.json", {"auto_map": {"AutoConfig": "else/where--c.C"}, **pipelines}),
    ):
        write_json(base / name, {**read_json(base / name), **fields})
    convert_model(base, tmp_path / "converted", max_tokens=512, block_size=64)
    train_model(tmp_path / "converted", tmp_path / "trained", max_tokens=256, block_size=64)
    export_dense(tmp_path / "trained", tmp_path / "dense")
    for folder in ("converted", "trained", "dense"):
        for path in (tmp_path / folder).glob("*.json"):
            assert "else/where" not in path.read_text(), path
    config = tmp_path / "trained" / "config.json"
    fields = read_json(config)
    write_json(config, {**fields, **pipelines})
    with pytest.raises(ValueError, match="names code that does not come with the folder.*else/where--p.P"):
        publish_model(tmp_path / "trained", "user/name", dry_run=True)
    write_json(config, fields)
    config = tmp_path / "trained" / "tokenizer_config.json"
    write_json(config, {**read_json(config), "auto_map": {"AutoTokenizer": [None, "else/where--tok.Tok"]}})
    with pytest.raises(ValueError, match="names code that does not come with the folder.*else/where--tok.Tok"):
        publish_model(tmp_path / "trained", "user/name", dry_run=True)
    assert "auto_map" not in load_tokenizer(tmp_path / "trained").init_kwargs


def test_the_card_says_whether_the_code_is_the_packages(folder):
    assert "Each equals, byte for byte, that of dynamoe_hf" in render_card(folder, local_files_only=True).text
    with open(folder / "routing.py", "a") as file:
        file.write("\nimport socket\n")
    (folder / "extra.py").write_text("")
    card = render_card(folder, local_files_only=True).text
    assert "**extra.py, routing.py: not as in dynamoe_hf" in card and "imports only" not in card


def test_names_in_a_card_are_no_markup(folder):
    name = "a<img src=x onerror=alert(1)>|`b`[c](d)*.txt"
    record = read_json(folder / "training.json")
    write_json(folder / "training.json", {**record, "text": [name, "two\n```\nlines.txt"]})
    card = render_card(folder, local_files_only=True).text
    body, commands = card.split("---", 2)[2].split("```bash")[0], card.split("```bash")[1].split("\n```")[0]
    assert "<img" not in body and r"a&lt;img src=x onerror=alert(1)&gt;\|\`b\`\[c\](d)\*.txt" in body
    assert "two ``` lines.txt" in commands and name in commands


def test_a_report_names_no_folder_of_the_machine(folder, tmp_path):
    pytest.importorskip("matplotlib")
    results = read_json(folder / "results.json")
    results["evaluations"][0]["text"] = [r"$\bad$ <b>.txt"]
    write_json(folder / "results.json", results)
    pages = [path for path in report_folder(folder) if path.suffix == ".html"]
    assert "<b>" not in (folder / "report" / "index.html").read_text()
    assert pages and all(str(tmp_path) not in page.read_text() for page in pages)


def test_each_stage_writes_the_card_again(trained, folder, tmp_path):
    """The card of a folder says what its records say; one that somebody has edited stays."""
    assert "Calibration of the budgets: 4,096 tokens" in (folder / "README.md").read_text()
    evaluate_model(folder, budget=[0.6], sensitivity=None, max_tokens=1024, block_size=64, text=None)
    card = (folder / "README.md").read_text()
    assert (
        card == str(render_card(folder, local_files_only=True, name="trained")) and "Perplexity on: pydoc_data.topics" in card
    )
    (folder / "README.md").write_text(card + "\nMy own words.\n")
    evaluate_model(folder, sensitivity=[0.9], max_tokens=1024, block_size=64)
    assert (folder / "README.md").read_text() == card + "\nMy own words.\n"


def test_a_calibration_is_whole_or_not_there(folder, monkeypatch):
    """Killed between its two files, it counts as none; failing before them, it changes nothing."""
    before = {path.name: path.read_bytes() for path in folder.glob("*.json")}
    original = os.replace

    def replace(source, target):
        if Path(target) == folder / "config.json":
            os._exit(9)
        original(source, target)

    child = os.fork()
    if child == 0:
        os.replace = replace
        try:
            calibrate_budgets(folder, budgets=[0.7], max_tokens=4096, block_size=64)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert "Calibration of the budgets: none" in render_card(folder, local_files_only=True).text
    assert [path.name for path in folder.glob(".*.partial")] == [f".{child}.partial"]
    calibrate_budgets(folder, budgets=[0.6], max_tokens=4096, block_size=64)
    assert {name: (folder / name).read_bytes() for name in before} == before and not list(folder.glob(".*"))


def test_a_dry_run_writes_where_it_is_told(folder, tmp_path, capsys):
    words = ["publish", str(folder), "user/name", "--dry-run"]
    assert cli.main(words) == 0 and "is written with `--out FOLDER`" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert cli.main([*words, "--out", str(tmp_path / "look")]) == 0
    assert (tmp_path / "look" / "name" / "README.md").is_file()


@pytest.mark.parametrize(
    ("found", "message"), [("hf_" + "a" * 34, "holds a Hub token"), ("{home}/x", "names a folder of this machine")]
)
def test_no_token_and_no_folder_of_the_machine_is_published(found, message, folder):
    record = read_json(folder / "conversion.json")
    write_json(folder / "conversion.json", {**record, "base": found.format(home=Path.home())})
    with pytest.raises(ValueError, match=message):
        publish_model(folder, "user/name", dry_run=True)
