# SPDX-License-Identifier: Apache-2.0
"""A tokenizer as llama.cpp reads it from a GGUF file: vocabulary, merges or scores, special tokens, chat template."""

import json
import re
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase


# How a byte-level tokenizer cuts text before it merges, and whether it looks whole words up first -> llama.cpp's name of that.
GPT2 = "the pattern of GPT-2"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    ((GPT2,), False): "gpt-2",
    (("digit by digit", GPT2), False): "smollm",
    ((WORDS.format(numbers=r"\p{N}{1,3}"),), True): "llama-bpe",
    ((WORDS.format(numbers=r"\p{N}"),), False): "qwen2",
}
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "\u2581"  # what a SentencePiece vocabulary writes for a space


def add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, vocab_size: int, ends: list[int]) -> None:
    """
    Write the tokenizer's fields.

    Args:
        writer: a `gguf.GGUFWriter`.
        vocab_size: rows of the embedding: ids without a token are marked unused.
        ends: ids of the tokens at which a text ends, the tokenizer's own first.

    Raises:
        ValueError: a tokenizer that llama.cpp would not cut text like; the message names its part.
    """
    import gguf

    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = definition["model"], {token["id"]: token for token in definition["added_tokens"]}
    if model["type"] != "BPE":
        raise ValueError(_refusal(f"a model of type {model['type']}"))
    pieces = model["byte_fallback"]
    texts = {index: text for text, index in model["vocab"].items()} | {
        index: token["content"] for index, token in added.items()
    }
    tokens, kinds = [], []
    for index in range(vocab_size):
        text, kind = texts.get(index, f"[PAD{index}]"), gguf.TokenType.NORMAL
        if index not in texts:
            kind = gguf.TokenType.UNUSED
        elif pieces and text == model["unk_token"]:
            kind = gguf.TokenType.UNKNOWN
        elif index in added:
            special = added[index]["special"]
            kind = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
            text = text.replace(SPACE, " ") if pieces and not special else text
        elif pieces and BYTE.fullmatch(text):
            kind = gguf.TokenType.BYTE
        tokens.append(text)
        kinds.append(kind)
    if pieces:
        scores = _scores(model)
        writer.add_tokenizer_model("llama")
        writer.add_add_space_prefix(_adds_space(definition))
        writer.add_token_scores([scores.get(token, 0.0) for token in tokens])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(definition))
        writer.add_token_merges([" ".join(pair) for pair in _pairs(model)])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    _add_special_tokens(writer, tokenizer, ends)


def _add_special_tokens(writer, tokenizer, ends):
    """Ids of special tokens, which of them are added to every text, and the chat template."""
    adders = {"bos": writer.add_bos_token_id, "unk": writer.add_unk_token_id, "pad": writer.add_pad_token_id}
    for name, add in adders.items():
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            add(index)
    for index, add in zip(ends, (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)):
        add(index)
    empty = tokenizer("")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and empty[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and empty[-1:] == [tokenizer.eos_token_id])
    if template := tokenizer.chat_template:
        named = isinstance(template, dict)
        writer.add_chat_template([{"name": k, "template": v} for k, v in template.items()] if named else template)


def _pairs(model):
    """The merges as pairs; older files have them as one string."""
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]


def _pre_tokenizer(definition) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts text."""
    normalizer = (definition["normalizer"] or {}).get("type")
    if normalizer not in (None, "NFC"):  # llama.cpp leaves NFC out, and most text is NFC already
        raise ValueError(_refusal(f"the normalizer {normalizer}"))
    found = (_cuts(definition["pre_tokenizer"]), definition["model"]["ignore_merges"])
    if found not in PRE_TOKENIZERS:
        raise ValueError(_refusal(f"the pre-tokenizer {json.dumps(definition['pre_tokenizer'])}"))
    return PRE_TOKENIZERS[found]


def _cuts(part) -> tuple[str, ...]:
    """The steps of a pre-tokenizer, each in a word or as its pattern."""
    match part:
        case {"type": "Sequence", "pretokenizers": parts}:
            return tuple(step for each in parts for step in _cuts(each))
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": pattern}:
            return (GPT2,) if pattern else ()
        case {"type": "Digits", "individual_digits": True}:
            return ("digit by digit",)
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return (pattern,)
    return (json.dumps(part),)


def _adds_space(definition) -> bool:
    """Whether a SentencePiece tokenizer puts a space before a text."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    normalizer, pre_tokenizer = definition["normalizer"], definition["pre_tokenizer"]
    if normalizer == replace and pre_tokenizer in (None, split):
        return False
    if normalizer == {"type": "Sequence", "normalizers": [prepend, replace]} and pre_tokenizer is None:
        own = next((token["content"] for token in definition["added_tokens"] if token["normalized"]), None)
        if own is not None:  # it is looked for with the space that llama.cpp puts before it afterwards
            raise ValueError(_refusal(f"the added token {own!r} with `normalized=True`"))
        return True
    match pre_tokenizer:
        case {"type": "Metaspace", "replacement": "\u2581", "split": False, "prepend_scheme": scheme} if normalizer is None:
            return scheme != "never"
    raise ValueError(_refusal(f"the normalizer {json.dumps(normalizer)} before the pre-tokenizer {json.dumps(pre_tokenizer)}"))


def _scores(model) -> dict[str, float]:
    """
    Scores of the pieces. llama.cpp joins whatever two pieces give one of the vocabulary, the best score first; the merges name
    the pairs. Both are the same where the merges have every way to each piece, and all ways to a piece stand together.
    """
    merged = ["".join(pair) for pair in _pairs(model)]
    ranks = {piece: rank for rank, (piece, _) in enumerate(groupby(merged))}
    vocabulary, known = model["vocab"], set(_pairs(model))
    ways = {(piece[:cut], piece[cut:]) for piece in ranks for cut in range(1, len(piece))}
    missing = next((pair for pair in ways - known if pair[0] in vocabulary and pair[1] in vocabulary), None)
    if missing or len(ranks) != sum(1 for _ in groupby(merged)):
        raise ValueError(_refusal("merges that are not those of a SentencePiece model"))
    return {piece: -float(rank) for piece, rank in ranks.items()}


def _refusal(found: str) -> str:
    return (
        f"llama.cpp would cut text in another way than this tokenizer: found {found}. Supported are byte-level BPE, as SmolLM2, Llama 3 "
        "and Qwen have, and BPE of SentencePiece, as Llama 2 and Gemma have. Export without --gguf, and use llama.cpp's own converter."
    )
