# SPDX-License-Identifier: Apache-2.0
"""DynaMoE: a dense language model that spends less compute on easy tokens."""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ._version import __version__


if TYPE_CHECKING:
    from .calibrate import calibrate_budgets
    from .convert import convert_model
    from .evaluate import evaluate_model
    from .export import export_dense
    from .label import difficulty_labels
    from .modeling import DynaMoEConfig, DynaMoEForCausalLM, DynaMoEModel
    from .plan import plan_base
    from .publish import publish_model
    from .report import report_folder
    from .router_fit import fit_routers
    from .threshold_fit import fit_thresholds
    from .train import adapt_model, train_model
    from .trainable import lora_config
    from .trainer import DynaMoETrainer, DynaMoETrainingArguments


# Public name -> the module that it is imported from when it is first used: a stage's dependencies load with the stage.
_MODULES = {
    "DynaMoEConfig": "modeling",
    "DynaMoEForCausalLM": "modeling",
    "DynaMoEModel": "modeling",
    "DynaMoETrainer": "trainer",
    "DynaMoETrainingArguments": "trainer",
    "adapt_model": "train",
    "calibrate_budgets": "calibrate",
    "convert_model": "convert",
    "difficulty_labels": "label",
    "evaluate_model": "evaluate",
    "export_dense": "export",
    "fit_routers": "router_fit",
    "fit_thresholds": "threshold_fit",
    "lora_config": "trainable",
    "plan_base": "plan",
    "publish_model": "publish",
    "report_folder": "report",
    "train_model": "train",
}

__all__ = [
    "DynaMoEConfig",
    "DynaMoEForCausalLM",
    "DynaMoEModel",
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
    "fit_thresholds",
    "lora_config",
    "plan_base",
    "publish_model",
    "report_folder",
    "train_model",
]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_command_line() -> bool:
    """Whether the program that is starting is the console script `dynamoe`, or `python -m dynamoe_hf.cli`."""
    options = sys.orig_argv[1:]
    return Path(sys.argv[0]).name in ("dynamoe", "dynamoe.exe") or ("-m", "dynamoe_hf.cli") in zip(options, options[1:])


# `import dynamoe_hf` registers the model with the Auto classes, so that `AutoModelForCausalLM.from_pretrained(folder)` needs no
# `trust_remote_code`. Python runs this file before `dynamoe_hf.cli`, and torch and transformers take seconds to import. So the
# command line leaves the registration to its stages, all of which import `modeling`, and `dynamoe --help` does without it.
# The trap: a script of one's own that is called `dynamoe`, without a suffix, must import `dynamoe_hf.modeling` itself.
if not _is_command_line():
    try:
        import_module(".modeling", __name__)
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.modeling":
            raise
        raise ModuleNotFoundError(
            "`dynamoe_hf.modeling` is the top-level `modeling/` folder, mapped by `package_dir` in setup.cfg when the package "
            "is installed. From a checkout, run `pip install -e .` first.",
            name=error.name,
        ) from error
