# SPDX-License-Identifier: Apache-2.0
"""
`transformers serve` for a DynaMoE folder: `python -m dynamoe_hf.serve_transformers SENSITIVITY FOLDER ...`, with its own flags after
that. It looks a model's class up as an attribute of `transformers`, which knows no class of ours.
"""

import sys
from typing import Any

import transformers

from .modeling import DynaMoEForCausalLM


def main() -> None:
    """Run the server."""
    sensitivity = float(sys.argv.pop(1))

    class Served:
        @staticmethod
        def from_pretrained(*args, **kwargs):
            model = DynaMoEForCausalLM.from_pretrained(*args, **kwargs)
            if model.config.has_dial:
                model.set_sensitivity(sensitivity)
            return model

    namespace: Any = transformers
    namespace.DynaMoEForCausalLM = Served
    from transformers.cli.transformers import app

    app(["serve", *sys.argv[1:]])


if __name__ == "__main__":
    main()
