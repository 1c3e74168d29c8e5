"""
transformers' own common tests, from its source distribution (`make test-upstream`): with a DynaMoE model they end as with its dense
base. The distribution holds the common tests alone: those of generation and of the exporters lie in folders that it leaves out. With a
checkout of its repository (`make test-upstream TRANSFORMERS_SOURCE=FOLDER`) those of generation join.
"""

import importlib
import os
import re
import sys
import types
import unittest
from contextlib import ExitStack
from functools import cache
from unittest.mock import patch

import pytest
import torch
from conftest import tiny_config
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING,
    MODEL_MAPPING_NAMES,
)

from dynamoe_hf.modeling import DynaMoEConfig, DynaMoEForCausalLM, DynaMoEModel
from dynamoe_hf.modeling.routing import TokenRouter


pytestmark = pytest.mark.upstream
# Trained where it is used: by default a training draws sensitivities below that of the full width.
KINDS = {"full": {"train_sensitivity": (1.0, 1.0)}, "routed": {"sensitivity": 0.6}}
FAMILIES = ["llama", "qwen3", "gemma3_text"]
# The distribution leaves out what starts processes: those import the mixin anew, as a package of these two files.
RUN_DISTRIBUTED = """
import os, socket, torch

def run(rank, world_size, port, function, args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    function(rank, *args)
    torch.distributed.barrier()
    os._exit(0)

def run_distributed(world_size):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return lambda function: lambda *args: torch.multiprocessing.spawn(run, (world_size, port, function, args), world_size)
"""

START_PROCESSES = """
import torch
from torch.multiprocessing import spawn as _start_rank_processes

def _get_distributed_backend():
    return "gloo"

def _get_distributed_device_type():
    return "cpu"

def _get_rank_device(rank):
    return torch.device("cpu")

def _set_rank_device(rank):
    torch.set_num_threads(1)
"""


@cache
def common_tests():
    """The mixins of the sources, imported as a package without the folders that are not in them."""
    package, source = types.ModuleType("upstream_tests"), os.path.join(os.environ["TRANSFORMERS_SOURCE"], "tests")
    package.__path__ = [source]
    elsewhere = {"generation.test_utils": "GenerationTesterMixin", "exporters.test_export": "ExportTesterMixin"}
    there = [name for name in elsewhere if os.path.isfile(os.path.join(source, *name.split(".")) + ".py")]
    sys.modules[package.__name__] = package
    for name, mixin in elsewhere.items():
        if name in there:
            continue
        module = types.ModuleType(f"{package.__name__}.{name}")
        setattr(module, mixin, type(mixin, (), {}))
        sys.modules[f"{package.__name__}.{name.split('.')[0]}"] = types.ModuleType(name)
        sys.modules[module.__name__] = module
    names = {"test_modeling_common": "ModelTesterMixin", "test_training_mixin": "TrainingTesterMixin"}
    names |= {name: mixin for name, mixin in elsewhere.items() if name in there and mixin == "GenerationTesterMixin"}
    return [getattr(importlib.import_module(f"{package.__name__}.{name}"), mixin) for name, mixin in names.items()]


class FamilyTester:
    """What the mixins ask of the tester of a family."""

    is_training = True
    batch_size, seq_length, hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 3, 7, 32, 2, 4, 128

    def __init__(self, family, base_model_class, causal_lm_class, settings):
        self.family, self.settings = family, settings
        self.base_model_class, self.causal_lm_class = base_model_class, causal_lm_class

    def get_config(self):
        base = tiny_config(self.family, attention_dropout=0.0)
        return base if self.settings is None else DynaMoEConfig(base_config=base, **self.settings)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def seeded_reset(router, reset=TokenRouter.reset):
    """The mixins compare fresh weights, and set a seed where transformers draws them."""
    torch.manual_seed(42)
    reset(router)


@cache
def outcomes(family, kind):
    """Errors of the common tests that failed, and reasons of those that were skipped, by name; and how many ran."""
    config = tiny_config(family)
    dense = MODEL_MAPPING[type(config)], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    classes = dense if kind == "dense" else (DynaMoEModel, DynaMoEForCausalLM)

    class Case(*common_tests(), unittest.TestCase):
        all_model_classes = classes
        if not any(mixin.__name__ == "GenerationTesterMixin" for mixin in common_tests()):
            test_generation_tester_mixin_inheritance = None  # it asks for them
        test_can_init_all_missing_weights_before_2023 = True  # our files are newer, some of the bases are not

        def setUp(self):
            torch.manual_seed(0)
            self.model_tester = FamilyTester(family, *classes, KINDS.get(kind))

    # The mixins look for a class by its name in the tables of transformers.
    ours = ((MODEL_MAPPING_NAMES, DynaMoEModel), (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, DynaMoEForCausalLM))
    with ExitStack() as stack:
        for table, cls in ours:
            stack.enter_context(patch.dict(table, {"dynamoe": cls.__name__}))
        stack.enter_context(patch.object(TokenRouter, "reset", seeded_reset))
        names = unittest.TestLoader().getTestCaseNames(Case)
        result = unittest.TestSuite(map(Case, names)).run(unittest.TestResult())

    def by_name(entries):
        """Names of subtests hold that of the class."""
        found = {}
        for test, told in entries:
            name = str(test).split(" (")[0] + getattr(test, "_subDescription", str)()
            for cls, general in zip(classes, ("backbone", "causal_lm")):
                name = re.sub(rf"\b{cls.__name__}\b", general, name)
            found[name] = told
        return found

    return by_name(result.failures + result.errors), by_name(result.skipped), result.testsRun


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_common_tests_end_as_with_the_dense_class(family, kind):
    """None fails or is skipped that does not with the dense class. (Gemma 3 changes those of scaled RoPE in a file that is not there.)"""
    failed, skipped, ran = outcomes(family, kind)
    dense_failed, dense_skipped, dense_ran = outcomes(family, "dense")
    assert ran == dense_ran > 100
    assert len(dense_failed) == (4 if family == "gemma3_text" else 0), dense_failed
    assert not {name: error for name, error in failed.items() if name not in dense_failed}
    assert not {name: why for name, why in skipped.items() if name not in dense_skipped}


def parallel_outcomes(mixin, kind):
    """Errors of the tests of several processes and reasons of those that were skipped, by name, and how many ran."""
    config = tiny_config("llama")
    dense = MODEL_MAPPING[type(config)], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    classes = dense if kind == "dense" else (DynaMoEModel, DynaMoEForCausalLM)

    class Case(mixin, unittest.TestCase):
        all_model_classes = classes
        model_tester = FamilyTester("llama", *classes, KINDS.get(kind))

    names = set(unittest.TestLoader().getTestCaseNames(Case)) - {"test_moe_parallel_plans_shard_experts"}
    result = unittest.TestSuite(map(Case, sorted(names))).run(unittest.TestResult())
    errors, skipped = (
        {str(test).split(" (")[0]: told for test, told in found} for found in (result.failures + result.errors, result.skipped)
    )
    return errors, skipped, result.testsRun


def module_of(name, processes, tmp_path, monkeypatch):
    """A file of the common tests, in a package with the functions that start processes, which the distribution leaves out."""
    package = tmp_path / f"upstream_{name}"
    package.mkdir()
    (package / f"{name}.py").symlink_to(os.path.abspath(f"{os.environ['TRANSFORMERS_SOURCE']}/tests/{name}.py"))
    (package / "distributed_testing_utils.py").write_text(processes)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module(f"{package.name}.{name}")


def test_fsdp_ends_as_with_the_dense_class(tmp_path, monkeypatch):
    """Sharding, saving, loading and training, in two processes and four, against DDP and one device."""
    monkeypatch.setenv("RUN_FSDP_TESTS", "1")
    module = module_of("test_fsdp_mixin", START_PROCESSES, tmp_path, monkeypatch)
    monkeypatch.setattr(module, "FSDP_DISTRIBUTED_TEST_MODEL_TYPES", None)  # the families that it picks
    monkeypatch.setattr(module, "_get_available_fsdp_workers", lambda: 4)
    errors, skipped, ran = parallel_outcomes(module.FSDPTesterMixin, "routed")
    dense_errors, dense_skipped, dense_ran = parallel_outcomes(module.FSDPTesterMixin, "dense")
    assert errors == dense_errors == {}
    assert skipped == dense_skipped and ran == dense_ran and ran - len(skipped) >= 11


def test_tensor_parallelism_ends_as_with_the_dense_class(tmp_path, monkeypatch):
    """Forward, backward, generation, and generation of quantised weights, in two processes and in one."""
    module = module_of("test_tensor_parallel_mixin", RUN_DISTRIBUTED, tmp_path, monkeypatch)
    monkeypatch.setattr(module, "TP_DISTRIBUTED_TEST_MODEL_TYPES", None)  # the families that it picks
    failed, skipped, ran = parallel_outcomes(module.TensorParallelTesterMixin, "routed")
    assert parallel_outcomes(module.TensorParallelTesterMixin, "dense") == ({}, {}, ran) and ran > 5 and not skipped
    # It compares a part's gradient with a half in one piece. Ours are of blocks: test_tensor_parallel.py compares whole gradients.
    different = re.findall(r"^  (\S+): max diff", failed.pop("test_tp_backward"), re.M)
    assert different and all(re.search(r"\.mlp\.(gate|up|down)_proj\.weight$", name) for name in different)
    assert not failed
