# SPDX-License-Identifier: Apache-2.0
"""DynaMoE: a dense language model that spends less compute on easy tokens."""

from importlib import import_module

from ._version import __version__


# Public name -> its module, imported at first use: `dynamoe --help` and `dynamoe_hf.arguments` must not wait for torch.
_MODULES = {
    "DynaMoEConfig": "modeling",
    "DynaMoEForCausalLM": "modeling",
    "DynaMoETrainer": "trainer",
    "DynaMoETrainingArguments": "trainer",
    "adapt_model": "train",
    "calibrate_budgets": "calibrate",
    "convert_model": "convert",
    "difficulty_labels": "label",
    "evaluate_model": "evaluate",
    "export_dense": "convert",
    "fit_routers": "router_fit",
    "lora_config": "trainer",
    "publish_model": "publish",
    "report_folder": "report",
    "train_model": "train",
}


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f".{_MODULES[name]}", __name__)
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.modeling":
            raise
        raise ModuleNotFoundError(
            "`dynamoe_hf.modeling` is the top-level `modeling/` folder, mapped by `package_dir` in setup.cfg when the package is "
            "installed. From a checkout, run `pip install -e .` first.",
            name=error.name,
        ) from error
    return globals().setdefault(name, getattr(module, name))


__all__ = [
    "DynaMoEConfig",
    "DynaMoEForCausalLM",
    "DynaMoETrainer",
    "DynaMoETrainingArguments",
    "__version__",
    "adapt_model",
    "calibrate_budgets",
    "convert_model",
    "difficulty_labels",
    "evaluate_model",
    "export_dense",
    "fit_routers",
    "lora_config",
    "publish_model",
    "report_folder",
    "train_model",
]
