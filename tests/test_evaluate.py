"""Evaluation against plain computations, with its baselines, tasks and records."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import tiny_dense, tiny_dynamoe, tiny_tokenizer
from reference import assert_close

from dynamoe_hf.convert import convert_model
from dynamoe_hf.data import documents_for, token_blocks
from dynamoe_hf.evaluate import evaluate_model
from dynamoe_hf.folder import active_parameters, count_parameters, load_model


FAST = {"max_tokens": 1024, "block_size": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with mixed routes and a budget. Results are added to it."""
    path = tmp_path_factory.mktemp("evaluated") / "model"
    model = tiny_dynamoe(budgets={"0.6": 0.4}, error_weights=[0.01, 0.01])
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    tiny_dense().save_pretrained(path.with_name("dense"))
    tiny_tokenizer().save_pretrained(path.with_name("dense"))
    return path


def blocks():
    return token_blocks(documents_for("held-out"), tiny_tokenizer(), 64, 1024)


def test_perplexity_equals_the_models_own_loss(folder):
    entry = evaluate_model(folder, budget=0.6, **FAST)[0]
    model = load_model(folder)
    losses = [model(row[None], labels=row[None], sensitivity=0.4).loss.item() for row in blocks()]
    assert entry["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    low, high = entry["perplexity_interval"]
    assert low < entry["perplexity"] < high
    assert entry["tokens"] == 16 * 63
    out = model(blocks(), sensitivity=0.4, output_router_logits=True)
    widths = torch.tensor([0.25, 0.5, 0.75, 1.0])
    share = torch.stack([widths[expert] for expert in out.expert_indices]).mean().item()
    assert entry["mean_share"] == pytest.approx(share, abs=1e-3)
    assert [sum(row) for row in entry["expert_use"]] == pytest.approx([1, 1], abs=1e-3)
    assert 0 <= entry["router_agreement"] <= 1


def test_ratio_to_the_dense_base(folder):
    entry = evaluate_model(folder, force_expert=3, base=folder.with_name("dense"), **FAST)[0]
    assert entry["ratio_to_dense"] == pytest.approx(1, abs=1e-4)
    assert entry["mean_share"] == 1
    assert entry["active_parameters"] == entry["total_parameters"]
    narrow = evaluate_model(folder, force_expert=0, base=folder.with_name("dense"), **FAST)[0]
    assert narrow["ratio_to_dense"] == pytest.approx(narrow["perplexity"] / entry["dense_perplexity"], rel=1e-6)


def test_baselines(folder):
    entry = evaluate_model(folder, budget=0.6, baselines=("static", "random", "label"), **FAST)[0]
    assert set(entry["baselines"]) == {"static", "random", "label"}
    assert entry["baselines"]["random"]["mean_share"] == pytest.approx(entry["mean_share"], abs=0.02)
    assert entry["baselines"]["label"]["mean_share"] == pytest.approx(entry["mean_share"], abs=0.05)
    assert entry["baselines"]["static"]["perplexity"] > 1


def test_random_routes_follow_the_histogram():
    model = tiny_dynamoe()
    histogram = torch.tensor([[0.7, 0.1, 0.2, 0.0], [0.0, 0.0, 0.5, 0.5]])
    ids = torch.randint(3, 128, (8, 200))
    with torch.no_grad(), model.routing(route="random", histogram=histogram, records=[]) as routing:
        model(ids)
        for row, record in zip(histogram, routing.records):
            drawn = record.expert.flatten().bincount(minlength=4) / ids.numel()
            assert torch.allclose(drawn, row, atol=0.05), (drawn, row)
            assert (drawn[row == 0] == 0).all()


def test_results_are_kept_and_replaced(folder):
    evaluate_model(folder, sensitivity=0.3, **FAST)
    evaluate_model(folder, sensitivity=0.3, **FAST)
    kept = json.loads((folder / "results.json").read_text())["evaluations"]
    assert [entry["setting"] for entry in kept].count("sensitivity 0.3") == 1


def test_damaged_results_are_told_before_the_work(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "cut")
    (tmp_path / "cut" / "results.json").write_text('{"evaluations": [')
    monkeypatch.setattr("dynamoe_hf.evaluate.load_model", lambda folder: pytest.fail("loaded a model first"))
    with pytest.raises(ValueError, match=r"results\.json is not valid JSON.*Repair it, or delete it"):
        evaluate_model(tmp_path / "cut", budget=0.6, **FAST)


def test_active_parameters(folder):
    model = load_model(folder)
    counts = count_parameters(model)
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["mlp"] == 2 * 3 * 32 * 64
    assert active_parameters(counts, 1.0) == counts["total"]
    assert active_parameters(counts, 0.5) == counts["total"] - counts["mlp"] // 2


def test_bad_settings(folder):
    with pytest.raises(ValueError, match="Give one of them"):
        evaluate_model(folder, budget=0.6, sensitivity=0.5)
    with pytest.raises(ValueError, match="outside the calibrated range"):
        evaluate_model(folder, budget=0.2, **FAST)
    with pytest.raises(ValueError, match="experts 0 to 3"):
        evaluate_model(folder, force_expert=7, **FAST)
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        evaluate_model(folder, sensitivity=2.0, **FAST)
    with pytest.raises(ValueError, match="Unknown baselines best"):
        evaluate_model(folder, baselines=["best"], **FAST)
    with pytest.raises(ValueError, match="holds a dense llama model"):
        evaluate_model(folder.with_name("dense"), **FAST)
    with pytest.raises(ValueError, match="gives no interval"):
        evaluate_model(folder, max_tokens=64, block_size=64)


@pytest.fixture
def letters(tmp_path):
    """A task of lm-eval as a local file: questions of different lengths, so that batches are padded."""
    pytest.importorskip("lm_eval", reason="needs lm-eval: `make test-slow` installs it")
    rows = [
        {"question": f"letter {c * (1 + 3 * i)}", "choices": [c, "#"], "answer": i % 2} for i, c in enumerate("abcdefghijkl")
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "letters.yaml").write_text(
        f"task: letters\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: choices\ndoc_to_target: answer\n"
        "metric_list:\n  - metric: acc\n"
    )
    return tmp_path / "letters.yaml"


@pytest.mark.slow
def test_local_task_file(folder, letters):
    entry = evaluate_model(folder, budget=0.6, tasks=[str(letters)], **FAST)[0]
    assert 0 <= entry["tasks"]["letters"]["acc,none"] <= 1


@pytest.mark.slow
def test_lm_eval_from_a_shell(tmp_path, letters):
    """`sensitivity` among its `model_args` is the dial: routing, and along the path the density; the batch size does not matter."""
    model = tiny_dynamoe(error_weights=[0.01, 0.01])
    model.config.thresholds = {"density": [0.4, 0.7], "input": [[0.8, 0.8], [0.4, 0.4]], "hidden": [[0.2, 0.2], [0.1, 0.1]]}
    model.config.density_path = [[0.4, 0.5]]
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")

    def likelihoods(sensitivity, batch_size):
        """Of each answer, and the accuracy."""
        out = tmp_path / f"out-{sensitivity}-{batch_size}"
        arguments = f"pretrained={tmp_path / 'model'},trust_remote_code=True,sensitivity={sensitivity}"
        subprocess.run([sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", arguments, "--tasks", str(letters),
                        "--device", "cpu", "--batch_size", str(batch_size), "--output_path", str(out), "--log_samples"],
                       check=True, env={**os.environ, "HF_HOME": str(tmp_path / "home")})  # fmt: skip
        rows = [json.loads(line) for path in out.rglob("samples_*.jsonl") for line in path.read_text().splitlines()]
        rows.sort(key=lambda row: row["doc_id"])
        assert len(rows) == 12
        result = json.loads(next(out.rglob("results_*.json")).read_text())["results"]["letters"]["acc,none"]
        return torch.tensor([float(answer[0][0]) for row in rows for answer in row["resps"]]), result

    one, accuracy = likelihoods(0.4, 1)
    many, _ = likelihoods(0.4, 32)
    assert_close("batches of 32", many, one, atol=1e-4)
    entry = evaluate_model(tmp_path / "model", sensitivity=0.4, tasks=[str(letters)], **FAST)[0]
    assert entry["tasks"]["letters"]["acc,none"] == accuracy
    model = load_model(tmp_path / "model")
    ids = tiny_tokenizer()("letter a a", return_tensors="pt")["input_ids"]  # the question, a space, the first answer

    def likelihood(**dial):
        with torch.no_grad():
            log_probs = model(ids, sensitivity=0.4, **dial).logits[0].float().log_softmax(-1)
        return log_probs[-3, ids[0, -2]] + log_probs[-2, ids[0, -1]]

    assert_close("as called directly", one[0], likelihood(), atol=1e-4)
    assert abs(one[0] - likelihood(density=1.0)) > 1e-3, "the density has not moved"
    dense, _ = likelihoods(1.0, 1)
    assert (dense - one).abs().max() > 1e-2


def test_a_converted_folder_evaluates_as_dense(dense_folder, tmp_path):
    convert_model(dense_folder, tmp_path / "model", max_tokens=512, block_size=64)
    entry = evaluate_model(tmp_path / "model", base=dense_folder, **FAST)[0]
    assert entry["setting"] == "sensitivity 1"
    assert entry["ratio_to_dense"] == pytest.approx(1, abs=1e-4)
