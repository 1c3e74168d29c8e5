"""The experiment of quality against compute: its rivals against plain definitions, and a rehearsal on a tiny model."""

import json
import random
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_dense, tiny_tokenizer
from reference import assert_close


sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import frontier
import tasks
from frontier import CONTENDERS, SHARES, TEXTS, UNSEEN, prepare_texts
from subnets import InputRouters, Subnet, module_errors, pruned, search

from dynamoe_hf import DynaMoEForCausalLM
from dynamoe_hf.data import topic_documents
from dynamoe_hf.export import dense_prefix


@pytest.fixture(scope="module")
def texts(tmp_path_factory, text_file):
    """Stand-ins for the packages: documents of several paragraphs, some of which two documents share."""
    paragraphs = [p for p in text_file.read_text().split("\n\n") if p.strip()]
    folder = tmp_path_factory.mktemp("texts")
    for start, name in enumerate(("anarchism", "perl-doc", "postgresql-doc-15")):
        documents = ["\n\n".join(paragraphs[start + i : start + i + 6]) for i in range(0, len(paragraphs), 4)]
        (folder / f"{name}.txt").write_text("\f".join(documents))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_dense("llama", num_hidden_layers=2, max_position_embeddings=1024, intermediate_size=96).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def blocks():
    return torch.randint(3, 128, (8, 64), generator=torch.Generator().manual_seed(0))


def test_input_routers_choose_what_a_mask_computes(blocks):
    """A threshold that all reach, or none, is the narrowest or the full model; between them the budget is met."""
    dense = tiny_dense(intermediate_size=64)
    routers = InputRouters(dense, blocks, module_errors(dense, blocks))
    with torch.no_grad():
        full = dense(blocks).logits
        with routers.routed(100.0):
            assert_close("full", dense(blocks).logits, full)
        with pruned(dense, Subnet([8, 8], [1, 1], routers.order)):
            narrowest = dense(blocks).logits
        with routers.routed(-100.0):
            assert_close("narrowest", dense(blocks).logits, narrowest)
        budget = 0.7 * 2 * (3 * 32 * 64 + 2 * 32 * 32)
        records = []
        logit = routers.dial(blocks, budget)
        with routers.routed(logit, records):
            dense(blocks)
    assert routers.spent(records, logit) == pytest.approx(budget, rel=0.05)
    chosen = {int(c) for kind, logits in records for c in (logits < logit).sum(-1).unique()}
    assert len(chosen) > 3, "tokens differ"


def test_no_paragraph_is_trained_on_and_held_out(texts, tmp_path):
    (tmp_path / "texts").symlink_to(texts)
    prepare_texts(tmp_path)
    training = {" ".join(p.split()) for p in (tmp_path / "train.txt").read_text().replace("\f", "\n\n").split("\n\n")} - {""}
    assert len(training) > 100
    for name in TEXTS:
        held_out = (tmp_path / "held-out" / f"{name}.txt").read_text().replace("\f", "\n\n").split("\n\n")
        assert held_out and not training & {" ".join(p.split()) for p in held_out}


def test_evaluation_time_is_without_training(texts, base, tmp_path, monkeypatch):
    """Without that of this process, whose folders keep it; what another process trains meanwhile is not subtracted."""
    (tmp_path / "texts").symlink_to(texts)
    bench = frontier.Bench(tmp_path, tokens=4096, eval_tokens=512, base=base)

    def stage(source, folder, **settings):
        time.sleep(0.3)
        for name in (folder, tmp_path / "of-another-process"):
            name.mkdir()
            (name / "training.json").write_text('{"seconds": 100}')

    def contender(bench, share, text):
        bench.trained("mine", base, 0, stage)
        return {"share": share, "nll": []}

    monkeypatch.setitem(CONTENDERS, "dense", contender)
    assert 0 <= bench.measured("dense", 1.0, UNSEEN)["seconds"] < 0.3
    assert bench.training_seconds() == {"mine": 100, "of-another-process": 100}


def test_conversion_is_never_in_mixed_precision(texts, base, tmp_path):
    """The first text that is evaluated asks for it, under autocast, which keeps casts of weights that are then reordered."""
    weights = []
    for bf16 in (False, True):
        out = tmp_path / f"bf16-{bf16}"
        out.mkdir()
        (out / "texts").symlink_to(texts)
        bench = frontier.Bench(out, tokens=4096, eval_tokens=512, base=base, bf16=bf16)
        bench.measured("dense", 1.0, UNSEEN)
        weights.append(json.loads((bench.converted / "config.json").read_text())["error_weights"])
    assert weights[0] == weights[1]


def test_a_mask_is_what_a_narrower_model_computes(token_ids):
    model = DynaMoEForCausalLM.from_dense(tiny_dense())
    dense = dense_prefix(model, 1.0)
    with torch.no_grad():
        full = dense(token_ids).logits
        with pruned(dense, Subnet.of_width(0.5, dense.config)):
            assert_close("static width", dense(token_ids).logits, dense_prefix(model, 0.5)(token_ids).logits)
        with pruned(dense, Subnet([64, 64], [4, 4], [[3, 1, 0, 2]] * 2)):
            assert torch.equal(dense(token_ids).logits, full)
        with pruned(dense, Subnet(heads=[4, 2], head_order=[[0, 1, 2, 3], [3, 1, 0, 2]])):
            masked = dense(token_ids).logits
        dense.model.layers[1].self_attn.o_proj.weight.view(32, 4, 8)[:, [0, 2]] = 0
        assert_close("heads", masked, dense(token_ids).logits)
        assert not torch.allclose(masked, full)
        dense.bfloat16()  # as tasks.py evaluates
        with pruned(dense, Subnet([64, 32], [4, 2], [[0, 1, 2, 3], [3, 1, 0, 2]])):
            assert dense(token_ids).logits.dtype == torch.bfloat16


def test_module_errors_are_weighted_squares(blocks):
    """Against the definition: the module is run with the later groups at zero, c by autograd on one layer's output."""
    dense = tiny_dense(intermediate_size=64)
    errors = module_errors(dense, blocks)
    mlp, kept = dense.model.layers[1].mlp, []
    hook = mlp.register_forward_hook(lambda module, args, output: kept.append((args[0], output.requires_grad_())) or output)
    for block in blocks[:6]:
        logits = dense(block[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, block[1:], reduction="sum").backward(inputs=[kept[-1][1]])
    weight = sum(output.grad.double().square().sum() for _, output in kept) / (6 * 64 * 32)
    for block in blocks[6:8]:
        dense(block[None])
    hook.remove()
    with torch.no_grad():
        for step in (0, 7, 14):
            plain = 0.0
            for x, output in kept:
                hidden = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
                hidden[..., 4 * (step + 1) :] = 0
                plain += (output - mlp.down_proj(hidden))[0, 4:].square().sum()
            assert_close(f"errors at step {step}", errors.mlp[1, step], (weight * plain).float(), rtol=1e-3)
    assert (errors.mlp[:, -1] == 0).all() and (errors.attention[:, -1] == 0).all()
    assert all(sorted(order) == [0, 1, 2, 3] for order in errors.head_order)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("with_heads", [False, True])
def test_searched_networks_keep_to_the_budget(share, with_heads, blocks):
    dense = tiny_dense(intermediate_size=64)
    subnet = search(module_errors(dense, blocks), dense.config, share, with_heads)
    spent = sum(3 * 32 * width for width in subnet.widths)
    budget = share * 2 * 3 * 32 * 64
    if with_heads:
        spent, budget = spent + sum(2 * 8 * 32 * heads for heads in subnet.heads), budget + 2 * 2 * 32 * 32
    step = 2 * 8 * 32 if with_heads else 3 * 32 * 4
    assert budget - step < spent <= budget, "not a step more fits"


def test_items_hold_their_answer():
    """Put back, the right choice gives the text; wrong ones do not."""
    documents = topic_documents("held-out")
    text = " ".join(" ".join(documents).split())
    for kind in tasks.KINDS:
        made = tasks.items(documents, kind, 30, random.Random(0))
        assert len(made) >= 10, kind
        for item in made:
            choices = item.get("choices", [item.get("target", "").strip()])
            label = item.get("label", 0)
            there = [f"{item['context']} {choice}" in text for choice in choices]
            assert there[label] and sum(there) == 1, item
            assert len(set(choices)) == len(choices)
    labels = [item["label"] for item in tasks.items(documents, "word", 30, random.Random(0))]
    assert len(set(labels)) > 2, "the answer's place gives nothing away"


@pytest.mark.parametrize(
    ("token", "name"),
    [("\u0120the", "function word"), ("\u0120table", "beginning of a word"), ("able", "inside of a word"), ("\u010a\u010a", "space and line ends"),
     ("\u0120", "space and line ends"), ("42", "number"), (").", "punctuation and symbols"), ("\u0120It", "function word")],
)  # fmt: skip
def test_token_classes(token, name):
    assert frontier.token_class(token) == name


@pytest.mark.slow
def test_local_tasks_run(base, texts, tmp_path):
    """With lm-eval: every item is asked, and the table adds them up."""
    pytest.importorskip("lm_eval", reason="needs lm-eval: `make test-slow` installs it")
    out = tmp_path / "out"
    out.mkdir()
    (out / "texts").symlink_to(texts)
    common = ["--results", str(tmp_path / "results")]
    settings = ["--tokens", "5120", "--eval-tokens", "2044", "--base", str(base), "--bf16"]
    frontier.main([str(out), *settings, "--only", "ours", "static", *common])
    tasks.main([str(out), "--items", "36", *common])
    record = json.loads(next((tmp_path / "results").glob("tasks_*.json")).read_text())
    assert 12 <= sum(record["items"].values()) <= 36
    names = [row["model"] for row in record["rows"]]
    assert names[:2] == ["dense base", "DynaMoE, full width"] and names[-1] == "static width per layer, 50%"
    for row in record["rows"]:
        assert all(0 <= metrics["acc,none"] <= 1 for metrics in row["tasks"].values())


def test_rehearsal(base, texts, tmp_path):
    """Every contender, at every share, on two texts; then the same again from what is kept, and with other numbers."""
    out, results = tmp_path / "out", tmp_path / "results"
    out.mkdir()
    (out / "texts").symlink_to(texts)
    command = [str(out), "--tokens", "5120", "--eval-tokens", "2044", "--base", str(base), "--bf16", "--results", str(results)]
    command += ["--texts", "postgresql-doc-15", "topics"]
    frontier.main([*command, "--only", *CONTENDERS])
    record = json.loads(next(results.glob("*.json")).read_text())
    rows = record["rows"]
    assert {row["contender"] for row in rows} == set(CONTENDERS)
    assert len(rows) == 2 * (3 + 2 + len(SHARES) * (len(CONTENDERS) - 3))  # three dense ones, and full width of two of ours
    for row in rows:
        low, high = row["ratio_interval"]
        assert 0 < low <= row["ratio_to_dense"] <= high
        if row["contender"] in ("static", "cmoe", "teal", "teal-adapted", "teal-tuned"):
            assert abs(row["share"] - row["asked"]) < 0.05, row
    dense = [row["ratio_to_dense"] for row in rows if row["contender"] == "dense"]
    assert dense == [1.0, 1.0]
    learned = record["learned"]["ours"]
    assert learned != record["learned"]["ours-long"]
    assert len(learned["by_layer"]) == 2 and all(0 < share <= 1 for share in learned["by_layer"])
    assert sum(entry["tokens"] for entry in learned["by_class"].values()) == rows[0]["blocks"] * 512
    assert next(results.glob("*.png")).stat().st_size > 10_000
    assert "never trained on" in next(results.glob("*.md")).read_text()

    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    frontier.main([*command, "--only", "ours", "static"])
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert json.loads(next(results.glob("*.json")).read_text()) == record, "what is not run again stays in the record"
    with pytest.raises(SystemExit, match="was begun with"):
        frontier.main([str(out), "--tokens", "2048"])


def test_several_processes_measure_what_one_does(base, texts, tmp_path, capfd):
    """The same rows, each group of contenders in a process of its own; and one that fails does not take the others with it."""
    assert sorted(name for group in frontier.GROUPS for name in group) == sorted(set(CONTENDERS) - {"dense"})
    records = []
    for jobs in ("1", "2"):
        out, results = tmp_path / jobs, tmp_path / f"results-{jobs}"
        out.mkdir()
        (out / "texts").symlink_to(texts)
        command = [str(out), "--tokens", "4096", "--eval-tokens", "1022", "--base", str(base), "--results", str(results)]
        frontier.main([*command, "--texts", "topics", "--only", "static", "cmoe", "--jobs", jobs])
        records.append(json.loads(next(results.glob("*.json")).read_text()))
    for ours, theirs in zip(records[0]["rows"], records[1]["rows"], strict=True):
        assert (ours["contender"], ours["asked"], ours["text"]) == (theirs["contender"], theirs["asked"], theirs["text"])
        assert ours["ratio_to_dense"] == pytest.approx(theirs["ratio_to_dense"], rel=1e-3)
    assert (tmp_path / "2" / "jobs" / "static.log").exists() and not (tmp_path / "1" / "jobs").exists()
    (out / "held-out" / "postgresql-doc-15.txt").write_text("too short")
    (out / "measured" / "dense-1-postgresql-doc-15.json").write_text((out / "measured" / "dense-1-topics.json").read_text())
    with pytest.raises(SystemExit, match="1 of 1 processes failed.*cmoe.log"):
        frontier.main([*command, "--texts", "postgresql-doc-15", "--only", "cmoe", "--jobs", "2"])
    assert "too short" in (out / "jobs" / "cmoe.log").read_text()


def test_records_of_several_days_are_joined():
    """Rows that the new record lacks stay, but for those of other tokens or other settings."""
    settings = {"tokens": 1, "eval_tokens": 2, "base": None, "bf16": False, "recipe": {}}

    def record(seconds, *rows, **changed):
        rows = [dict(zip(("contender", "text", "perplexity"), row)) for row in rows]
        return {**settings, "training_seconds": seconds, "learned": {}, "rows": rows, **changed}

    def names(record):
        return [(row["contender"], row["text"]) for row in record["rows"]]

    old = record({"a": 1}, ("dense", "topics", 9.0), ("teal", "topics", 12.0), ("dense", UNSEEN, 19.0), ("teal", UNSEEN, 25.0))
    new = record({"b": 2}, ("dense", UNSEEN, 19.0), ("ours", UNSEEN, 20.0))
    both = frontier.joined(new, old)
    assert names(both) == [(c, UNSEEN) for c in ("dense", "ours", "teal")] + [(c, "topics") for c in ("dense", "teal")]
    assert both["training_seconds"] == {"a": 1, "b": 2}
    other_tokens = record({}, ("dense", UNSEEN, 18.0))
    assert names(frontier.joined(other_tokens, old)) == [("dense", UNSEEN), ("dense", "topics"), ("teal", "topics")]
    other_settings = record({}, ("dense", UNSEEN, 19.0), tokens=5)
    assert frontier.joined(other_settings, old) == other_settings
    assert frontier.joined(new, {"rows": []}) == new, "a record of before has not all that is asked now"
    other_precision = record({}, ("dense", UNSEEN, 19.01), ("ours", UNSEEN, 20.0))
    assert ("teal", UNSEEN) in names(frontier.joined(other_precision, old))

    old["rows"] += [
        {"contender": c, "text": UNSEEN, "perplexity": 21.0, "ours_over_this": {}} for c in ("static", "paper", "teal-tuned")
    ]
    assert {c for c, _ in names(frontier.joined(new, old))} == {"dense", "ours", "teal", "static", "paper", "teal-tuned"}
    new["recipe"], old["training_seconds"] = {"adapt_share": 0.5}, {"paper-40%": 3, "static": 4}
    assert frontier.joined(new, old)["training_seconds"] == {"b": 2, "paper-40%": 3}
    rows = frontier.joined(new, old)["rows"]
    assert {row["contender"] for row in rows} == {"dense", "ours", "teal", "paper", "teal-tuned"}, (
        "what learned from the former recipe goes"
    )
    assert not any("ours_over_this" in row for row in rows), "so does the comparison with it"


def test_a_trained_family_goes_on_where_it_stopped(base, texts, tmp_path, monkeypatch):
    """Stopped after fifty steps, the weights are those of a run that was not."""
    folders = []
    for name in ("whole", "stopped"):
        out = tmp_path / name
        out.mkdir()
        (out / "texts").symlink_to(texts)
        bench = frontier.Bench(out, 60 * 1024, 1024, base)
        bench.__dict__["training_blocks"] = bench.training_blocks.repeat(4, 1)[:240]
        folders.append(out / "static")
        if name == "stopped":
            step, count = torch.optim.AdamW.step, iter(range(1000))

            def interrupted(*args, step=step, count=count, **options):
                if next(count) == 52:
                    raise KeyboardInterrupt
                return step(*args, **options)

            with monkeypatch.context() as patch:
                patch.setattr(torch.optim.AdamW, "step", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    bench.family("static")
            assert not (out / "static").exists()
        bench.family("static")
    whole, stopped = (frontier.load_dense(folder)[0].state_dict() for folder in folders)
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    initial = frontier.load_dense(base)[0].state_dict()
    moved = {name for name in whole if not torch.equal(whole[name], initial[name])}
    assert "model.embed_tokens.weight" not in moved and any("self_attn" in name for name in moved)
