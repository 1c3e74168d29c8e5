"""Tokenizers of the kinds that bases have, small and built in code."""

import json
from itertools import chain

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast


SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
TEMPLATE = "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {"llama3": LLAMA3, "qwen2": LLAMA3.replace("{1,3}", "")}
PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
CUTS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]),
    **{name: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(p), "isolated"), PLAIN]) for name, p in PATTERNS.items()},
}


def byte_level(kind, text, vocab_size):
    """BPE over bytes, as SmolLM2, Llama 3 and Qwen have."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    tokenizer.pre_tokenizer, tokenizer.decoder = CUTS[kind], decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return finished(tokenizer)


def sentence_piece(kind, text, vocab_size):
    """BPE over characters that falls back to bytes, as Llama 2 (a space before the text) and Gemma (none) have."""
    replace = normalizers.Replace(" ", "\u2581")
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace]) if kind == "llama2" else replace
    head = [*SPECIAL.values(), *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(
        [text.replace("\n", " ")], trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=head, show_progress=False)
    )
    definition = json.loads(trained.to_str())
    vocab, merges = definition["model"]["vocab"], definition["model"]["merges"]
    # A SentencePiece model names no pairs: every way to a piece counts, the best piece first.
    pieces = dict.fromkeys("".join(pair) for pair in merges)
    ways = chain.from_iterable(((piece[:cut], piece[cut:]) for cut in range(1, len(piece))) for piece in pieces)
    definition["model"]["merges"] = [pair for pair in ways if pair[0] in vocab and pair[1] in vocab]
    definition["added_tokens"] = [token for token in definition["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if kind == "llama2" else []))
    return finished(tokenizer)


def finished(tokenizer):
    """With special tokens, a token of the user's own, and a chat template."""
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)
    fast.add_tokens([AddedToken("<think>", normalized=False)])
    fast.chat_template = TEMPLATE
    return fast


TOKENIZERS = {**dict.fromkeys(CUTS, byte_level), "llama2": sentence_piece, "gemma": sentence_piece}


def tokenizer_of(kind, text, vocab_size=560):
    """A tokenizer of this kind, trained on a text, with room for `<think>` in `vocab_size`."""
    return TOKENIZERS[kind](kind, text, vocab_size - 8)
