# SPDX-License-Identifier: Apache-2.0
"""Text from a model folder at a setting of the dial: a continuation, an answer, or a conversation on the terminal."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TextStreamer

from .arguments import GenerateArguments, resolve
from .data import check_ids
from .folder import load_model, load_tokenizer
from .modeling.self_draft import SelfDraftOutput
from .observe import shares_read


class Generation(NamedTuple):
    """What `generate_text` returns."""

    text: str
    share: float  # mean share of the MLPs' weights that a token read, of the prompt and of the text
    budget: float | None  # that was asked for
    draft: SelfDraftOutput | None = None  # what a draft and its checks did, where there was one


def generate_text(folder: str | Path, prompt: str, arguments: GenerateArguments | None = None, **settings: Any) -> Generation:
    """
    The continuation of a prompt, or with `chat=True` the answer to it through the tokenizer's chat template; and the share of the
    weights that it really took, which on text unlike that of the calibration is another one than the budget.

    Args:
        folder: model folder or Hub id.
        prompt: text to continue, or the question.
        arguments, settings: the fields of `GenerateArguments`, as one object or by name.

    Raises:
        ValueError: an empty prompt, both settings, a budget that is not calibrated, or a chat without a chat template.
    """
    arguments = resolve(GenerateArguments, arguments, settings)
    model, tokenizer = _open(folder, prompt, arguments)
    return _generate(model, tokenizer, _turn(prompt) if arguments.chat else prompt, arguments)


def generate_on_terminal(
    folder: str | Path, prompt: str | None = None, arguments: GenerateArguments | None = None, **settings: Any
) -> Generation | None:
    """
    As `generate_text`, written to standard output word by word. With `chat` and without a prompt it is a conversation: questions are
    read from standard input until `/quit` or its end (Ctrl-D), and each answer is given all that was said before; the generation of the last
    one is returned, `None` where there was none.
    """
    arguments = resolve(GenerateArguments, arguments, settings)
    model, tokenizer = _open(folder, prompt, arguments)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if prompt is not None:
        return _generate(model, tokenizer, _turn(prompt) if arguments.chat else prompt, arguments, streamer)
    messages: list[dict] = []
    last = None
    for question in _questions():
        messages += _turn(question)
        limit = model.config.max_position_embeddings - arguments.max_new_tokens
        while len(messages) > 1 and inputs_of(tokenizer, messages)["input_ids"].shape[1] > limit:
            del messages[:2]  # the oldest question and its answer
        try:
            last = _generate(model, tokenizer, messages, arguments, streamer)
            messages.append({"role": "assistant", "content": last.text})
        except KeyboardInterrupt:
            print("\n(stopped)")
            messages.pop()
    return last


def _open(folder, prompt, arguments):
    """Model and tokenizer, the dial as the arguments say. What can be told without the model is told before it is loaded."""
    if prompt is None and not arguments.chat:
        raise ValueError("There is no prompt. Give some words to continue, or --chat for a conversation.")
    if prompt is not None and not prompt.strip():
        raise ValueError("The prompt is empty. Give some words to continue.")
    if sum(value is not None for value in (arguments.budget, arguments.sensitivity, arguments.draft_budget)) > 1:
        raise ValueError("More than one of budget, sensitivity and draft_budget was given. Give one of them.")
    tokenizer = load_tokenizer(folder)
    if arguments.chat and not tokenizer.chat_template:
        raise ValueError(
            f"The tokenizer of {folder} has no chat template, so nobody knows how its base writes a conversation. Generate without --chat, "
            "or put the base's chat_template.jinja into the folder."
        )
    model = load_model(folder)
    if arguments.budget is not None:
        model.set_budget(arguments.budget)
    elif arguments.sensitivity is not None:
        model.set_sensitivity(arguments.sensitivity)
    elif arguments.draft_budget is not None:
        model.set_sensitivity(1.0)  # that of the text
    if arguments.int8:
        model.pack("int8")
    torch.manual_seed(arguments.seed)
    return model, tokenizer


def _questions() -> Iterator[str]:
    """What is typed, line by line, until `/quit` or the end of the input."""
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if question == "/quit":
            return
        if question:
            yield question


def _turn(question) -> list[dict]:
    return [{"role": "user", "content": question}]


def _generate(model, tokenizer, prompt, arguments, streamer=None) -> Generation:
    """What follows a prompt, or a conversation of `{"role", "content"}`, and the share that it took."""
    inputs = inputs_of(tokenizer, prompt)
    sampling: dict[str, Any] = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {"do_sample": True, "temperature": arguments.temperature}
    if arguments.draft_budget is not None:
        sampling["draft_budget"] = arguments.draft_budget
    output = _continue(model, tokenizer, inputs, arguments.max_new_tokens, streamer=streamer, **sampling)
    text = tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    draft = output if isinstance(output, SelfDraftOutput) else None
    return Generation(text, share_of(model, output.sequences), arguments.budget, draft)


def inputs_of(tokenizer, prompt: str | list[dict]) -> dict:
    """A prompt, or a conversation of `{"role", "content"}` through the chat template, as inputs of a model."""
    if isinstance(prompt, str):
        return tokenizer(prompt, return_tensors="pt")
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def continue_text(model, tokenizer, prompt: str, max_new_tokens: int = 64) -> str:
    """The greedy continuation alone, with a model in memory."""
    inputs = inputs_of(tokenizer, prompt)
    output = _continue(model, tokenizer, inputs, max_new_tokens, do_sample=False)
    return tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _continue(model, tokenizer, inputs, max_new_tokens, **options) -> Any:
    """What `generate` returns: `sequences` are the token ids (1, S) of the inputs and of what follows."""
    check_ids(inputs["input_ids"], model.config)
    options |= {"max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.eos_token_id, "return_dict_in_generate": True}
    return model.generate(**inputs.to(model.device), **options)


@torch.no_grad()
def share_of(model, ids: torch.Tensor) -> float:
    """Mean share of the MLPs' weights that the tokens (1, S) read at the model's own setting of the dial."""
    with model.routing(records=[]) as routing:
        model.base_model(ids, use_cache=False)
    return shares_read(model, routing.records).mean().item()
