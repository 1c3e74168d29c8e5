"""The stages `train_model` and `adapt_model`: their phases, their records, and that an interruption changes nothing."""

import contextlib
import json
import math
import shutil
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
from conftest import tiny_tokenizer
from reference import assert_close

from dynamoe_hf import DynaMoETrainer, adapt_model, fit_routers, train_model
from dynamoe_hf.calibrate import calibrate_budgets
from dynamoe_hf.convert import convert_model, load_dense
from dynamoe_hf.evaluate import evaluate_model
from dynamoe_hf.folder import load_model
from dynamoe_hf.generate import continue_text
from dynamoe_hf.modeling import sparsity
from dynamoe_hf.report import token_difficulty
from dynamoe_hf.train import Run, train_recipe
from dynamoe_hf.training_arguments import AdaptArguments, TrainArguments


@pytest.fixture(scope="module")
def converted(dense_folder, tmp_path_factory):
    """A converted tiny Llama. Treat it as read-only."""
    out = tmp_path_factory.mktemp("converted") / "model"
    convert_model(dense_folder, out, max_tokens=512, block_size=64)
    return out


def test_training_routers_alone_leaves_the_rest(converted, text_file, tmp_path):
    record = train_model(
        converted, tmp_path / "out", text=str(text_file), train_parts="routers", max_tokens=2048, block_size=32
    )
    ours, theirs = load_model(tmp_path / "out").state_dict(), load_model(converted).state_dict()
    assert record["router_fit"]["tokens"] == 2048
    assert all(torch.equal(ours[name], tensor) == (".router." not in name) for name, tensor in theirs.items())


def test_the_full_width_can_be_trained_alone(converted, text_file, tmp_path):
    """As a dense model is: all neurons in every step, by the LM loss, and the routers stay as they were."""
    settings = {"text": str(text_file), "max_tokens": 512, "block_size": 32}
    record = adapt_model(converted, tmp_path / "out", **settings)
    assert all(entry["mean_width"] == 1 and entry["kd_loss"] == 0 < entry["lm_loss"] for entry in record["history"])
    ours, theirs = load_model(tmp_path / "out").state_dict(), load_model(converted).state_dict()
    changed = {name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)}
    assert any(".down_proj." in name for name in changed) and not any(".router." in name for name in changed)
    for wrong in ((0.5, 0.2), (0.5, 2), (0, 0.5)):
        with pytest.raises(ValueError, match="must rise within 0 and 1"):
            train_model(converted, tmp_path / "other", sensitivity_range=wrong, **settings)
        with pytest.raises(ValueError, match="must rise within 0 and 1"):
            fit_routers(load_model(converted), torch.zeros(4, 8, dtype=torch.long), sensitivity_range=wrong)


def test_resume_continues_the_same_losses(converted, text_file, tmp_path, monkeypatch):
    settings = {"text": str(text_file), "max_tokens": 32 * 64, "block_size": 32, "batch_size": 4, "save_steps": 8}
    whole = train_model(converted, tmp_path / "whole", **settings)

    class Stopped(Exception):
        pass

    original = DynaMoETrainer.training_step

    def stop_later(self, *args, **kwargs):
        if self.state.global_step == 11:
            raise Stopped
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DynaMoETrainer, "training_step", stop_later)
    with pytest.raises(Stopped):
        train_model(converted, tmp_path / "parts", **settings)
    monkeypatch.setattr(DynaMoETrainer, "training_step", original)
    assert not (tmp_path / "parts").exists()
    with pytest.raises(ValueError, match="unfinished run"):
        train_model(converted, tmp_path / "parts", **settings)
    run = tmp_path / "parts.checkpoints" / "run.json"
    state = json.loads(run.read_text())
    assert state["seconds"] > 0
    run.write_text(json.dumps({**state, "seconds": 1000}))
    resumed = train_model(converted, tmp_path / "parts", resume=True, **settings)
    assert whole["seconds"] < 1000 < resumed["seconds"], "the parts of a run are added up"
    losses = [{entry["step"]: entry["loss"] for entry in record["history"]} for record in (whole, resumed)]
    assert len(losses[0]) > 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    ours, theirs = load_model(tmp_path / "parts").state_dict(), load_model(tmp_path / "whole").state_dict()
    for name, tensor in theirs.items():
        assert_close(name, ours[name], tensor)
    assert not (tmp_path / "parts.checkpoints").exists()
    record = json.loads((tmp_path / "whole" / "training.json").read_text())
    assert record["tokens"] == 32 * 64
    assert (tmp_path / "whole" / "conversion.json").exists()


@pytest.mark.parametrize("stop_at", [5, 9, 10], ids=["experts", "at the seam", "routers"])
def test_resume_in_either_phase(stop_at, converted, text_file, tmp_path, monkeypatch):
    """Experts take the first ten steps, routers the last five, in which nothing else moves."""
    settings = {
        "text": str(text_file),
        "max_tokens": 15 * 64,
        "block_size": 16,
        "batch_size": 4,
        "save_steps": 2,
        "choice_share": 1 / 3,
    }
    original, steps, experts = DynaMoETrainer.training_step, [], []

    class Stopped(Exception):
        pass

    def watched(self, model, *args, **kwargs):
        if len(steps) == stop_at and not experts:
            experts.append(None)
            raise Stopped
        steps.append(self.args.train_parts)
        if self.args.train_parts == "routers":
            experts.append(self.core.model.layers[0].mlp.up_proj.weight.detach().clone())
        return original(self, model, *args, **kwargs)

    whole = train_model(converted, tmp_path / "whole", **settings)
    monkeypatch.setattr(DynaMoETrainer, "training_step", watched)
    with pytest.raises(Stopped):
        train_model(converted, tmp_path / "parts", **settings)
    resumed = train_model(converted, tmp_path / "parts", resume=True, **settings)
    assert steps[-5:] == ["routers"] * 5
    assert [entry["step"] for entry in resumed["history"]] == [entry["step"] for entry in whole["history"]]
    assert resumed["history"][-1]["loss"] == pytest.approx(whole["history"][-1]["loss"], rel=1e-5)
    assert resumed["router_fit"] == whole["router_fit"]
    assert resumed["steps"] == whole["steps"] == 15 and resumed["tokens"] == 15 * 64
    ours, theirs = load_model(tmp_path / "parts").state_dict(), load_model(tmp_path / "whole").state_dict()
    for name, tensor in theirs.items():
        assert_close(name, ours[name], tensor)
    assert all(torch.equal(weight, experts[-1]) for weight in experts if weight is not None)
    assert_close("an expert", ours["model.layers.0.mlp.up_proj.weight"], experts[-1])


def test_every_checkpoint_is_a_model_folder(converted, text_file, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    original = shutil.rmtree

    def keep(path, **options):
        if "out.checkpoints" in Path(path).name:
            shutil.copytree(path, kept)
        original(path, **options)

    monkeypatch.setattr("dynamoe_hf.train.shutil.rmtree", keep)
    train_model(converted, tmp_path / "out", text=str(text_file), max_tokens=512, block_size=32, batch_size=4, save_steps=2)
    checkpoints = sorted(kept.glob("*/checkpoint-*"))
    assert checkpoints
    for checkpoint in checkpoints:
        assert (checkpoint / "modeling_dynamoe.py").exists()
        ours, theirs = (json.loads((folder / "conversion.json").read_text()) for folder in (checkpoint, converted))
        assert theirs.pop("weights") and ours == theirs, "other weights than those of the conversion"
        assert "Conversion: no record" not in (checkpoint / "README.md").read_text()
        assert load_model(checkpoint)(torch.tensor([[5, 6, 7]]), sensitivity=0.5).logits.isfinite().all()


def test_streamed_dataset(converted, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text('{"text": "some words of a document"}\n' * 100)
    record = train_model(
        converted, tmp_path / "out", dataset=str(tmp_path / "data"), max_tokens=256, block_size=32, batch_size=2
    )
    assert record["tokens"] == 256
    assert record["distinct_tokens"] is None


def test_chats_are_resumed_at_the_row(converted, tmp_path, monkeypatch):
    """Of a Parquet file of conversations, documents apart: whole or in two parts it is the same training."""
    model, tokenizer = tmp_path / "model", tiny_tokenizer()
    shutil.copytree(converted, model)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer.save_pretrained(model)
    chats = [
        [{"role": "user", "content": f"what is {i}?"}, {"role": "assistant", "content": f"{i} is {i * 'one '}"}]
        for i in range(40)
    ]
    datasets.Dataset.from_dict({"messages": chats}).to_parquet(tmp_path / "chats.parquet")
    settings = {"dataset": str(tmp_path / "chats.parquet"), "column": "messages", "documents_apart": True, "save_steps": 2,
                "max_tokens": 16 * 64, "block_size": 32, "batch_size": 2, "router_tokens": 0, "choice_share": 0, "route": "label", "router_loss_coef": 1.0}  # fmt: skip
    whole = train_model(model, tmp_path / "whole", **settings)
    assert whole["text"] == "chats.parquet", "no path of the machine"
    step, seen = DynaMoETrainer.training_step, []

    def stopping(self, network, inputs, *args):
        seen.append(inputs)
        if len(seen) == 6:
            raise Stopped
        return step(self, network, inputs, *args)

    monkeypatch.setattr(DynaMoETrainer, "training_step", stopping)
    with pytest.raises(Stopped):
        train_model(model, tmp_path / "parts", **settings)
    assert any((batch["position_ids"] == 0).sum() > len(batch["position_ids"]) for batch in seen), "documents begin in between"
    assert any((batch["labels"] == -100).any() for batch in seen)
    resumed = train_model(model, tmp_path / "parts", resume=True, **settings)
    assert [entry["loss"] for entry in resumed["history"]] == [entry["loss"] for entry in whole["history"]]
    with pytest.raises(ValueError, match="documents of a dataset, found none"):
        train_model(model, tmp_path / "text", documents_apart=True)


def test_bf16_in_the_stage(converted, text_file, tmp_path):
    record = train_model(
        converted, tmp_path / "out", text=str(text_file), max_tokens=256, block_size=32, batch_size=2, bf16=True
    )
    assert record["steps"] == 4
    assert math.isfinite(record["history"][-1]["loss"])


def test_the_stage_by_default(converted, text_file, tmp_path, monkeypatch):
    """Routers are fitted before the training and after it, still in between, and at the end they alone learn, by choosing."""
    fits, seen, step = [], [], DynaMoETrainer.training_step

    def routers(model):
        return {name: parameter.clone() for name, parameter in model.named_parameters() if ".router." in name}

    def fit(model, blocks, **options):
        found = fit_routers(model, blocks, **options)
        fits.append((options.get("route", "label"), routers(model)))
        return found

    def watched(self, *args, **kwargs):
        seen.append(routers(self.core))
        learns = {".router." in name for name, p in self.core.named_parameters() if p.requires_grad}
        assert learns == {len(seen) > 6}, "not routers, and then nothing else"
        return step(self, *args, **kwargs)

    monkeypatch.setattr(DynaMoETrainer, "training_step", watched)
    monkeypatch.setattr("dynamoe_hf.train.fit_routers", fit)
    record = train_model(converted, tmp_path / "out", text=str(text_file), max_tokens=256, block_size=32, batch_size=1)
    assert "\n# out\n" in (tmp_path / "out" / "README.md").read_text()
    assert [route for route, _ in fits] == ["label", "router"]
    assert record["router_fit"]["tokens"] == 256, "no more than the training reads"
    assert len(seen) == record["steps"] == 8
    for name, router in fits[0][1].items():
        assert all(torch.equal(router, routers[name]) for routers in seen[:6]), name
        assert torch.equal(fits[1][1][name], seen[6][name]), name
    assert any(not torch.equal(router, seen[7][name]) for name, router in seen[6].items())
    assert record["settings"]["choice_share"] == 0.2 and record["settings"]["width_loss_coef"] == 0.9
    assert record["router_fit"]["harm"] == record["settings"]["harm"] == "token"
    assert record["history"][-1]["router_loss"] == 0
    assert "router_accuracy" not in record["history"][-1]
    assert 0.25 < record["history"][-1]["mean_width"] < 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: run `pytest -m gpu` where there is one")
def test_stages_on_a_gpu(dense_folder, text_file, token_ids, tmp_path):
    """Each stage computes there unless it is told not to; what it writes loads anywhere, and says the same."""
    converted, adapted, trained = (tmp_path / name for name in ("converted", "adapted", "trained"))
    text = {"text": text_file, "block_size": 64}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    convert_model(dense_folder, converted, max_tokens=1024, **text)
    assert torch.cuda.max_memory_allocated() > before
    adapt_model(converted, adapted, max_tokens=2048, bf16=True, **text)
    train_model(adapted, trained, max_tokens=4096, bf16=True, **text)
    model = load_model(trained)
    assert model.device.type == "cuda" and load_model(trained, device_map="cpu").device.type == "cpu"
    on_cpu = load_model(trained, device_map="cpu")(token_ids, sensitivity=0.5).logits
    assert_close("logits", model(token_ids.cuda(), sensitivity=0.5).logits.cpu(), on_cpu, atol=1e-3)
    baselines = ("static", "random", "label")
    entries = evaluate_model(
        trained, sensitivity=[0.4, 1.0], base=dense_folder, baselines=baselines, max_tokens=1024, batch_size=2, **text
    )
    assert all(math.isfinite(entry["baselines"][kind]["ratio_to_dense"]) for entry in entries for kind in baselines)
    loaded, tokenizer = load_dense(dense_folder)
    assert loaded.device.type == "cuda"
    with contextlib.suppress(ValueError):  # tiny routers may reach no budget, but where they run is the same
        calibrate_budgets(trained, budgets=[0.6], max_tokens=1024, **text)
    assert len(token_difficulty(model, tokenizer, "Some words.", 0.5)[0]) == 11
    assert continue_text(model, tokenizer, "Some words", 4)


def test_lora_is_merged(converted, text_file, tmp_path):
    pytest.importorskip("peft")
    train_model(
        converted,
        tmp_path / "out",
        text=str(text_file),
        train_parts="lora",
        max_tokens=512,
        block_size=32,
        batch_size=4,
        lora_rank=2,
    )
    assert not any("lora" in name for name in load_model(tmp_path / "out").state_dict())


def test_experts_are_trained_through_a_ramp(converted, text_file, tmp_path, monkeypatch):
    """The one that is asked for, else that of the folder: in every step, and in what is written."""
    seen, kept = set(), sparsity.keep_large

    def watched(values, threshold, ramp):
        seen.add(ramp)
        return kept(values, threshold, ramp)

    monkeypatch.setattr(sparsity, "keep_large", watched)
    settings = {"text": str(text_file), "max_tokens": 512, "block_size": 32, "choice_share": 0.0}
    for source, asked, expected in ((converted, None, 0.0), (converted, 0.25, 0.25), (tmp_path / "0.25", None, 0.25)):
        seen.clear()
        out = tmp_path / (f"{asked}" if asked else f"kept {expected}")
        record = train_model(source, out, threshold_ramp=asked, **settings)
        assert load_model(out).config.threshold_ramp == record["settings"]["threshold_ramp"] == expected
        assert seen == {expected}
    with pytest.raises(ValueError, match=r"`threshold_ramp` must be in \[0, 1\), found 1"):
        train_model(converted, tmp_path / "out", threshold_ramp=1, **settings)


def test_bad_settings(converted, tmp_path):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], found 2"):
        train_model(converted, tmp_path / "out", choice_share=2)
    with pytest.raises(ValueError, match="need a price of width, found width_loss_coef=0 and choice_share=0.2"):
        train_model(converted, tmp_path / "out", width_loss_coef=0)
    with pytest.raises(ValueError, match="nothing to resume"):
        train_model(converted, tmp_path / "out", resume=True)
    with pytest.raises(FileExistsError):
        train_model(converted, converted)
    assert tiny_tokenizer().eos_token_id == 2


RECIPES = {
    "recipe": ({}, [("layers", 8, "label"), ("routers", 2, "router")]),
    "experts alone": ({"choice_share": 0.0, "router_tokens": 0}, [("layers", 10, None)]),
    "a fit at the end": ({"choice_share": 0.0}, [("layers", 10, "label"), ("routers", 0, "router")]),
    "labels": ({"route": "label", "train_parts": "mlp"}, [("mlp", 8, None), ("routers", 2, "label")]),
    "routers": ({"train_parts": "routers"}, [("routers", 2, "label")]),
    "choosing alone": ({"choice_share": 1.0}, [("routers", 10, "label")]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_phases_of_the_recipe(name):
    settings, expected = RECIPES[name]
    phases = train_recipe(TrainArguments(**{"choice_share": 0.2, **settings}), 10)
    assert [(phase.name, phase.steps, phase.fit) for phase in phases] == expected
    assert all(phase.settings["width_loss_coef"] == (0.9 if phase.name == "routers" else 0) for phase in phases)
    assert all((phase.settings["train_parts"] == "routers") == (phase.name == "routers") for phase in phases)


def test_a_training_on_routers_that_know_nothing_is_refused(converted, text_file, tmp_path):
    settings = {"text": str(text_file), "max_tokens": 512, "block_size": 16, "router_tokens": 0}
    with pytest.raises(
        ValueError, match=r"routers that know nothing: found route=router.* `--route label --router-loss-coef 1`"
    ):
        train_model(converted, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


class Stopped(Exception):
    """A run that was interrupted."""


short_fit = partial(fit_routers, steps=20)


def stop_at(patch, place):
    """From `place` on, a run stops: a step of a phase, before or after one of its fits, or while its second model is written."""
    kind, number = place
    counts = {"step": 0, "fit": 0, "save": 0}

    def watched(kind_of_call, original, after=False):
        def call(*args, **kwargs):
            counts[kind_of_call] += 1
            result = original(*args, **kwargs) if after else None
            if place == (kind_of_call, counts[kind_of_call]):
                raise Stopped
            return result if after else original(*args, **kwargs)

        return call

    patch.setattr(DynaMoETrainer, "training_step", watched("step", DynaMoETrainer.training_step))
    patch.setattr("dynamoe_hf.train.fit_routers", watched("fit", short_fit))
    patch.setattr("dynamoe_hf.train.Run.save", watched("save", Run.save, after=kind == "save"))


# One fit and five steps where routers alone are trained, else two fits with ten steps between them and five after them.
PLACES = [
    ("save", 1),
    ("step", 1),
    ("step", 6),
    ("step", 10),
    ("save", 2),
    ("fit", 2),
    ("save", 3),
    ("step", 11),
    ("step", 14),
]
STOPS = [(parts, place) for parts in ("layers", "lora") for place in PLACES]
STOPS += [("routers", place) for place in (("save", 1), ("step", 1), ("step", 4))]


@pytest.mark.parametrize(
    ("train_parts", "place"), STOPS, ids=lambda value: value if isinstance(value, str) else "{} {}".format(*value)
)
def test_resume_anywhere_gives_the_same_weights(train_parts, place, wholes, converted, tmp_path, monkeypatch):
    """After a fit, in a phase before and after its first checkpoint, between phases, and in a fit: bit for bit, and the same losses."""
    settings, whole = wholes(train_parts)
    with monkeypatch.context() as patch:
        stop_at(patch, place)
        with pytest.raises(Stopped):
            train_model(converted, tmp_path / "parts", **settings)
    assert not (tmp_path / "parts").exists()
    monkeypatch.setattr("dynamoe_hf.train.fit_routers", short_fit)
    resumed = train_model(converted, tmp_path / "parts", resume=True, **settings)
    theirs = json.loads((whole / "training.json").read_text())
    assert {**resumed, "seconds": 0} == {**theirs, "seconds": 0}
    assert same_weights(tmp_path / "parts", whole)
    assert not (tmp_path / "parts.checkpoints").exists()


def same_weights(one, other):
    ours, theirs = (load_model(folder).state_dict() for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def wholes(converted, text_file, tmp_path_factory):
    """Settings, and the folder of a run that was not interrupted, for what is trained."""
    root, runs = tmp_path_factory.mktemp("wholes"), {}

    def whole(train_parts):
        settings = {"text": str(text_file), "max_tokens": 15 * 64, "block_size": 16, "batch_size": 4, "save_steps": 2}
        settings |= {"choice_share": 1 / 3, "train_parts": train_parts, "lora_rank": 2}
        if train_parts not in runs:
            runs[train_parts] = root / train_parts
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("dynamoe_hf.train.fit_routers", short_fit)
                train_model(converted, runs[train_parts], **settings)
        return settings, runs[train_parts]

    return whole


def test_an_adaptation_is_resumed_too(converted, text_file, tmp_path, monkeypatch):
    settings = {"text": str(text_file), "max_tokens": 6 * 64, "block_size": 16, "batch_size": 4, "save_steps": 2}
    whole = adapt_model(converted, tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        stop_at(patch, ("step", 4))
        with pytest.raises(Stopped):
            adapt_model(converted, tmp_path / "parts", **settings)
    resumed = adapt_model(converted, tmp_path / "parts", AdaptArguments(**settings), resume=True)
    assert resumed["history"] == whole["history"] and whole["settings"]["sensitivity_range"] == [1, 1]
    assert same_weights(tmp_path / "parts", tmp_path / "whole")


def test_what_is_not_resumed(converted, text_file, tmp_path, monkeypatch):
    """A run with other settings, one of the old layout, and one that ended before it kept anything, which begins anew."""
    settings = {"text": str(text_file), "max_tokens": 6 * 64, "block_size": 16, "batch_size": 4, "save_steps": 2}
    with monkeypatch.context() as patch:
        stop_at(patch, ("step", 1))
        with pytest.raises(Stopped):
            train_model(converted, tmp_path / "out", **settings)
    changed = {**settings, "learning_rate": 1e-3, "seed": 1}
    with pytest.raises(
        ValueError, match=r"another learning_rate \(0.0002 before, 0.001 now\), seed \(0 before, 1 now\). Resume it with"
    ):
        train_model(converted, tmp_path / "out", resume=True, **changed)
    old = tmp_path / "old.checkpoints"
    (old / "checkpoint-8").mkdir(parents=True)
    for resume in (False, True):
        with pytest.raises(ValueError, match="of an older version, which this one cannot resume: found checkpoint-8"):
            train_model(converted, tmp_path / "old", resume=resume, **settings)
    assert (old / "checkpoint-8").is_dir()
    (tmp_path / "new.checkpoints" / "0-adapt" / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(ValueError, match="nothing to resume"):
        adapt_model(converted, tmp_path / "new", resume=True, **settings)
    assert adapt_model(converted, tmp_path / "new", **settings)["steps"] == 6
