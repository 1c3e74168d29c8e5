# SPDX-License-Identifier: Apache-2.0
"""Text from a model folder at a setting of the dial."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from .arguments import GenerateArguments, resolve
from .data import check_ids
from .folder import load_model, load_tokenizer
from .observe import shares_read


class Generation(NamedTuple):
    """What `generate_text` returns."""

    text: str
    share: float  # mean share of the MLPs' weights that a token read, of the prompt and of the text
    budget: float | None  # that was asked for


def generate_text(folder: str | Path, prompt: str, arguments: GenerateArguments | None = None, **settings: Any) -> Generation:
    """
    The continuation of a prompt, or with `chat=True` the answer to it through the tokenizer's chat template; and the share of the
    weights that it really took, which on text unlike that of the calibration is another one than the budget.

    Args:
        folder: model folder or Hub id.
        prompt: text to continue, or the question.
        arguments, settings: the fields of `GenerateArguments`, as one object or by name.

    Raises:
        ValueError: an empty prompt, both settings, or a budget that is not calibrated.
    """
    arguments = resolve(GenerateArguments, arguments, settings)
    if not prompt.strip():
        raise ValueError("The prompt is empty. Give some words to continue.")
    if arguments.budget is not None and arguments.sensitivity is not None:
        raise ValueError("Both a budget and a sensitivity were given. Give one of them.")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    if arguments.budget is not None:
        model.set_budget(arguments.budget)
    elif arguments.sensitivity is not None:
        model.set_sensitivity(arguments.sensitivity)
    if arguments.int8:
        model.pack("int8")
    torch.manual_seed(arguments.seed)
    text = continue_text(model, tokenizer, prompt, arguments.max_new_tokens, arguments.temperature, arguments.chat)
    return Generation(text, share_of(model, tokenizer, prompt + text), arguments.budget)


def continue_text(model, tokenizer, prompt, max_new_tokens=64, temperature=0.0, chat=False) -> str:
    """The text alone, with a model in memory."""
    if chat:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    check_ids(inputs["input_ids"], model.config)
    inputs = inputs.to(model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **sampling)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def share_of(model, tokenizer, text: str) -> float:
    """Mean share of the MLPs' weights that a token of the text reads at the model's own setting of the dial."""
    with model.routing(records=[]) as routing:
        model.model(tokenizer(text, return_tensors="pt")["input_ids"].to(model.device), use_cache=False)
    return shares_read(routing.records).mean().item()
