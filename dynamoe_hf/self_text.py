# SPDX-License-Identifier: Apache-2.0
"""
Text that a model writes itself, at full width: what routers and narrow experts meet when the model is used is then what they have
learned on, and no corpus is needed (after LLM-QAT, Liu et al., 2023, arXiv 2305.17888).
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .folder import load_model, load_tokenizer
from .modeling import DynaMoEForCausalLM


SELF = "self"  # what stands for this text among the names of files

BATCH = 32  # texts that are sampled together
LENGTH = 256  # tokens of one text at most
QUESTION = 64  # tokens of a question at most
TOP_K = 100  # tokens to draw from: the tail of a small model is noise


def write_texts(model: DynaMoEForCausalLM, tokenizer, tokens: int, seed: int = 0) -> list[str]:
    """
    Documents of about so many tokens in all, sampled at temperature 1. Where the tokenizer has a chat template every second batch
    is of conversations, whose question the model writes as well; the others begin from nothing.
    """
    torch.manual_seed(seed)
    texts: list[str] = []
    chats, written = bool(tokenizer.chat_template), 0
    with tqdm(total=tokens, desc="Writing text", leave=False) as progress:
        while written < tokens:
            chat = chats and (len(texts) // BATCH) % 2 == 1
            found = _conversations(model, tokenizer) if chat else _documents(model, tokenizer)
            count = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in found)
            written += count
            progress.update(count)
            texts += found
    return texts


def own_text_file(
    text: str | Path | Sequence[str | Path] | None,
    folder: str | Path,
    file: Path,
    tokens: int,
    seed: int = 0,
    bf16: bool = False,
) -> str | Path | Sequence[str | Path] | None:
    """
    The files of a text, with `self` replaced by `file`, which is written if it is not there: text that the model of `folder`
    writes itself, of so many tokens.

    Raises:
        ValueError: the text is to be written by several processes at once.
    """
    names: list[str | Path] = [] if text is None else [text] if isinstance(text, str | Path) else list(text)
    if SELF not in names:
        return text
    if not file.exists():
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                f"One process writes the text of `--text self`, found {os.environ['WORLD_SIZE']}. Write it before, to a file: "
                "`write_texts` of `dynamoe_hf.self_text`; and give that file."
            )
        model = load_model(folder)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            texts = write_texts(model, load_tokenizer(folder), tokens, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        staging = file.with_name(f".{file.name}.{os.getpid()}.partial")
        staging.write_text("\f".join(each.replace("\f", " ") for each in texts), encoding="utf-8")
        os.replace(staging, file)
    return [file if name == SELF else name for name in names]


def _documents(model, tokenizer) -> list[str]:
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise ValueError(
            "A text of the model's own begins with a token that begins or ends one, found none in the tokenizer. Give files."
        )
    sampled = _sample(model, tokenizer, [[first]] * BATCH, LENGTH)
    return [text for text in tokenizer.batch_decode(sampled, skip_special_tokens=True) if text.strip()]


def _conversations(model, tokenizer) -> list[str]:
    """Questions that continue the template's words before one, and answers to them, as the template writes both."""
    mark = "\0"
    before = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False).partition(mark)[0]
    ids = tokenizer(before, add_special_tokens=False)["input_ids"]
    questions = tokenizer.batch_decode(_sample(model, tokenizer, [ids] * BATCH, QUESTION), skip_special_tokens=True)
    asked = [[{"role": "user", "content": question.strip()}] for question in questions if question.strip()]
    if not asked:
        return []
    prompts = [tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in asked]
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    answers = tokenizer.batch_decode(_sample(model, tokenizer, ids, LENGTH), skip_special_tokens=True)
    return [
        tokenizer.apply_chat_template([*each, {"role": "assistant", "content": answer}], tokenize=False)
        for each, answer in zip(asked, answers)
        if answer.strip()
    ]


@torch.no_grad()
def _sample(model, tokenizer, prompts: list[list[int]], length: int) -> list[list[int]]:
    """What the model writes after each prompt, without it, at full width."""
    longest = max(map(len, prompts))
    padding = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0  # masked, so any token will do
    ids = torch.tensor([[padding] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    output = model.generate(
        input_ids=ids, attention_mask=mask, force_expert=model.config.expert_count - 1, max_new_tokens=length,
        do_sample=True, temperature=1.0, top_k=TOP_K, pad_token_id=padding,
    )  # fmt: skip
    return output[:, longest:].tolist()
