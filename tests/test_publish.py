"""The Hub: what is published loads elsewhere, is told truthfully, and is whole at every moment, whatever the server does."""

import hashlib
import itertools
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import tiny_dense, tiny_tokenizer
from hub_server import TOKEN, Fault, File, HubServer, Repo
from huggingface_hub import ModelCard
from reference import assert_close
from safetensors.torch import save_file

from dynamoe_hf import calibrate_budgets, convert_model, evaluate_model, train_model
from dynamoe_hf.card import Variant, render_card
from dynamoe_hf.folder import load_model
from dynamoe_hf.integrity import digests_of
from dynamoe_hf.publish import LONGEST_WAIT, TRIES, publish_model


BUDGETS = (0.5, 0.6, 0.75)
REPO = "user/tiny-DynaMoE"
ROOT = Path(__file__).parent.parent

# What somebody does who never had the package, and then the code of the card. Every place is loaded by a process of its own,
# forked from one that has imported libraries but loaded nothing, and finds an empty cache.
ELSEWHERE = """
import json, os, shutil, sys, traceback
sys.modules["dynamoe_hf"] = None
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.models.llama import modeling_llama

def load(repo, revision, text, code, out):
    where = {"revision": revision, "trust_remote_code": True}
    tokenizer = AutoTokenizer.from_pretrained(repo, **where)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(repo, **where)
    assert type(model).__module__.startswith("transformers_modules.")
    results = {"ids": ids, "sensitivity": model.config.sensitivity, "logits": model(ids).logits}
    results["call"] = model(ids, sensitivity=0.1).logits
    results["load"] = AutoModelForCausalLM.from_pretrained(repo, sensitivity=0.1, **where)(ids).logits
    results["pipeline"] = pipeline("text-generation", model=repo, max_new_tokens=4, **where)(text)[0]["generated_text"]
    torch.save(results, out)
    exec(code, {})

for place in json.loads(sys.argv[1]):
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
    child = os.fork()
    if child == 0:
        try:
            load(*place)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, place
"""

PUBLISH = """
import json, sys, torch
torch.set_num_threads(1)
from dynamoe_hf.publish import publish_model
publish_model(*sys.argv[1:3], variants=[0.5], layout=sys.argv[3])
"""

PUSH = """
import sys, torch
torch.set_num_threads(1)
from dynamoe_hf.folder import load_model, load_tokenizer
load_model(sys.argv[1]).push_to_hub(sys.argv[2])
load_tokenizer(sys.argv[1]).push_to_hub(sys.argv[2])
"""


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A dense base whose weights weigh more than what a variant may cost."""
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    tiny_dense(hidden_size=64, intermediate_size=1024, num_hidden_layers=3).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def record_weights(folder):
    """As a stage does that has written them."""
    record = json.loads((folder / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps({**record, "weights": digests_of(folder)}))


@pytest.fixture(scope="module")
def trained(base_folder, tmp_path_factory):
    """A folder that went all the way through the real stages, its weights in several shards. Treat it as read-only."""
    root = tmp_path_factory.mktemp("publish")
    small = {"block_size": 64, "max_tokens": 2048}
    convert_model(base_folder, root / "converted", **small)
    train_model(root / "converted", root / "trained", router_tokens=2048, **small)
    calibrate_budgets(root / "trained", budgets=BUDGETS, block_size=64, max_tokens=4096)
    evaluate_model(root / "trained", budget=(0.5, 0.75), base=base_folder, baselines=("static",), **small)
    (root / "trained" / "model.safetensors").unlink()
    load_model(root / "converted").save_pretrained(root / "shards", max_shard_size="1MB")
    for path in (root / "shards").glob("*.safetensors*"):
        shutil.copy(path, root / "trained")
    record_weights(root / "trained")
    (root / "trained" / "report").mkdir()
    (root / "trained" / "report" / "frontier.png").write_bytes(b"\x89PNG of a frontier")
    (root / "trained" / "optimizer.pt").write_bytes(b"not for the Hub")
    (root / "trained" / "notes.txt").write_text("not for the Hub either")
    return root / "trained"


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of it to change."""
    return shutil.copytree(trained, tmp_path / "folder")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server that the client in this process talks to."""
    with HubServer() as server:
        constants = {"ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
                     "HF_HUB_CACHE": str(tmp_path / "cache")}  # fmt: skip
        for name, value in constants.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def waits(monkeypatch):
    """Seconds that were waited, without waiting them."""
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def start(script, *arguments, hub, home):
    """A fresh process with an empty cache that knows this server only."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
                   "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, cwd=home.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process):
    output, _ = process.communicate()
    assert process.returncode == 0, output[-3000:]
    assert TOKEN not in output
    return output


def code_of(card):
    return "".join(re.findall(r"```python\n(.*?)```", card.decode(), flags=re.S))


def assert_whole(hub):
    """Whatever has a config has its weights, its code and a card."""
    for name, repo in hub.repos.items():
        for branch in repo.branches:
            files = hub.files(name, branch)
            if "config.json" in files:
                index = json.loads(files["model.safetensors.index.json"])
                assert set(index["weight_map"].values()) <= set(files), f"{name}@{branch} lacks weights"
                assert {"README.md", "modeling_dynamoe.py", "tokenizer.json"} <= set(files)


@pytest.fixture(scope="module")
def dry_runs(trained, tmp_path_factory):
    """{layout: folder} of what a dry run writes for one variant."""
    folders = {layout: tmp_path_factory.mktemp("dry") / "out" for layout in ("repos", "revisions")}
    for layout, out in folders.items():
        publish_model(trained, REPO, variants=[0.5], layout=layout, dry_run=True, out=out)
    return folders


def assert_complete(hub, dry_run):
    """Every revision holds, byte for byte, what a dry run writes, and no large file came twice."""
    places = {"tiny-DynaMoE": (REPO, "main"), "tiny-DynaMoE-0.5": (f"{REPO}-0.5", "main"),
              "main": (REPO, "main"), "budget-0.5": (REPO, "budget-0.5")}  # fmt: skip
    for variant in dry_run.iterdir():
        expected = {path.relative_to(variant).as_posix(): path for path in variant.rglob("*") if path.is_file()}
        files = hub.files(*places[variant.name])
        assert set(files) == set(expected)
        for name, content in files.items():
            assert content == expected[name].read_bytes(), f"{variant.name}/{name}"
    sent = Counter(hub.uploads)
    assert max(sent.values()) == 1, f"a shard that had arrived was sent again: {sent}"


def load_elsewhere(hub, places, tmp_path):
    """What came out of each (repo, revision) on a machine without the package, its card's code run to the end."""
    text, jobs = "The with statement", []
    for number, (repo, revision) in enumerate(places):
        code = code_of(hub.files(repo, revision)["README.md"])
        jobs.append((repo, revision, text, code, str(tmp_path / f"{number}.pt")))
    output = finish(start(ELSEWHERE, json.dumps(jobs), hub=hub, home=tmp_path / "home"))
    printing = sum("print(" in job[3] for job in jobs)
    assert output.count(f"{text} in Python is used to") == printing, "the cards' code prints a continuation"
    return [torch.load(job[-1]) for job in jobs]


def test_published_variants_load_where_the_package_is_not(trained, hub, tmp_path):
    """Both layouts, three variants each: the logits of this machine, default budgets that differ, the dial that turns."""
    variants = publish_model(trained, REPO, variants=BUDGETS)["variants"]
    assert [v["repo"] for v in variants] == [REPO, *(f"{REPO}-{b:g}" for b in BUDGETS)]
    (collection,) = hub.collections.values()
    assert [item["id"] for item in collection["items"]] == [v["repo"] for v in variants]
    branches = publish_model(trained, "user/branches", variants=BUDGETS, layout="revisions")["variants"]
    assert [v["revision"] for v in branches] == ["main", *(f"budget-{b:g}" for b in BUDGETS)]
    assert len(hub.collections) == 1
    assert not {"optimizer.pt", "notes.txt"} & set(hub.files(REPO))

    published = variants[1:] + branches[1:]
    assert all(code_of(hub.files(v["repo"], v["revision"])["README.md"]) for v in published)
    model = load_model(trained)
    for variant, results in zip(published, load_elsewhere(hub, [(v["repo"], v["revision"]) for v in published], tmp_path)):
        assert results["sensitivity"] == variant["sensitivity"] == model.config.sensitivity_of(variant["budget"])
        with torch.no_grad():
            assert torch.equal(results["logits"], model(results["ids"], sensitivity=variant["sensitivity"]).logits)
            assert torch.equal(results["call"], model(results["ids"], sensitivity=0.1).logits)
        assert torch.equal(results["load"], results["call"])
        assert results["pipeline"].startswith("The with statement")
    assert len({variant["sensitivity"] for variant in published}) == len(BUDGETS), "the default budgets do not differ"


def test_revisions_share_the_weights(trained, hub):
    weights = sum(path.stat().st_size for path in trained.glob("*.safetensors"))
    assert weights > 2e6
    before = 0
    for count in (1, 2, 3):
        publish_model(trained, REPO, variants=BUDGETS[:count], layout="revisions")
        sent, before = hub.all_received() - before, hub.all_received()
        assert sent > weights if count == 1 else sent < 1e6, f"variant {count} sent {sent} bytes"
    assert set(hub.repos[REPO].branches) == {"main", *(f"budget-{b:g}" for b in BUDGETS)}
    assert len(hub.uploads) == len(set(hub.uploads))


def test_nothing_is_sent_when_all_is_there(trained, hub):
    publish_model(trained, REPO)
    uploads, commits = len(hub.uploads), {name: len(repo.commits) for name, repo in hub.repos.items()}
    publish_model(trained, REPO)
    assert len(hub.uploads) == uploads
    assert {name: len(repo.commits) for name, repo in hub.repos.items()} == commits


def test_new_weights_replace_the_old_ones_at_once(folder, hub):
    publish_model(folder, REPO, layout="revisions")
    weights = load_model(folder).state_dict()
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file({name: 2 * tensor for name, tensor in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    record_weights(folder)
    publish_model(folder, REPO, layout="revisions")
    for branch in hub.repos[REPO].branches:
        kept = {path for path in hub.files(REPO, branch) if ".safetensors" in path}
        assert kept == {"model.safetensors"}, "shards of old would be loaded, or waste space"


def test_dry_run_writes_all_and_sends_nothing(trained, hub, tmp_path):
    summary = publish_model(trained, REPO, variants=[0.5], dry_run=True, out=tmp_path / "out")
    assert hub.requests == []
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tiny-DynaMoE", "tiny-DynaMoE-0.5"}
    variant = tmp_path / "out" / "tiny-DynaMoE-0.5"
    assert load_model(variant).config.sensitivity == load_model(trained).config.budgets["0.5"]
    shard = next(variant.glob("*.safetensors"))
    assert shard.samefile(trained / shard.name), "weights must be linked, not copied"
    for entry in summary["variants"]:
        assert entry["bytes"] == sum(entry["files"].values())
    with pytest.raises(FileExistsError):
        publish_model(trained, REPO, dry_run=True, out=tmp_path / "out")


def test_organisation_private_and_pull_request(trained, hub):
    publish_model(trained, "org/tiny", variants=[0.5], private=True, commit_message="Hello")
    assert all(repo.private for repo in hub.repos.values())
    assert set(hub.repos) == {"org/tiny", "org/tiny-0.5"}
    before = hub.files("org/tiny")
    summary = publish_model(trained, "org/tiny", variants=[], create_pr=True, base_model="org/base")
    assert summary["variants"][0]["url"].endswith("/discussions/1")
    assert hub.files("org/tiny") == before
    assert b"base_model: org/base" in hub.files("org/tiny", "refs/pr/1")["README.md"]
    hub.repos["org/tiny"].private = False
    with pytest.raises(ValueError, match="is public"):
        publish_model(trained, "org/tiny", private=True)


@pytest.mark.slow
def test_plain_push_to_hub(trained, hub, tmp_path):
    finish(start(PUSH, trained, REPO, hub=hub, home=tmp_path / "pusher"))
    (results,) = load_elsewhere(hub, [(REPO, "main")], tmp_path)
    with torch.no_grad():
        assert_close("logits", results["logits"], load_model(trained)(results["ids"]).logits)


# The card.


def test_card_is_valid_and_has_every_result(trained, hub, monkeypatch):
    publish_model(trained, REPO)
    evaluations = json.loads((trained / "results.json").read_text())["evaluations"]
    for budget in (None, *BUDGETS):
        repo = REPO if budget is None else f"{REPO}-{budget:g}"
        content = hub.files(repo)["README.md"].decode()
        card = ModelCard(content)  # parses the model index, and raises if it is not one
        card.validate()
        assert str(card) == content
        assert card.data.library_name == "transformers"
        assert card.data.pipeline_tag == "text-generation"
        assert {"dynamoe", "dynamic-moe", "conditional-computation"} <= set(card.data.tags)
        assert [result.metric_value for result in card.data.eval_results] == [e["perplexity"] for e in evaluations]
        assert [result.metric_args["variant"] for result in card.data.eval_results] == ["0.5", "0.75"]
        if budget is not None:
            assert f"mlp-share-{budget:.2f}" in card.data.tags
            assert any(tag.startswith("sensitivity-0.") for tag in card.data.tags)
            assert len([tag for tag in card.data.tags if tag.startswith(("mlp-share", "sensitivity"))]) == 2


def test_validation_is_not_a_formality(hub):
    with pytest.raises(ValueError, match="not an id"):
        ModelCard("---\nbase_model: not an id\n---\n").validate()
    with pytest.raises(ValueError, match="model.index"):
        ModelCard("---\nmodel-index:\n- name: a\n  results: [{}]\n---\n")


def test_every_number_of_the_card_is_in_the_files(folder):
    """Change a file, and the card says it; take it away, and the card says that it was not measured."""
    results = json.loads((folder / "results.json").read_text())
    first = results["evaluations"][0]
    first |= {"perplexity": 1234.5678, "mean_share": 0.4321, "active_parameters": 98765, "ratio_to_dense": 7.654}
    first["tasks"] = {"arc_easy": {"acc,none": 0.3141, "acc_stderr,none": 0.01, "sample_len": 100}}
    (folder / "results.json").write_text(json.dumps(results))
    timing = {"setting": "budget 0.5", "batch": 1, "tokens": 512, "ratio": 0.567, "range": [0.55, 0.58]}
    benchmark = {"machine": {"processor": "an abacus", "threads": 1, "torch": "2", "date": "2026-01-01"},
                 "decode": [{**timing, "tokens_per_second": 55.5}], "prefill": [timing],
                 "int8": [{**timing, "ratio": 0.321, "tokens_per_second": 98.7}]}  # fmt: skip
    (folder / "benchmark.json").write_text(json.dumps(benchmark))
    card = render_card(folder)
    for shown in (
        "1234.57",
        "43.2%",
        "98,765",
        "7.654",
        "arc_easy acc 0.3141",
        "0.57 (0.55 to 0.58), 55.5 tokens/s",
        "0.57 (0.55 to 0.58), 512 tokens",
        "55.5 tokens/s; packed in int8 0.32 (0.55 to 0.58), 98.7 tokens/s",
        "an abacus",
    ):
        assert shown in card.text
    results = {(result.dataset_type, result.metric_type, result.metric_value) for result in card.data.eval_results}
    assert {("arc_easy", "acc", 0.3141), ("pydoc_data.topics-held-out", "perplexity", 1234.5678)} <= results
    assert len(results) == 3, "errors and counts of a task are no results"
    training = json.loads((folder / "training.json").read_text())
    assert f"{training['tokens']:,} tokens" in card.text
    assert f"loss {training['history'][-1]['loss']:.4f}" in card.text
    assert "seed 0" in card.text
    assert "report/frontier.png" in card.text

    for name in ("results.json", "benchmark.json", "training.json", "conversion.json", "calibration.json"):
        (folder / name).unlink()
    card = render_card(folder)
    assert card.data.eval_results is None
    quality = card.text.split("## Quality")[1].split("## Limits")[0]
    assert "not measured" in quality
    table = [line for line in quality.splitlines() if line.startswith("| budget")]
    assert len(table) == len(BUDGETS)
    assert all(line.count("not measured") == 7 for line in table)
    assert "Training: none." in quality


def test_the_first_screen_of_a_card(trained):
    """What it is, how to load it, what it costs and what it saves, in this order; then everything else."""
    budgets = json.loads((trained / "config.json").read_text())["budgets"]
    family = [Variant(REPO, budgets["0.75"])] + [
        Variant(f"{REPO}-{name}", theta, float(name)) for name, theta in budgets.items()
    ]
    entry = json.loads((trained / "results.json").read_text())["evaluations"][0]
    card = render_card(trained, family[1], family, local_files_only=True).text
    title, load, cost, saving, variants, quality, experts, training, limits, code = card.split("\n## ")
    what = " ".join(title.split("\n\n")[1].split())
    assert what.startswith("A DynaMoE version of a dense llama model") and what.count(". ") == 1 and what.endswith(".")
    assert load.startswith("How to load it") and f'from_pretrained("{REPO}-0.5", trust_remote_code=True)' in load
    assert cost.startswith("What it costs")
    low, high = entry["ratio_interval"]
    assert f"ratio to the dense base | {entry['ratio_to_dense']:.3f} ({low:.3f} to {high:.3f}) |" in cost
    assert f"| perplexity | {entry['perplexity']:.2f} (" in cost
    assert saving.startswith("What it saves")
    assert f"| {entry['mean_share']:.1%} |" in saving and f"| {entry['active_parameters']:,} |" in saving
    assert saving.count("not measured") == 2, "it was not timed"
    assert len((title + load + cost + saving).splitlines()) < 50
    assert "| budget 0.5 (this model) |" in variants and f"[{REPO}-0.75](https://huggingface.co/{REPO}-0.75)" in variants
    assert quality.startswith("Quality") and experts.startswith("Experts by layer") and training.startswith("Training")
    assert "dynamoe export" in limits and "SHA-256" in code
    untimed = render_card(trained, family[2], family, local_files_only=True).text.split("## The family")[0]
    assert untimed.count("not measured") == 7, "this budget was not evaluated"


def test_templates_have_short_lines_and_are_shipped():
    folder = ROOT / "dynamoe_hf" / "templates"
    templates = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    assert {"model_card.md", "report.html", "tokens.html", "style.css", "tokens.js"} <= set(templates)
    for name, content in templates.items():
        assert max(map(len, content.splitlines())) <= 400, name
    packaged = (ROOT / "setup.cfg").read_text().split("[options.package_data]")[1].split("[")[0]
    assert "templates/*\n" in packaged, "an installed package needs them all"


def test_card_of_evaluations_that_differ(folder):
    """Two texts, one of them a training text by its name, and baselines that only one of them has."""
    results = json.loads((folder / "results.json").read_text())
    first = results["evaluations"][0]
    assert "trained on too" not in render_card(folder, local_files_only=True).text
    more = {**first, "text": ["a.txt", "b.txt"], "baselines": {"random": first["baselines"]["static"]}}
    (folder / "results.json").write_text(json.dumps({"evaluations": [*results["evaluations"], more]}))
    training = json.loads((folder / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps({**training, "text": ["b.txt", "c.txt"]}))
    card = render_card(folder, local_files_only=True).text
    assert "Texts with these names were trained on too: b.txt." in card
    assert "| budget 0.5, a.txt, b.txt |" in card
    ratio = f"{first['baselines']['static']['ratio_to_dense']:.3f}"
    assert f"| {first['ratio_to_dense']:.3f} | not measured | {ratio} |" in card
    assert f"| {first['ratio_to_dense']:.3f} | {ratio} | not measured |" in card


def test_card_names_the_shipped_code_and_no_path_of_this_machine(trained):
    card = str(render_card(trained))
    for path in trained.glob("*.py"):
        assert f"`{path.name}` {hashlib.sha256(path.read_bytes()).hexdigest()}" in card
    assert str(trained.parent) not in card
    assert "/tmp" not in card


def test_card_of_a_checkpoint(folder):
    """What the Trainer leaves at a checkpoint is enough for a truthful card."""
    for name in ("results.json", "training.json", "calibration.json"):
        (folder / name).unlink()
    log = [{"step": 10, "loss": 0.7171, "kd_loss": 0.0202}, {"step": 10, "eval_loss": 9.9}]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 10, "max_steps": 40, "log_history": log}))
    card = render_card(folder, local_files_only=True)
    assert "step 10 of 40" in card.text
    assert "0.7171" in card.text
    assert "kd_loss 0.0202" in card.text


def test_base_card_gives_license_and_languages(folder, base_folder, hub, tmp_path):
    head = b"---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# Base\n"
    hub.repos["user/base"] = Repo()
    hub.repos["user/base"].branches["main"] = hub.repos["user/base"].add_commit({"README.md": File(head, False)})
    record = json.loads((folder / "conversion.json").read_text())
    local = shutil.copytree(base_folder, tmp_path / "local")
    (local / "README.md").write_bytes(head)
    expected = {"user/base": ("user/base", "apache-2.0"), str(local): (None, "apache-2.0"), "runs/base": (None, None),
                str(tmp_path / "gone"): (None, None)}  # fmt: skip
    for base, (named, license) in expected.items():
        (folder / "conversion.json").write_text(json.dumps({**record, "base": base}))
        data = render_card(folder).data
        assert (data.base_model, data.license) == (named, license), base
        assert data.get("base_model_relation") == (named and "finetune")
    hub.faults.append(Fault("GET", "/user/base", 500, times=3))
    (folder / "conversion.json").write_text(json.dumps({**record, "base": "user/base"}))
    assert render_card(folder).data.base_model is None, "nobody says that this is not a folder of another machine"
    assert render_card(folder, base_model="user/base").data.base_model == "user/base"
    cached = tmp_path / "cache" / "models--user--base"
    (cached / "snapshots" / "1").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1")
    (cached / "snapshots" / "1" / "README.md").write_bytes(head)
    data = render_card(folder).data
    assert (data.base_model, data.license) == ("user/base", "apache-2.0")
    assert not hub.faults
    assert render_card(folder, local_files_only=True).data.license == "apache-2.0"


# Faults.


def refused(folder, hub, capsys, caplog, error, message):
    """Publishing fails with this error, which tells nobody the token, and leaves nothing that is not whole."""
    caplog.set_level(logging.INFO)  # below it, the HTTP library prints every header, as it is asked to
    with pytest.raises(error, match=message) as caught:
        publish_model(folder, REPO, variants=[0.5])
    output = capsys.readouterr()
    told = "".join(traceback.format_exception(caught.value)) + caplog.text + output.out + output.err
    assert TOKEN not in told
    assert_whole(hub)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (Fault("POST", "/repos/create", 401, message=f"bad {TOKEN}"), PermissionError, "hf auth login"),
        (Fault("POST", "/commit/", 401, message=f"bad {TOKEN}"), PermissionError, "hf auth login"),
        (Fault("POST", "/commit/", 403), PermissionError, "may not write"),
        (Fault("POST", "/preupload/", 404), ValueError, "no such repository"),
        (Fault("POST", "/commit/", 409), ValueError, "Run the same command again"),
        (Fault("POST", "/validate-yaml", 413), ValueError, "refused"),
        (Fault("POST", "/commit/", 500, times=99), ConnectionError, "what has arrived is not sent twice"),
        (Fault("PUT", "/upload/", 500, times=99), ConnectionError, "what has arrived is not sent twice"),
        (Fault("PUT", "/upload/", None, times=99), ConnectionError, "the connection broke"),
        (Fault("POST", "/commit/", None, times=99), ConnectionError, "the connection broke"),
        (Fault("POST", "/commit/", 429, times=99, headers={"Retry-After": "86400"}), ConnectionError, "again in 86400 s"),
    ],
    ids=lambda value: f"{value.status or 'cut'}{value.path.replace('/', '-')}" if isinstance(value, Fault) else "",
)
def test_faults_are_told_clearly_and_the_next_run_completes(
    fault, error, message, trained, dry_runs, hub, waits, capsys, caplog
):
    hub.faults.append(fault)
    refused(trained, hub, capsys, caplog, error, message)
    hub.faults.clear()
    publish_model(trained, REPO, variants=[0.5])
    assert_complete(hub, dry_runs["repos"])


@pytest.mark.parametrize(
    ("fault", "waited"),
    [
        (Fault("POST", "/repos/create", 429, headers={"Retry-After": "7"}), 7),
        (Fault("POST", "/commit/", 429, headers={"Retry-After": "7"}), 7),
        (Fault("POST", "/collections", 503), 1),
        (Fault("POST", "/preupload/", 500, times=2), 1),
        (Fault("POST", "/commit/", 500, times=TRIES - 1), 4),
        (Fault("POST", "/branch/", 502), 1),
        (Fault("PUT", "/upload/", None), 1),
        (Fault("POST", "/commit/", None), 1),
    ],
    ids=lambda value: f"{value.status or 'cut'}{value.path.replace('/', '-')}" if isinstance(value, Fault) else "",
)
def test_passing_faults_are_waited_for(fault, waited, trained, dry_runs, hub, waits):
    layout = "revisions" if "branch" in fault.path else "repos"
    hub.faults.append(fault)
    publish_model(trained, REPO, variants=[0.5], layout=layout)
    assert not hub.faults
    assert waited in waits
    assert max(waits) <= LONGEST_WAIT
    assert_complete(hub, dry_runs[layout])


def test_token_that_is_wrong_missing_or_in_a_file(folder, hub, monkeypatch, capsys, caplog):
    (folder / "conversion.json").write_text(json.dumps({"base": TOKEN}))
    monkeypatch.setattr("dynamoe_hf.publish.render_card", lambda *args: "a card")
    refused(folder, hub, capsys, caplog, ValueError, "conversion.json holds your Hub token")
    (folder / "conversion.json").unlink()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    said = refused(folder, hub, capsys, caplog, PermissionError, "does not accept the token")
    assert "hf_wrong" not in said, "the server repeats the token, and the error must not"
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    refused(folder, hub, capsys, caplog, PermissionError, "no token")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(folder, hub, capsys, caplog, ConnectionError, "HF_HUB_OFFLINE")
    assert not hub.repos


@pytest.mark.parametrize(
    ("repo", "options", "message"),
    [
        ("tiny", {}, "named with its owner"),
        ("user/ti ny", {}, "Repo id must"),
        (REPO, {"variants": [0.2]}, "outside the calibrated range"),
        (REPO, {"layout": "tags"}, "layout 'tags' is unknown"),
        (REPO, {"out": "somewhere"}, "Add `--dry-run`"),
    ],
)
def test_wrong_arguments_send_nothing(repo, options, message, trained, hub):
    with pytest.raises(ValueError, match=message):
        publish_model(trained, repo, **options)
    assert not hub.requests


def test_folder_that_could_not_be_loaded_is_not_published(folder, base_folder, hub):
    next(folder.glob("*-of-*.safetensors")).unlink()
    with pytest.raises(ValueError, match="lacks weights: model-0"):
        publish_model(folder, REPO)
    with pytest.raises(ValueError, match="holds a dense llama model"):
        publish_model(base_folder, REPO)
    with pytest.raises(ValueError, match="is not a folder"):
        publish_model(folder / "nowhere", REPO)
    assert not hub.requests


@pytest.mark.parametrize("layout", ["repos", pytest.param("revisions", marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_run_again(layout, trained, dry_runs, hub, monkeypatch, tmp_path):
    """SIGKILL while any request is half sent: what is there is whole, and the next run sends only what had not arrived."""
    publish_model(trained, REPO, variants=[0.5], layout=layout)
    moments = random.sample(range(len(hub.requests)), 3)
    with ExitStack() as stack:
        servers, processes = [stack.enter_context(HubServer()) for _ in moments], []

        def killer(moment, number):
            begun = itertools.count()

            def interrupt(method, path):
                if next(begun) >= moment and processes[number].poll() is None:
                    processes[number].send_signal(signal.SIGKILL)
                    processes[number].wait()

            return interrupt

        for number, (server, moment) in enumerate(zip(servers, moments)):
            server.interrupt = killer(moment, number)
            processes.append(start(PUBLISH, trained, REPO, layout, hub=server, home=tmp_path / f"home{number}"))
        for server, moment, process in zip(servers, moments, processes):
            output, _ = process.communicate()
            assert process.returncode == -signal.SIGKILL, f"moment {moment}: {output[-2000:]}"
            server.interrupt = None
            time.sleep(0.2)  # what had come whole is still being answered
            assert_whole(server)
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
            publish_model(trained, REPO, variants=[0.5], layout=layout)
            assert_complete(server, dry_runs[layout])
