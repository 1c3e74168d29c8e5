"""`DynaMoETrainer`: what moves, what is logged, and that neither batching nor chunks change the losses."""

import json
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, tiny_config, tiny_dense, tiny_dynamoe, tiny_tokenizer
from peft import PeftModel, get_peft_model
from reference import assert_close, causal_losses, gates, relative_error
from training import LABELS, rows, tiny_model, train
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments, default_data_collator

from dynamoe_hf import DynaMoEForCausalLM, DynaMoETrainer, DynaMoETrainingArguments, fit_routers, lora_config
from dynamoe_hf.folder import load_model
from dynamoe_hf.integrity import differing
from dynamoe_hf.losses import relative_error as errors_of
from dynamoe_hf.modeling.mlp_backends import block_sizes
from dynamoe_hf.modeling.routing import ProfileRouter
from dynamoe_hf.trainable import choose_trainable
from dynamoe_hf.trainer import ROUTER_TEMPERATURE


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


def test_sampled_logits_are_unbiased(tmp_path):
    """The mean of many quarter samples is the loss over all positions."""
    model, totals = tiny_model(), {}
    for fraction, repeats in ((1.0, 1), (0.25, 200)):
        settings = {**LABELS, "logit_fraction": fraction, "lm_loss_coef": 1.0, "router_loss_coef": 0.0}
        args = DynaMoETrainingArguments(
            str(tmp_path), report_to="none", use_cpu=True, sensitivity_range=[0.5, 0.5], **settings
        )
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
    dropouts = {name: 0.0 for name in tiny_config(family).to_dict() if "dropout" in name or "pdrop" in name}
    model = DynaMoEForCausalLM.from_dense(tiny_dense(family, **dropouts))
    for mlp in model.nested_mlps:
        torch.nn.init.normal_(mlp.router.output.weight)
    settings = {
        **LABELS,
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
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    torch.manual_seed(trainer._seed_of(trainer._place()))
    torch.rand(15)  # what the trainer draws before the routes: positions
    return trainer, batch, loss, gradients


@pytest.mark.parametrize("logit_rows", [8, 24, 10**6])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_in_chunks_equal_those_of_whole_logits(family, logit_rows, tmp_path, monkeypatch):
    """Outputs and gradients, whatever the head does after its product, and with the teacher's logits in chunks too."""
    monkeypatch.setattr("dynamoe_hf.losses.LOGIT_ROWS", logit_rows)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_the_lora_recipe_sit_on_the_projections_of_the_mlps(family, token_ids):
    model = get_peft_model(tiny_dynamoe(family), lora_config(4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted = {id(module) for module in model.modules() if hasattr(module, "lora_A")}
    assert adapted == {id(getattr(mlp, name)) for mlp in model.nested_mlps for name in mlp.layout.projections}
    expected = model.eval()(token_ids, sensitivity=0.4).logits
    assert_close(family, model.merge_and_unload()(token_ids, sensitivity=0.4).logits, expected, atol=1e-4)


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
        norms = {"lfm2": "embedding_norm", "falcon_h1": "final_layernorm", "gpt_neox": "final_layer_norm", "gpt2": "ln_f", "gptj": "ln_f",
                 "opt": "decoder.final_layer_norm", "xglm": "layer_norm", "biogpt": "layer_norm"}  # fmt: skip
        with model.base_model.get_submodule(norms.get(family, "norm")).register_forward_pre_hook(
            lambda module, args: last.append(args[0])
        ):
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
        rows, length = batch["input_ids"].shape
        x = args[0].view(rows, length, -1)  # OPT's layers have made one row of them
        found = mlp.router.gates(mlp.router(x), torch.full((rows,), 0.5), ROUTER_TEMPERATURE)
        factor = torch.cat(
            [found[..., e : e + 1].expand(rows, length, size) for e, size in enumerate(block_sizes(mlp.widths))], -1
        )
        widths.append(factor.mean(-1))
        return mlp.down_linear(mlp.hidden(x) * factor).view_as(output)

    target = trainer.teacher(batch["input_ids"], force_expert=3).logits
    model.gradient_checkpointing_disable()  # it would run layers again after the hooks are gone
    hooks = [mlp.register_forward_hook(by_hand) for mlp in model.nested_mlps]
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


def test_lora(tmp_path, token_ids):
    model = get_peft_model(tiny_model(), lora_config(4))
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
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter").eval()
    merged = model.merge_and_unload()
    assert_close("forced", merged(token_ids, force_expert=1).logits, forced, atol=1e-4)
    for sensitivity, expected in wrapped.items():  # masks while wrapped, prefixes after merging
        assert_close("reloaded", again(token_ids, sensitivity=sensitivity).logits, expected, atol=1e-4)
        assert_close("merged", merged(token_ids, sensitivity=sensitivity).logits, expected, atol=1e-4)


def test_what_was_frozen_beside_adapters_stays_frozen(tmp_path):
    """PEFT makes routers trainable where the teacher's pass, without adapters, ends; layers that run again would not be those that ran."""
    losses = []
    for checkpointing in (False, True):
        model = get_peft_model(tiny_model(), lora_config(4))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        settings = {"train_parts": "lora", "router_loss_coef": 0.0, "gradient_checkpointing": checkpointing}
        trainer = train(model, tmp_path, max_steps=3, lm_loss_coef=0.2, **settings)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert before == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_activation_checkpointing_gives_the_same_losses(tmp_path):
    losses = []
    for checkpointing in (False, True):
        trainer = train(tiny_model(), tmp_path, max_steps=4, gradient_checkpointing=checkpointing, lm_loss_coef=0.2)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("settings", [{"label_smoothing_factor": 0.1}, {"compute_loss_func": lambda *args, **kwargs: None}])
@pytest.mark.parametrize("adapted", [False, True])
def test_losses_that_keep_the_labels_from_the_model_are_refused(settings, adapted, tmp_path):
    """In training and in evaluation, of a plain Trainer; `DynaMoETrainer` says so when it is made."""
    model = get_peft_model(tiny_model(), lora_config()) if adapted else tiny_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    smoothing = {name: value for name, value in settings.items() if name == "label_smoothing_factor"}
    function = {name: value for name, value in settings.items() if name not in smoothing}
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, label_names=["labels"], **smoothing)
    trainer = Trainer(model=model, args=args, train_dataset=rows(), eval_dataset=rows(), **function)
    for run in (trainer.train, trainer.evaluate):
        with pytest.raises(ValueError, match="loss trains no router. Leave both out"):
            run()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    if function:
        args = DynaMoETrainingArguments(str(tmp_path), use_cpu=True, **LABELS)
        with pytest.raises(ValueError, match="`compute_loss_func` does not go with"):
            DynaMoETrainer(model=tiny_model(), args=args, train_dataset=rows(), **function)


@pytest.mark.parametrize("parts", ["layers", "lora"])
def test_packed_documents_are_those_of_rows(parts, tmp_path):
    """Neither the model nor its teacher looks across documents, so the full width has no distance to itself."""
    examples = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 128, (4, 12)).tolist()]
    settings = {"sensitivity_range": [1, 1], "route": "router", "router_loss_coef": 0.0, "hidden_loss_coef": 1.0}
    settings |= {"train_parts": parts, "lm_loss_coef": 1.0, "logit_fraction": 1.0, "per_device_train_batch_size": 4}
    losses = {}
    for name, collator in (("rows", default_data_collator), ("packed", DataCollatorWithFlattening())):
        model = tiny_model()
        model = get_peft_model(model, lora_config()) if parts == "lora" else model
        log = train(model, tmp_path, examples=examples, data_collator=collator, **settings).state.log_history[0]
        assert log["kd_loss"] == pytest.approx(0, abs=1e-4) and log["hidden_loss"] == pytest.approx(0, abs=1e-4), name
        losses[name] = log["lm_loss"]
    assert losses["packed"] == pytest.approx(losses["rows"], rel=1e-4)


def test_the_teacher_follows_what_is_set_later(tmp_path):
    model = tiny_model()
    args = DynaMoETrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **LABELS)
    teacher = DynaMoETrainer(model=model, args=args, train_dataset=rows()).teacher
    model.set_attn_implementation("eager")
    model.config.use_cache = False
    for each in (model, teacher):
        attention = each.model.layers[0].self_attn.config
        assert attention._attn_implementation == each.config._attn_implementation == "eager"
        assert attention.use_cache is each.config.use_cache is False
    assert all(a is not b for a, b in zip(model.parameters(), teacher.parameters()))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_bf16_autocast(tmp_path):
    """Weights stay float32; the products of the student, of the teacher and of the head are in bfloat16."""
    model, dtypes = tiny_model(), {}
    settings = {"report_to": "none", "max_steps": 2, "logging_steps": 1, **LABELS}
    args = DynaMoETrainingArguments(str(tmp_path), bf16=True, use_cpu=True, **settings)
    trainer = DynaMoETrainer(model=model, args=args, train_dataset=rows())
    watched = {"student": model.model.layers[0].mlp.down_proj, "teacher": trainer.teacher.model.layers[0].mlp.down_proj,
               "head": model.lm_head, "teacher's head": trainer.teacher.lm_head}  # fmt: skip
    for name, module in watched.items():
        module.register_forward_hook(lambda module, args, output, name=name: dtypes.setdefault(name, set()).add(output.dtype))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0
    assert dtypes == {name: {torch.bfloat16} for name in watched}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: run `pytest -m gpu` where there is one")
@pytest.mark.parametrize("bf16", [False, True])
def test_training_on_a_gpu(bf16, tmp_path):
    trainer = train(tiny_model(), tmp_path, max_steps=30, bf16=bf16, use_cpu=False, learning_rate=3e-3)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_bad_settings(tmp_path):
    for settings, message in (({"train_parts": "half"}, "`train_parts` is unknown"), ({"teacher": "x"}, "`teacher` is unknown"),
                              ({"route": "best"}, "`route` is unknown"), ({"logit_fraction": 0}, "must be in"),
                              ({"label_smoothing_factor": 0.1}, "does not go with"),
                              ({"width_loss_coef": 1.0, "route": "label"}, 'needs route="router", found \'label\'')):  # fmt: skip
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
    with pytest.raises(ValueError, match="needs profile routers, found ArgmaxRouter"):
        DynaMoETrainer(model=tiny_model(router_type="argmax"), args=chooses)
    choose_trainable(model := tiny_model(), "routers")
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"router"}


def test_tokens_do_not_follow_routers_that_know_nothing(tmp_path, caplog):
    """By default they follow their labels then, and routers learn these; the warning and the logs say so."""
    arguments = DynaMoETrainingArguments(
        str(tmp_path), max_steps=1, logging_steps=1, use_cpu=True, report_to="none", save_strategy="no"
    )
    trainer = DynaMoETrainer(model=(model := tiny_model()), args=arguments, train_dataset=rows())
    trainer.train()
    assert "routers that know nothing" in caplog.text
    assert (trainer.args.route, trainer.args.router_loss_coef) == ("label", 1.0) and arguments.route == "router"
    assert trainer.state.log_history[0]["router_loss"] > 0
    assert all(mlp.router.output.weight.any() for mlp in model.nested_mlps)
    caplog.clear()
    defaults = {"train_parts": "layers", "route": "router", "router_loss_coef": 0.0}
    model = tiny_model()
    fit_routers(model, torch.randint(3, 128, (8, 16)), steps=2)
    train(model, tmp_path, **defaults)
    for learns in (
        {"route": "label", "router_loss_coef": 1.0},
        {"router_loss_coef": 1.0},
        {"width_loss_coef": 0.9},
        {"sensitivity_range": [1, 1]},
        {"route": "random"},
    ):
        trained = train(tiny_model(), tmp_path, **{**defaults, **learns})
        assert all(getattr(trained.args, name) == value for name, value in {**defaults, **learns}.items())
    assert "know nothing" not in caplog.text


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [{}, {"train_parts": "layers", "route": "router", "hidden_loss_coef": 10.0, "width_loss_coef": 0.9, "lm_loss_coef": 1.0}],
)
def test_a_step_without_labels_changes_nothing(settings, accumulation, tmp_path):
    examples = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in rows()]
    model = tiny_model()
    for mlp in model.nested_mlps:
        torch.nn.init.normal_(mlp.router.output.weight)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulation, "max_steps": 2, **settings}
    trainer = train(model, tmp_path, examples=examples, **settings)
    for log in trainer.state.log_history[:2]:
        losses = {name: value for name, value in log.items() if name.endswith("loss")}
        assert len(losses) == 6 and not any(losses.values()), log
        assert log["grad_norm"] == log["mean_width"] == 0
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_without_labels_changes_nothing_under_a_plain_trainer(accumulation, tmp_path):
    examples = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in rows()]
    model = tiny_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulation, "max_steps": 2}
    trainer = train(model, tmp_path, Trainer, examples=examples, **settings)
    assert [log["loss"] for log in trainer.state.log_history[:2]] == [0, 0]
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_hidden_states_that_are_zero_have_no_relative_error():
    """Nothing divides by their size, and what they are masked with is 0, not NaN, in value and gradient."""
    target = torch.zeros(1, 3, 4)
    target[0, 0] = 2.0
    state = torch.ones(1, 3, 4, requires_grad=True)
    errors = errors_of([state, state], [target, target])
    assert_close("errors", errors, torch.tensor([[0.25, 0.0, 0.0]]))
    errors.sum().backward()
    assert_close("gradient", state.grad[0], torch.tensor([[-0.125] * 4, [0.0] * 4, [0.0] * 4]))


def test_several_gpus_need_a_launcher(tmp_path):
    args = DynaMoETrainingArguments(str(tmp_path), use_cpu=True, **LABELS)
    assert args.n_gpu <= 1
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"2 GPUs needs one process for each: start it with `accelerate launch` or torchrun"):
        DynaMoETrainer(model=tiny_model(), args=args, train_dataset=rows())


def test_the_best_checkpoint_is_kept(tmp_path):
    """Checkpoints are renamed when they are whole; what the state says of the best one is its place."""
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1}
    settings |= {"load_best_model_at_end": True, "max_steps": 3, "learning_rate": 0.5}
    args = DynaMoETrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, **LABELS, **settings
    )
    trainer = DynaMoETrainer(model=tiny_model(), args=args, train_dataset=rows(), eval_dataset=rows(4, seed=1))
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    last = max(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert best.parent == tmp_path and {best, last} == set(tmp_path.iterdir())
    assert json.loads((last / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    assert not list(last.glob("*.bin")) and differing(last, json.loads((last / "digests.json").read_text())) == []


def test_preferences_with_trl(tmp_path):
    """TRL's DPOTrainer loads its reference from the folder that the model is from."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    model = load_model(tmp_path / "model")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    args = trl.DPOConfig(output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to="none", save_strategy="no",
                         use_cpu=True, bf16=False, learning_rate=1e-2)  # fmt: skip
    preferences = datasets.Dataset.from_list([{"prompt": "abc", "chosen": "def", "rejected": "xyz"}] * 4)
    trainer = trl.DPOTrainer(model=model, args=args, train_dataset=preferences, processing_class=tiny_tokenizer())
    trainer.train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert any(".up_proj." in name for name in changed)
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.ref_model.named_parameters())
