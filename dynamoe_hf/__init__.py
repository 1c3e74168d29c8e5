# SPDX-License-Identifier: Apache-2.0
"""DynaMoE: a dense language model that spends less compute on easy tokens."""

try:
    from .modeling import DynaMoEConfig, DynaMoEForCausalLM
except ModuleNotFoundError as error:
    if error.name != f"{__name__}.modeling":
        raise
    raise ModuleNotFoundError(
        "`dynamoe_hf.modeling` is the top-level `modeling/` folder, mapped by `package_dir` in setup.cfg when the package is "
        "installed. From a checkout, run `pip install -e .` first.",
        name=error.name,
    ) from error

from ._version import __version__
from .calibrate import calibrate_budgets
from .convert import convert_model, export_dense
from .evaluate import evaluate_model
from .label import difficulty_labels
from .publish import publish_model
from .report import report_folder
from .train import DynaMoETrainer, DynaMoETrainingArguments, adapt_model, fit_routers, lora_config, train_model


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
