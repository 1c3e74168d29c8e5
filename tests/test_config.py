"""Any config builds a model that runs, trains and comes back as it was, or is refused by the name of a field."""

import json
import math
import re

import pytest
import torch
from conftest import tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamoe_hf import DynaMoEConfig, DynaMoEForCausalLM
from dynamoe_hf.modeling.configuration_dynamoe import FORMAT_VERSION
from dynamoe_hf.modeling.difficulty import SIMILARITIES
from dynamoe_hf.modeling.routing import ROUTERS, ROUTES


LAYERS = 2
WRONG = st.sampled_from(
    [None, True, False, -1, 0, 1, 1.5, 5, "x", "", [], {}, [0.5], ["a"], [[]], [None], (0.9, 0.1), {1: 2}, b"x"]
)
NUMBERS = st.floats(0, 1) | st.sampled_from([-0.5, 0, 1, 2, math.nan, math.inf, True, "0.5", None])
LADDERS = st.sampled_from([[1], [1.0], [0, 1], [0.25, 1], [0.25, 0.5, 1], [0.001, 1], [0.5, 0.501, 1], [1, 0.5], [0.5]])
ROWS = st.lists(NUMBERS, min_size=LAYERS, max_size=LAYERS) | st.lists(NUMBERS, max_size=3)
DENSITIES = st.lists(NUMBERS, min_size=1, max_size=2)
VALUES = {
    "base_config": st.sampled_from([{"model_type": "nothing"}, {"num_hidden_layers": 0}, {"hidden_size": "x"}, "llama", 3, ["llama"]])
    | st.builds(lambda: tiny_config().to_dict())
    | st.builds(DynaMoEConfig),
    "expert_widths": LADDERS | st.lists(LADDERS, min_size=1, max_size=3) | st.lists(NUMBERS, max_size=3),
    "cut_widths": st.lists(st.none() | st.lists(NUMBERS | st.integers(-1, 9), max_size=3), max_size=3) | st.just([None, (4, 8)]),
    "similarity": st.sampled_from([*SIMILARITIES, "euclid"]),
    "error_weights": ROWS,
    "router_type": st.sampled_from([*ROUTERS, "best"]),
    "router_dim": st.sampled_from([1, 8, 0, -8, 2.0]),
    "sensitivity": NUMBERS,
    "budgets": st.dictionaries(st.sampled_from(["0.5", "0.7", 0.6, "1", "2", "many", 1]), NUMBERS, max_size=3),
    "thresholds": st.fixed_dictionaries(
        {"density": DENSITIES, "input": st.lists(ROWS, max_size=2), "hidden": st.lists(ROWS, max_size=2)}
    )
    | st.just({"density": [0.5], "input": [[0.1] * LAYERS], "hidden": [[0.1] * LAYERS]}),
    "threshold_ramp": NUMBERS,
    "density_path": st.lists(st.lists(NUMBERS, min_size=1, max_size=3), max_size=3) | st.just([[0.5, 0.6]]),
    "force_expert": st.integers(-2, 5) | st.just(1.0),
    "train_route": st.sampled_from([*ROUTES, "best"]),
    "train_sensitivity": st.lists(NUMBERS, max_size=3) | st.tuples(NUMBERS, NUMBERS),
    "router_loss_coef": NUMBERS,
    "output_router_logits": st.booleans(),
    "format_version": st.integers(-5, FORMAT_VERSION + 1),
}  # fmt: skip
# The default base is a Llama of seven billion weights, so `base_config` is never left out.
FIELDS = {name: values if name == "base_config" else values | WRONG for name, values in VALUES.items()}
CONFIGS = st.fixed_dictionaries({}, optional=FIELDS)
FEW_FIELDS = st.sets(st.sampled_from(list(FIELDS)), min_size=1, max_size=3).flatmap(
    lambda names: st.fixed_dictionaries({name: FIELDS[name] for name in names})
)


def contents(config):
    """All that a config says of itself and of its base, in the form of JSON."""
    own = {name: getattr(config, name) for name in VALUES if name != "base_config"}
    return json.loads(json.dumps({**own, "base_config": config.base_config.to_diff_dict()}, allow_nan=False))


def check_one(fields, folder):
    """Build, run, train and reload a config, or see it refused with the name of one of its fields."""
    refused = None
    try:
        config = DynaMoEConfig(**{"base_config": tiny_config(), **fields})
        model = DynaMoEForCausalLM(config)
    except ValueError as error:
        refused = str(error)
    if refused is not None:
        named = set(re.findall(r"\w+", refused)) & set(VALUES)
        assert named & (set(fields) | {"density_path", "force_expert"}), f"refused without a field's name: {refused}"
        return
    assert contents(DynaMoEConfig.from_dict(config.to_dict())) == contents(config)
    config.save_pretrained(folder)
    assert contents(DynaMoEConfig.from_pretrained(folder)) == contents(config)
    ids = torch.arange(3, 11)[None]
    assert model.eval()(ids).logits.isfinite().all()
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()


few = settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), max_examples=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("config")


@few
@given(FEW_FIELDS)
def test_a_config_works_or_is_refused_by_name(folder, fields):
    check_one(fields, folder)


@pytest.mark.slow
@settings(few, max_examples=1000)
@given(FEW_FIELDS | CONFIGS)
def test_any_config_works_or_is_refused_by_name(folder, fields):
    check_one(fields, folder)
