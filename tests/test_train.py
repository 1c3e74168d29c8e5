"""Training: what moves, what is logged, and that batching, resuming and LoRA change nothing they should not."""

import contextlib
import json
import math
import shutil

import pytest
import torch
from conftest import FAMILIES, tiny_dense, tiny_tokenizer
from reference import assert_close, causal_losses, gates, relative_error
from transformers import Trainer, TrainingArguments

from dynamoe_hf import DynaMoEForCausalLM
from dynamoe_hf.calibrate import calibrate_budgets
from dynamoe_hf.convert import convert_model, load_dense, scale_difficulty
from dynamoe_hf.evaluate import evaluate_model
from dynamoe_hf.folder import load_model
from dynamoe_hf.generate import continue_text
from dynamoe_hf.modeling.mlp_backends import block_sizes
from dynamoe_hf.modeling.routing import ProfileRouter
from dynamoe_hf.report import token_difficulty
from dynamoe_hf.train import (
    ROUTER_TEMPERATURE,
    DynaMoETrainer,
    DynaMoETrainingArguments,
    _collect,
    adapt_model,
    choose_trainable,
    fit_router,
    fit_routers,
    lora_config,
    train_model,
)


@pytest.fixture(scope="module")
def converted(dense_folder, tmp_path_factory):
    """A converted tiny Llama. Treat it as read-only."""
    out = tmp_path_factory.mktemp("converted") / "model"
    convert_model(dense_folder, out, max_tokens=512, block_size=64)
    return out


def tiny_model(**settings):
    return DynaMoEForCausalLM.from_dense(tiny_dense(), error_weights=[0.05, 0.02], **settings)


def rows(count=8, length=16, seed=0, ignored=True):
    """Training examples of which some positions do not count, differently in each."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for index in range(count):
        ids = torch.randint(3, 128, (length,), generator=generator)
        labels = ids.clone()
        if ignored:
            labels[: index % 5] = -100
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def train(model, folder, trainer_class=DynaMoETrainer, examples=None, **settings):
    settings = {"max_steps": 1, "per_device_train_batch_size": 8, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
                "learning_rate": 1e-3, "disable_tqdm": True, "use_cpu": True, **settings}  # fmt: skip
    arguments = DynaMoETrainingArguments if trainer_class is DynaMoETrainer else TrainingArguments
    args = arguments(output_dir=str(folder), **settings)
    trainer = trainer_class(model=model, args=args, train_dataset=examples or rows())
    trainer.train()
    return trainer


@pytest.mark.parametrize("parts", ["routers", "mlp", "layers", "all"])
def test_exactly_the_chosen_parts_move(parts, tmp_path):
    model = tiny_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train(model, tmp_path, train_parts=parts, lm_loss_coef=0.2, max_steps=3)
    for name, parameter in model.named_parameters():
        meant = parts == "all" or ".router." in name or parts == "mlp" and ".mlp." in name
        meant |= parts == "layers" and "embed_tokens" not in name and "lm_head" not in name
        moved = not torch.equal(before[name], parameter)
        assert moved == meant, f"{name} {'moved' if moved else 'did not move'} with train_parts={parts!r}"


@pytest.mark.parametrize("route", ["label", "router", "random"])
@pytest.mark.parametrize("teacher", ["frozen", "self", "none"])
def test_all_parts_are_logged(route, teacher, tmp_path):
    trainer = train(tiny_model(), tmp_path, route=route, teacher=teacher, lm_loss_coef=0.2, hidden_loss_coef=3.0, max_steps=2)
    log = trainer.state.log_history[0]
    names = {"loss", "lm_loss", "router_loss", "kd_loss", "hidden_loss", "mean_width", "router_accuracy"} | {
        f"share_expert_{e}" for e in range(4)
    }
    assert names <= set(log)
    assert sum(log[f"share_expert_{e}"] for e in range(4)) == pytest.approx(1, abs=1e-3)
    width = sum(log[f"share_expert_{e}"] * (e + 1) / 4 for e in range(4))
    assert log["mean_width"] == pytest.approx(width, abs=1e-3)
    parts = 0.2 * log["lm_loss"] + log["router_loss"] + log["kd_loss"] + 3 * log["hidden_loss"]
    assert log["loss"] == pytest.approx(parts, rel=1e-3)
    assert (log["kd_loss"] > 0) == (log["hidden_loss"] > 0) == (teacher != "none")


@pytest.mark.parametrize(("size", "steps"), [(4, 2), (2, 4), (1, 8)], ids=["4x2", "2x4", "1x8"])
@pytest.mark.parametrize("trainer_class", [DynaMoETrainer, Trainer], ids=["ours", "plain"])
def test_accumulation_gives_the_update_of_one_large_batch(size, steps, trainer_class, tmp_path):
    settings = {"max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 1.0}
    if trainer_class is DynaMoETrainer:
        settings |= {"logit_fraction": 1.0, "lm_loss_coef": 0.2, "sensitivity_range": [0.5, 0.5]}
    results = []
    for batch, accumulation in ((8, 1), (size, steps)):
        model = tiny_model(train_sensitivity=[0.5, 0.5])
        trainer = train(
            model,
            tmp_path,
            trainer_class,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            **settings,
        )
        log = trainer.state.log_history[0]
        results.append((model.state_dict(), {k: v for k, v in log.items() if k.endswith("loss") or k == "grad_norm"}))
    (large, large_log), (small, small_log) = results
    assert small_log == pytest.approx(large_log, rel=1e-3)
    for name, tensor in large.items():
        assert_close(name, small[name], tensor, atol=2e-5, rtol=1e-3)


def test_plain_trainer_trains_router_and_experts(tmp_path):
    model = tiny_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = train(model, tmp_path, Trainer, max_steps=60, learning_rate=3e-3)
    still = [name for name, parameter in model.named_parameters() if torch.equal(before[name], parameter)]
    assert not still, f"{still} did not move"
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


def test_router_learns_the_difficulty_in_training(tmp_path):
    model = tiny_model()
    trainer = train(
        model, tmp_path, train_parts="routers", max_steps=150, examples=rows(ignored=False), router_learning_rate=1e-2
    )
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["router_accuracy"] > logs[0]["router_accuracy"] + 0.2, (logs[0], logs[-1])
    assert logs[-1]["router_accuracy"] > 0.6


@pytest.mark.parametrize("router_type", ["profile", "argmax"])
def test_fitted_routers_beat_the_best_constant(router_type):
    model = tiny_model(router_type=router_type)
    blocks = torch.randint(3, 128, (200, 16), generator=torch.Generator().manual_seed(0))
    model.config.error_weights, model.config.train_sensitivity = scale_difficulty(model, blocks[:40])
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if ".router." not in name}
    whole = fit_routers(model, blocks, steps=300, harm="layer")
    assert whole["router_agreement"] > whole["label_frequency"] + 0.15, whole
    assert whole["tokens"] == 3200
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in before.items())
    # One layer at a time, as where memory is short, must do as well.
    by_layer = fit_routers(model, blocks, steps=300, harm="layer", cache_bytes=1)
    assert by_layer["router_agreement"] == pytest.approx(whole["router_agreement"], abs=0.06)
    assert fit_routers(model, blocks, steps=1, sensitivity_range=(1, 1))["label_frequency"] == 1, (
        "at 1 every label is the widest"
    )


def test_training_routers_alone_leaves_the_rest(converted, text_file, tmp_path):
    record = train_model(converted, tmp_path / "out", text=str(text_file), train="routers", max_tokens=2048, block_size=32)
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


def test_sampled_logits_are_unbiased(tmp_path):
    """The mean of many quarter samples is the loss over all positions."""
    model, totals = tiny_model(), {}
    for fraction, repeats in ((1.0, 1), (0.25, 200)):
        args = DynaMoETrainingArguments(str(tmp_path), report_to="none", use_cpu=True, logit_fraction=fraction, lm_loss_coef=1.0,
                                        router_loss_coef=0.0, sensitivity_range=[0.5, 0.5])  # fmt: skip
        trainer = DynaMoETrainer(model=model.train(), args=args, train_dataset=rows())
        batch = {name: torch.stack([row[name] for row in rows()]) for name in ("input_ids", "labels")}
        with torch.no_grad():
            totals[fraction] = sum(trainer.compute_loss(model, batch).item() for _ in range(repeats)) / repeats
    assert totals[0.25] == pytest.approx(totals[1.0], rel=0.02)


def loss_and_gradients(family, folder, checkpointing=False, **settings):
    """
    A trainer, on random routes if not told otherwise, its batch, the loss and the gradients. The random state is left where the routes were
    drawn, the model without gradients: a reference can follow at once.
    """
    model = DynaMoEForCausalLM.from_dense(
        tiny_dense(family, residual_dropout=0.0) if family == "starcoder2" else tiny_dense(family)
    )
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.router.output.weight)
    settings = {
        "report_to": "none",
        "use_cpu": True,
        "train_parts": "all",
        "router_loss_coef": 0.0,
        "route": "random",
        **settings,
    }
    args = DynaMoETrainingArguments(str(folder), **settings)
    trainer = DynaMoETrainer(model=model.train(), args=args, train_dataset=rows())
    batch = {name: torch.stack([row[name] for row in rows(4)]) for name in ("input_ids", "labels")}
    if checkpointing:
        model.gradient_checkpointing_enable()
    torch.manual_seed(0)
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    torch.manual_seed(0)
    torch.randperm(4), torch.rand(4), torch.rand(15)  # what the trainer draws before the routes: sensitivities and positions
    return trainer, batch, loss, gradients


@pytest.mark.parametrize("logit_rows", [8, 24, 10**6])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_in_chunks_equal_those_of_whole_logits(family, logit_rows, tmp_path, monkeypatch):
    """Outputs and gradients, whatever the head does after its product, and with the teacher's logits in chunks too."""
    monkeypatch.setattr("dynamoe_hf.train.LOGIT_ROWS", logit_rows)
    settings = {"logit_fraction": 1.0, "lm_loss_coef": 0.3, "kd_loss_coef": 0.7}
    trainer, batch, loss, gradients = loss_and_gradients(family, tmp_path, **settings)
    model = trainer.model
    target = trainer.teacher(batch["input_ids"], force_expert=3).logits
    with model.routing(route="random", sensitivity=0.5, needs_labels=True, records=[]):
        lm_loss, kd_loss = causal_losses(model(batch["input_ids"]).logits, target, batch["labels"])
    expected = (0.3 * lm_loss + 0.7 * kd_loss) / (batch["labels"][:, 1:] != -100).sum()
    expected.backward()
    assert_close("loss", loss, expected)
    assert kd_loss > 0
    for name, parameter in model.named_parameters():
        if ".router." not in name:
            assert_close(name, gradients[name], parameter.grad, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_loss_is_that_of_the_layers_outputs(family, checkpointing, tmp_path):
    """Value and gradients, beside hidden states that transformers gives; positions without a label do not count."""
    settings = {"kd_loss_coef": 0.0, "hidden_loss_coef": 2.0}
    trainer, batch, loss, gradients = loss_and_gradients(family, tmp_path, checkpointing, **settings)
    model = trainer.model

    def layer_states(model, **routing):
        """What transformers gives is normed after the last layer, so that one is what the norm reads."""
        last = []
        with model.model.norm.register_forward_pre_hook(lambda module, args: last.append(args[0])):
            states = model(batch["input_ids"], output_hidden_states=True, **routing).hidden_states
        return (*states[1:-1], *last)

    with torch.no_grad():
        target = layer_states(trainer.teacher, force_expert=3)
    with model.routing(route="random", sensitivity=0.5, needs_labels=True, records=[]):
        states = layer_states(model)
    mask = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
    expected = 2 * relative_error(states, target, mask)
    expected.backward()
    assert_close("loss", loss, expected)
    assert loss > 0
    for name, parameter in model.named_parameters():
        if ".router." not in name:  # head and last norm come after the last layer
            reference = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert_close(name, gradients[name], reference, atol=1e-4)


def test_gates_are_the_routers_choice_with_the_gradient_of_a_sigmoid():
    router = ProfileRouter(16, 8, 4)
    logits = (3 * torch.randn(2, 5, 3)).cumsum(-1).requires_grad_()
    sensitivity = torch.tensor([0.3, 0.7])
    torch.manual_seed(1)
    found = router.gates(logits, sensitivity, 0.5)
    (slope,) = torch.autograd.grad(found.sum(), logits)
    torch.manual_seed(1)
    noise = 0.5 * torch.logit(torch.rand(2, 5, 1), eps=1e-4)
    for row in range(2):
        for token in range(5):
            place = (row, token)
            expected, expected_slope = gates(logits.detach()[place], noise[place].item(), sensitivity[row].item(), 0.5)
            assert_close("gates", found.detach()[place], expected)
            assert_close("their gradient", slope[place], expected_slope)
    assert {0.0, 1.0} == set(found.detach().round().unique().tolist())
    cold = router.gates(logits, sensitivity, 1e-6).detach().round().long().sum(-1) - 1
    assert torch.equal(cold, router.choose(logits, sensitivity)), "without noise it is the choice of inference"
    assert torch.equal(router.gates(logits, 1.0, 0.5).detach(), torch.ones(2, 5, 4)), "at sensitivity 1 nothing is left out"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_routers_get_the_gradient_of_what_their_gates_let_through(family, checkpointing, tmp_path):
    """The losses of a training step, and their gradients, beside a model whose hidden activations are multiplied by the gates by hand."""
    settings = {"width_loss_coef": 0.7, "route": "router", "sensitivity_range": [0.5, 0.5], "logit_fraction": 1.0}
    trainer, batch, loss, gradients = loss_and_gradients(family, tmp_path, checkpointing, **settings)
    model, widths = trainer.model, []

    def by_hand(mlp, args, output):
        x, (rows, length) = args[0], args[0].shape[:2]
        found = mlp.router.gates(mlp.router(x), torch.full((rows,), 0.5), ROUTER_TEMPERATURE)
        factor = torch.cat(
            [found[..., e : e + 1].expand(rows, length, size) for e, size in enumerate(block_sizes(mlp.widths))], -1
        )
        widths.append(factor.mean(-1))
        return mlp.down_linear(mlp.hidden(x) * factor)

    target = trainer.teacher(batch["input_ids"], force_expert=3).logits
    model.gradient_checkpointing_disable()  # it would run layers again after the hooks are gone
    hooks = [layer.mlp.register_forward_hook(by_hand) for layer in model.model.layers]
    logits = model(batch["input_ids"], force_expert=3).logits
    for hook in hooks:
        hook.remove()
    _, kd_loss = causal_losses(logits, target, batch["labels"])
    mask = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
    expected = kd_loss / mask.sum() + 0.7 * torch.stack(widths).mean(0)[mask].mean()  # at 0.5 the price is 1
    expected.backward()
    assert_close("loss", loss, expected)
    routers = [name for name in gradients if ".router." in name]
    assert routers and all(gradients[name].abs().sum() > 0 for name in routers)
    for name, parameter in model.named_parameters():
        assert_close(name, gradients[name], parameter.grad, atol=1e-4)


def test_routers_that_choose_spend_less_where_width_costs_more(tmp_path):
    widths = {}
    for price in (0.01, 100.0):
        model = tiny_model()
        settings = {"width_loss_coef": price, "route": "router", "router_loss_coef": 0.0, "sensitivity_range": [0.5, 0.5]}
        settings["router_learning_rate"] = 2e-2
        trainer = train(model, tmp_path, train_parts="routers", max_steps=60, **settings)
        widths[price] = [entry["mean_width"] for entry in trainer.state.log_history if "mean_width" in entry]
    assert widths[0.01][-1] > widths[0.01][0] + 0.1, "nearly free, so what it adds to the model's words decides"
    assert widths[100.0][-1] < widths[100.0][0] - 0.1
    assert widths[100.0][-1] == pytest.approx(0.25, abs=0.02)


def test_full_width_stays_where_distilled(tmp_path):
    """Distillation from the frozen full width pulls the narrow experts towards it."""
    model = tiny_model()
    ids = torch.stack([row["input_ids"] for row in rows(ignored=False)])
    target = model(ids).logits.softmax(-1)

    def distance():
        with torch.no_grad():
            narrow = model.eval()(ids, force_expert=1).logits.log_softmax(-1)
        return torch.nn.functional.kl_div(narrow, target, reduction="batchmean").item()

    before = distance()
    train(model, tmp_path, max_steps=80, examples=rows(ignored=False), router_loss_coef=0.0, sensitivity_range=[0.2, 0.5])
    assert distance() < 0.7 * before


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
    clock = tmp_path / "parts.checkpoints" / "clock.json"
    assert json.loads(clock.read_text())["seconds"] > 0
    clock.write_text('{"seconds": 1000}')
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
        if str(path).endswith(".checkpoints"):
            shutil.copytree(path, kept)
        original(path, **options)

    monkeypatch.setattr("dynamoe_hf.train.shutil.rmtree", keep)
    train_model(converted, tmp_path / "out", text=str(text_file), max_tokens=512, block_size=32, batch_size=4, save_steps=2)
    checkpoints = sorted(kept.glob("checkpoint-*"))
    assert checkpoints
    for checkpoint in checkpoints:
        assert (checkpoint / "modeling_dynamoe.py").exists()
        assert (checkpoint / "conversion.json").read_text() == (converted / "conversion.json").read_text()
        assert "Conversion: no record" not in (checkpoint / "README.md").read_text()
        assert load_model(checkpoint)(torch.tensor([[5, 6, 7]]), sensitivity=0.5).logits.isfinite().all()


def test_lora(converted, text_file, tmp_path, token_ids):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), lora_config(4))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train(model, tmp_path, train_parts="lora", max_steps=3, lm_loss_coef=0.2, learning_rate=1e-2)
    for name, parameter in model.named_parameters():
        meant = "lora_" in name or "modules_to_save" in name
        moved = not torch.equal(before[name], parameter)
        assert moved == meant, f"{name} {'moved' if moved else 'did not move'}"
    model.eval()
    wrapped = {s: model(token_ids, sensitivity=s).logits for s in (0.4, 0.6, 1.0)}
    forced = model(token_ids, force_expert=1).logits
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter").eval()
    merged = model.merge_and_unload()
    assert_close("forced", merged(token_ids, force_expert=1).logits, forced, atol=1e-4)
    for sensitivity, expected in wrapped.items():  # masks while wrapped, prefixes after merging
        assert_close("reloaded", again(token_ids, sensitivity=sensitivity).logits, expected, atol=1e-4)
        assert_close("merged", merged(token_ids, sensitivity=sensitivity).logits, expected, atol=1e-4)
    train_model(
        converted,
        tmp_path / "out",
        text=str(text_file),
        train="lora",
        max_tokens=512,
        block_size=32,
        batch_size=4,
        lora_rank=2,
    )
    assert not any("lora" in name for name in load_model(tmp_path / "out").state_dict())


def test_streamed_dataset(converted, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text('{"text": "some words of a document"}\n' * 100)
    record = train_model(
        converted, tmp_path / "out", dataset=str(tmp_path / "data"), max_tokens=256, block_size=32, batch_size=2
    )
    assert record["tokens"] == 256
    assert record["distinct_tokens"] is None


def test_activation_checkpointing_gives_the_same_losses(tmp_path):
    losses = []
    for checkpointing in (False, True):
        trainer = train(tiny_model(), tmp_path, max_steps=4, gradient_checkpointing=checkpointing, lm_loss_coef=0.2)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_bf16_autocast(tmp_path):
    """Weights stay float32; the products of the student, of the teacher and of the head are in bfloat16."""
    model, dtypes = tiny_model(), {}
    args = DynaMoETrainingArguments(str(tmp_path), bf16=True, use_cpu=True, report_to="none", max_steps=2, logging_steps=1)
    trainer = DynaMoETrainer(model=model, args=args, train_dataset=rows())
    watched = {"student": model.model.layers[0].mlp.down_proj, "teacher": trainer.teacher.model.layers[0].mlp.down_proj,
               "head": model.lm_head, "teacher's head": trainer.teacher.lm_head}  # fmt: skip
    for name, module in watched.items():
        module.register_forward_hook(lambda module, args, output, name=name: dtypes.setdefault(name, set()).add(output.dtype))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0
    assert dtypes == {name: {torch.bfloat16} for name in watched}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_bf16_in_the_stage(converted, text_file, tmp_path):
    record = train_model(
        converted, tmp_path / "out", text=str(text_file), max_tokens=256, block_size=32, batch_size=2, bf16=True
    )
    assert record["steps"] == 4
    assert math.isfinite(record["history"][-1]["loss"])


def test_token_harm_is_the_gradient_of_the_loss():
    """The weights of tokens are the squared gradients at each MLP's output, and collecting them leaves the parameters alone."""
    model, blocks = tiny_model().eval(), torch.randint(3, 128, (3, 16), generator=torch.Generator().manual_seed(0))
    model.requires_grad_(True)
    model.config.train_sensitivity = [0.5, 0.5]
    inputs, profiles, weights, _ = _collect(model, 0, 2, blocks, "token", "label", model.config.train_sensitivity, bf16=False)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    outputs = []
    hooks = [layer.mlp.register_forward_hook(lambda *args: outputs.append(args[-1])) for layer in model.model.layers]
    with model.routing(route="label", sensitivity=0.5, needs_labels=True, records=[]):
        logits = model(blocks).logits
    for hook in hooks:
        hook.remove()
    lm_loss, _ = causal_losses(logits, logits, blocks)
    for gradient, weight in zip(torch.autograd.grad(lm_loss, outputs), weights):
        expected = gradient.square().sum(-1).flatten()
        assert_close("weights", weight, expected / expected.mean(), rtol=1e-4)
    plain_inputs, plain_profiles, nothing, _ = _collect(
        model, 0, 2, blocks, "layer", "label", model.config.train_sensitivity, bf16=False
    )
    assert nothing == [None, None]
    for kept, plain in zip(inputs + profiles, plain_inputs + plain_profiles):
        assert torch.equal(kept, plain)


def test_a_router_predicts_the_mean_harm():
    """Two kinds of tokens, whose weights are as likely to be small as large: what is predicted is each kind's mean, not its middle."""
    torch.manual_seed(0)
    kind = torch.randint(2, (4000,))
    x = torch.randn(4000, 8) * 0.1 + kind[:, None]
    weights = torch.distributions.Exponential(1.0).sample((4000,)) * (1 + 3 * kind)
    profile = torch.tensor([0.5, 0.8, 1.0]).expand(4000, 3)  # harms of 1 and a quarter
    router = ProfileRouter(8, 16, 3)
    fit_router(router, x, profile, torch.full((4000,), 0.5), 400, 512, 2e-2, weights)
    with torch.no_grad():
        predicted = (-router(x)).exp()
    for index in range(2):
        mean = weights[kind == index].mean().item()
        assert predicted[kind == index].mean(0).tolist() == pytest.approx([mean, mean / 4], rel=0.1)


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


@pytest.mark.parametrize(
    ("settings", "harm", "message"),
    [({}, "best", "`harm` is unknown: found 'best'"), ({"similarity": "cosine"}, "token", "weighted by the loss, found 'profile'"),
     ({"router_type": "argmax"}, "token", "found 'argmax'")],
)  # fmt: skip
def test_harm_that_a_model_does_not_have(settings, harm, message):
    with pytest.raises(ValueError, match=message):
        fit_routers(tiny_model(**settings), torch.randint(3, 128, (4, 16)), harm=harm)


@pytest.mark.parametrize(
    ("settings", "harm"), [({}, "token"), ({"similarity": "cosine"}, "layer"), ({"router_type": "argmax"}, "layer")]
)
def test_harm_by_default(settings, harm):
    """By token where the model knows it, and with everything frozen too, as after LoRA."""
    model = tiny_model(**settings).requires_grad_(False)
    before = model.state_dict()["model.layers.0.mlp.router.output.weight"].clone()
    assert fit_routers(model, torch.randint(3, 128, (4, 16)), steps=2)["harm"] == harm
    assert not torch.equal(model.state_dict()["model.layers.0.mlp.router.output.weight"], before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: run `pytest -m gpu` where there is one")
@pytest.mark.parametrize("bf16", [False, True])
def test_training_on_a_gpu(bf16, tmp_path):
    trainer = train(tiny_model(), tmp_path, max_steps=30, bf16=bf16, use_cpu=False, learning_rate=3e-3)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


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


def test_bad_settings(converted, tmp_path):
    for settings, message in (({"train_parts": "half"}, "`train_parts` is unknown"), ({"teacher": "x"}, "`teacher` is unknown"),
                              ({"route": "best"}, "`route` is unknown"), ({"logit_fraction": 0}, "must be in"),
                              ({"label_smoothing_factor": 0.1}, "does not go with"),
                              ({"width_loss_coef": 1.0}, 'needs route="router", found \'label\'')):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            DynaMoETrainingArguments(str(tmp_path), **settings)
    with pytest.raises(ValueError, match="found LlamaForCausalLM"):
        DynaMoETrainer(model=tiny_dense(), args=DynaMoETrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="needs adapters"):
        DynaMoETrainer(model=tiny_model(), args=DynaMoETrainingArguments(str(tmp_path), train_parts="lora", use_cpu=True))
    no_router_loss = DynaMoETrainingArguments(str(tmp_path), train_parts="routers", router_loss_coef=0, use_cpu=True)
    with pytest.raises(ValueError, match="needs a router loss, found router_loss_coef=0"):
        DynaMoETrainer(model=tiny_model(), args=no_router_loss)
    chooses = DynaMoETrainingArguments(str(tmp_path), width_loss_coef=1.0, route="router", use_cpu=True)
    with pytest.raises(ValueError, match="needs profile routers, found router_type='argmax'"):
        DynaMoETrainer(model=tiny_model(router_type="argmax"), args=chooses)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], found 2"):
        train_model(converted, tmp_path / "out", choice_share=2)
    with pytest.raises(ValueError, match="nothing to resume"):
        train_model(converted, tmp_path / "out", resume=True)
    with pytest.raises(FileExistsError):
        train_model(converted, converted)
    choose_trainable(model := tiny_model(), "routers")
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"router"}
    assert tiny_tokenizer().eos_token_id == 2
