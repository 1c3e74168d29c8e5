"""The arguments: one set of defaults, help that is written once, and an import that does not wait for torch."""

import ast
import math
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
from transformers import AutoConfig, HfArgumentParser

from dynamoe_hf import DynaMoEConfig, DynaMoETrainingArguments, adapt_model, arguments, train_model, training_arguments
from dynamoe_hf.modeling.routing import ROUTES


CLASSES = [
    training_arguments.NestedTrainingArguments,
    training_arguments.StageArguments,
    training_arguments.AdaptArguments,
    training_arguments.TrainArguments,
]


def defaults(cls, names):
    return {field.name: field.default for field in fields(cls) if field.name in names}


def test_they_import_the_standard_library_alone():
    """`dynamoe --help` is built from them, and importing torch takes seconds."""
    for node in ast.walk(ast.parse(Path(arguments.__file__).read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names and not getattr(node, "level", 0), names


def test_defaults_of_trainer_and_stage_differ_in_the_price_of_width_alone():
    """A Trainer runs one phase, in which experts are trained; the stage has a last phase in which width has its price."""
    names = [field.name for field in fields(training_arguments.NestedTrainingArguments)]
    trainer, stage = (defaults(cls, names) for cls in (DynaMoETrainingArguments, training_arguments.TrainArguments))
    assert len(names) == 12
    assert {name for name in names if trainer[name] != stage[name]} == {"width_loss_coef"}
    assert (trainer["width_loss_coef"], stage["width_loss_coef"]) == (0.0, 0.9)


def test_adapting_has_two_defaults_of_its_own():
    names = [field.name for field in fields(training_arguments.AdaptArguments)]
    adapt, train = (defaults(cls, names) for cls in (training_arguments.AdaptArguments, training_arguments.TrainArguments))
    assert {name for name in names if adapt[name] != train[name]} == {"max_tokens", "learning_rate"}
    assert (adapt["max_tokens"], adapt["learning_rate"]) == (65_536, 6e-5)


def test_no_field_is_written_twice_but_for_its_default():
    """A class of the training stages repeats a field of its bases only where its default is another one."""
    training, written = {cls.__name__ for cls in CLASSES}, []
    for node in ast.parse(Path(training_arguments.__file__).read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name in training:
            written += [statement.target.id for statement in node.body if isinstance(statement, ast.AnnAssign)]
    assert sorted(name for name in set(written) if written.count(name) > 1) == [
        "learning_rate",
        "max_tokens",
        "width_loss_coef",
    ]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_has_help(cls):
    assert all(len(field.metadata["help"]) > 10 for field in fields(cls))


def test_hf_argument_parser_reads_the_trainers_arguments():
    parser = HfArgumentParser(DynaMoETrainingArguments)
    text = " ".join(parser.format_help().split())
    for field in fields(training_arguments.NestedTrainingArguments):
        assert field.metadata["help"].split(":")[0].replace("%%", "%") in text, field.name
    flags = ["--output_dir", "x", "--train_parts", "mlp", "--route", "label", "--sensitivity_range", "0.2", "0.9", "--use_cpu"]
    (args,) = parser.parse_args_into_dataclasses(flags)
    assert (args.train_parts, args.route, args.sensitivity_range, args.hidden_loss_coef) == ("mlp", "label", [0.2, 0.9], 10.0)


def test_routes_are_those_of_the_model():
    assert set(get_args(arguments.Route)) == set(ROUTES)


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (training_arguments.NestedTrainingArguments, {"train_parts": "half"}, "`train_parts` is unknown: found 'half'"),
        (
            training_arguments.NestedTrainingArguments,
            {"sensitivity_range": [0.2]},
            "must rise within 0 and 1, found 0.2. Give",
        ),
        (training_arguments.TrainArguments, {"logit_fraction": 2}, r"must be in \(0, 1\], found 2"),
        (training_arguments.TrainArguments, {"harm": "best"}, "`harm` is unknown: found 'best'. Choose one of layer, token."),
        (training_arguments.TrainArguments, {"choice_share": -0.1}, r"must be in \[0, 1\], found -0.1"),
    ],
)
def test_wrong_values_are_refused(cls, settings, message):
    with pytest.raises(ValueError, match=message):
        cls(**settings)


@pytest.mark.parametrize("stage", [train_model, adapt_model])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"learning_rate": math.nan}, "`learning_rate` must be a finite number above 0, found nan"),
        ({"learning_rate": 0}, "`learning_rate` must be a finite number above 0, found 0"),
        ({"seed": -1}, "`seed` must be a whole number from 0 to"),
        ({"batch_size": 0}, "`batch_size` must be a whole number of at least 1, found 0"),
        ({"max_tokens": 1.5}, "`max_tokens` must be a whole number of at least 1, found 1.5"),
        ({"save_steps": True}, "`save_steps` must be a whole number of at least 1, found True"),
    ],
)
def test_numbers_are_checked_before_any_work(stage, setting, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        stage(tmp_path / "nowhere", tmp_path / "out", **setting)


@pytest.mark.parametrize("name", ["lm_loss_coef", "router_loss_coef", "kd_loss_coef", "hidden_loss_coef", "width_loss_coef"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "1"])
def test_weights_of_losses_are_finite_and_not_negative(name, value, tmp_path):
    for make in (training_arguments.TrainArguments, lambda **settings: DynaMoETrainingArguments(str(tmp_path), **settings)):
        with pytest.raises(ValueError, match=f"`{name}` must be a finite number of at least 0, found {value!r}"):
            make(**{name: value})


def test_a_price_of_width_is_asked_for_before_any_work(dense_folder, tmp_path):
    """Routers that learn by choosing need one, in the last phase; it is told before the first."""
    folder = tmp_path / "model"
    DynaMoEConfig(AutoConfig.from_pretrained(dense_folder)).save_pretrained(folder)
    with pytest.raises(ValueError, match="need a price of width, found width_loss_coef=0 and choice_share=0.2"):
        train_model(folder, tmp_path / "out", width_loss_coef=0.0)
    with pytest.raises(ValueError, match="`router_tokens` must be a whole number of at least 0, found -1"):
        train_model(folder, tmp_path / "out", router_tokens=-1)


@pytest.mark.parametrize("stage", [train_model, adapt_model])
def test_unknown_settings_are_refused(stage, tmp_path):
    with pytest.raises(TypeError, match="Arguments has no router_token. Its settings are .*max_tokens"):
        stage(tmp_path, tmp_path / "out", router_token=3)
    with pytest.raises(TypeError, match="`arguments` must be .*Arguments, found str"):
        stage(tmp_path, tmp_path / "out", "text.txt")
