# SPDX-License-Identifier: Apache-2.0
"""Text or a dataset -> blocks of token ids. Every stage reads its text through here."""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch


TOPIC_SHARES = {"held-out": 0.2, "calibration": 0.15}  # of the characters; the rest is for training
WINDOW = 16  # characters of a long text that are read for each token wanted; prose has 3 to 5 in a token
SPACE = re.compile(r"\s")
FILE_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # what `datasets` calls them, by the first suffix

Document = str | list[dict]  # a text, or the messages of a conversation


def topic_documents(split: str) -> list[str]:
    """
    English prose that every Python carries (`pydoc_data.topics`), split by topic into `"calibration"`, `"training"` and
    `"held-out"`. The text of stages that are not given any, so that each of them reads another part.

    Topics quote each other, so a paragraph that a protected split holds is dropped from the others.
    """
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    names = sorted(topics, key=lambda name: hashlib.sha256(name.encode()).digest())
    total = sum(map(len, topics.values()))
    splits: dict[str, list[str]] = {}
    seen: set[str] = set()
    for part, share in TOPIC_SHARES.items():
        splits[part], size = [], 0
        while names and size < share * total:
            splits[part].append(names.pop())
            size += len(topics[splits[part][-1]])
    splits["training"] = names
    documents = {}
    for part, members in splits.items():
        documents[part] = [
            "\n\n".join(p for p in topics[name].split("\n\n") if " ".join(p.split()) not in seen) for name in members
        ]
        seen.update(" ".join(p.split()) for name in members for p in topics[name].split("\n\n"))
    if split not in documents:
        raise ValueError(f"There is no split {split!r} of the topics. Choose one of {', '.join(documents)}.")
    return [document for document in documents[split] if document.strip()]


def read_documents(text: str | Path | Iterable[str | Path]) -> list[str]:
    """
    The documents of one or more UTF-8 text files. A form feed in a file separates two documents.

    Raises:
        ValueError: a file is missing, not text, or holds nothing.
    """
    documents = []
    for path in [text] if isinstance(text, str | Path) else text:
        try:
            content = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"The text file {path} cannot be read: {error}. Give a UTF-8 text file.") from error
        if not content.strip():
            raise ValueError(f"The text file {path} is empty. Give a file with some thousand words of prose.")
        documents += [part for part in content.split("\f") if part.strip()]
    return documents


def dataset_documents(dataset: str, split: str = "train", column: str = "text") -> Iterator[Document]:
    """
    Documents of a dataset, streamed: texts, or conversations where the column holds messages. `dataset` is an id of the Hub, or
    `id:config`; a JSONL, JSON or Parquet file, or a folder of them; or a folder of `save_to_disk`.

    Raises:
        ValueError: there is no such dataset or column, its file is damaged, or a row is neither text nor messages.
    """
    rows, name = _rows(dataset, split)
    for index, row in enumerate(_whole(rows, name)):
        if column not in row:
            raise ValueError(f"Dataset {name} has no column {column!r}, found {', '.join(row)}. Name it with --column.")
        document = row[column]
        if not (isinstance(document, str) or is_conversation(document)):
            raise ValueError(
                f"Row {index} of dataset {name} has no text in column {column!r}, found {document!r:.60}. Leave such rows out of the "
                "dataset, or name a column of text, or of messages with `role` and `content`, with --column."
            )
        if not isinstance(document, str) or document.strip():  # as in text files, what is blank is no document
            yield document


def _whole(rows, name):
    """The rows, with damage to their file told in one sentence: readers see it when they come to it."""
    rows, count = iter(rows), 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            if count == 0:
                raise ValueError(f"Dataset {name} cannot be read: it is empty. Give one that has rows.") from None
            return
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"Dataset {name} cannot be read from row {count} on: {error}. Repair its file, or leave the damaged one out."
            ) from error
        yield row
        count += 1


def _rows(dataset, split):
    """The rows of a dataset, of which few are in memory at a time, and its name."""
    import datasets

    path = Path(dataset)
    kind = FILE_KINDS.get(next(iter(path.suffixes), ""))
    try:
        if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(path)
            return (saved[split] if isinstance(saved, dict) else saved).to_iterable_dataset(), path.name
        if path.is_file() and kind:
            return datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True), path.name
        name, _, config = dataset.partition(":")
        return datasets.load_dataset(name, config or None, split=split, streaming=True), name
    except (OSError, ValueError, KeyError, StopIteration) as error:  # an empty file is a StopIteration
        raise ValueError(
            f"Dataset {dataset} cannot be read: {str(error) or 'it is empty'}. Give an id of the Hub, a JSONL or Parquet file, a folder of "
            f"them, or one that `save_to_disk` has written, with a split {split!r}."
        ) from error


def is_conversation(document) -> bool:
    """Whether a document is a list of messages, as chat templates take them, and not a text. A template writes whatever is no text."""
    return isinstance(document, list) and bool(document) and all(map(_is_message, document))


def _is_message(message):
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    return isinstance(message.get("content"), str | list) or bool(message.get("tool_calls"))


def _encoded(document: Document, tokenizer) -> tuple[list[int], list[bool]]:
    """
    The token ids of a text, or of a conversation in the tokenizer's template, and which of them are learned: all of a text, of a
    conversation the answers, with what ends them. An answer that the template writes in another way once the conversation goes on, as
    some do with thoughts, is not learned.
    """
    if isinstance(document, str):
        # A long document is one "sequence longer than the model's maximum" to the tokenizer, and that is as intended here.
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        return ids, [True] * len(ids)
    if not tokenizer.chat_template:
        raise ValueError(
            "Conversations need a chat template, found none in the tokenizer. Name a column of text with --column."
        )

    def written(messages, **options):
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    text, spans = written(document), []
    for index, message in enumerate(document):
        if message["role"] == "assistant":
            before, after = written(document[:index], add_generation_prompt=True), written(document[: index + 1])
            if text.startswith(after) and after.startswith(before):
                spans.append((len(before), len(after)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    learned = [any(begin <= start < end for begin, end in spans) for start, _ in encoded["offset_mapping"]]
    return encoded["input_ids"], learned


class Block(NamedTuple):
    """Packed tokens: their ids, whether each is learned, and whether a document begins with it."""

    ids: list[int]
    learned: list[bool]
    begins: list[bool]

    def cut(self, first: int, last: int | None = None) -> "Block":
        return Block(self.ids[first:last], self.learned[first:last], self.begins[first:last])

    def example(self, apart: bool) -> dict[str, torch.Tensor]:
        """
        What a Trainer reads: `input_ids` and `labels`, (S,) int64. `apart`: and `position_ids` that begin anew with each document, by
        which transformers keeps documents from each other; no document's first token is learned from the one before.
        """
        ids, learned, begins = torch.tensor(self.ids), torch.tensor(self.learned), torch.tensor(self.begins)
        if not apart:
            return {"input_ids": ids, "labels": ids.masked_fill(~learned, -100)}
        places = torch.arange(len(ids))
        positions = places - places.where(begins, 0).cummax(0).values
        return {"input_ids": ids, "labels": ids.masked_fill(~learned | begins, -100), "position_ids": positions}


def packed_blocks(documents: Iterable[Document], tokenizer, block_size: int) -> Iterator[Block]:
    """
    Documents, an end-of-text token after each text, packed one after the other into blocks of `block_size` tokens. Each block
    begins with the begin-of-text token where the tokenizer puts one before a text: some families are lost without it.
    """
    if block_size < 2:
        raise ValueError(f"A block must have two tokens or more, one to predict from another: found {block_size}.")
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    bos = tokenizer.bos_token_id
    # A vocabulary need not know any letter: some are of DNA or of digits alone.
    start = [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
    block_size -= len(start)
    begin = [True] * len(start)
    buffer = Block([], [], [])
    for document in documents:
        ids, learned = _encoded(document, tokenizer)
        ending = end if isinstance(document, str) else []
        buffer.ids.extend(ids + ending)
        buffer.learned.extend(learned + [True] * len(ending))
        buffer.begins.extend(index == 0 for index in range(len(ids + ending)))
        whole = len(buffer.ids) // block_size * block_size
        for place in range(0, whole, block_size):
            block = buffer.cut(place, place + block_size)
            yield Block(start + block.ids, begin + block.learned, begin + block.begins)
        buffer = buffer.cut(whole)


def iterate_blocks(documents: Iterable[Document], tokenizer, block_size: int) -> Iterator[list[int]]:
    """The token ids of `packed_blocks`."""
    return (block.ids for block in packed_blocks(documents, tokenizer, block_size))


def token_blocks(
    documents: Iterable[Document], tokenizer, block_size: int = 512, max_tokens: int | None = None
) -> torch.Tensor:
    """
    Packed token ids, (N, `block_size`) int64: N whole blocks of at most `max_tokens` tokens in all, but one at least.

    If a list of documents holds more, they are evenly spread over all of it, for a text may begin with one subject and end with
    another, and come in a random order, the same in every run. Of an iterator they are the first.

    Raises:
        ValueError: the text does not fill one block, or a block is too small.
    """
    limit = None if max_tokens is None else max(1, max_tokens // max(1, block_size))
    if limit is None or not isinstance(documents, list):
        blocks = [torch.tensor(block) for block in itertools.islice(iterate_blocks(documents, tokenizer, block_size), limit)]
    else:
        blocks = _spread_blocks(documents, tokenizer, block_size, limit)
    if not blocks:
        raise ValueError(
            f"The text is too short: it does not fill one block of {block_size} tokens. Give more text, or a smaller --block-size."
        )
    return torch.stack(blocks)


def check_ids(ids: torch.Tensor, config, tokenizer=None) -> None:
    """
    Raise `ValueError` where token ids lie beyond the vocabulary of the model that has this config, or the one does that `tokenizer`
    puts after a text.
    """
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids = torch.cat([ids.flatten(), torch.tensor([tokenizer.eos_token_id])])
    vocabulary = getattr(getattr(config, "base_config", config), "vocab_size", None)
    if vocabulary is not None and ids.numel() and ids.max() >= vocabulary:
        raise ValueError(
            f"Tokenizer and model do not belong together: found token id {ids.max()} and a vocabulary of {vocabulary}. Give the "
            "model the tokenizer that it was trained with."
        )


def _spread_blocks(documents, tokenizer, block_size, count):
    """
    At most `count` blocks, evenly spread over the documents, in a random order: of a long text the first block of each of as many
    windows. One of each, for a block that goes on in the next window would have an end of text where no document ends.
    """
    text, size = "\f".join(documents), WINDOW * block_size
    blocks: list[torch.Tensor] = []
    if len(text) > count * size:
        for index in range(count):
            start = index * (len(text) - size) // max(1, count - 1)
            if space := SPACE.search(text, start, start + 64):
                start = space.start()  # where a word begins
            parts = [part for part in text[start : start + size].split("\f") if part.strip()]
            blocks += map(torch.tensor, itertools.islice(iterate_blocks(parts, tokenizer, block_size), 1))
    if len(blocks) < count:  # the windows would have held all of it, or some held no block
        blocks = [torch.tensor(block) for block in iterate_blocks(documents, tokenizer, block_size)]
    spread = torch.linspace(0, len(blocks) - 1, min(count, len(blocks))).long()
    order = torch.randperm(len(spread), generator=torch.Generator().manual_seed(0))
    return [blocks[index] for index in spread[order].tolist()]


def documents_for(stage_split: str, text=None, dataset: str | None = None, column: str = "text"):
    """
    The documents a stage reads: a list of those of `text` files, or an iterator over a `dataset`, or else over the stage's own
    split of the Python topics, which come in no order.
    """
    if text is not None and dataset is not None:
        raise ValueError("Both a text and a dataset were given. Give one of them.")
    if dataset is not None:
        return dataset_documents(dataset, column=column)
    return iter(topic_documents(stage_split)) if text is None else read_documents(text)


def text_names(text) -> str | list[str]:
    """What a record says of the text that a stage read: file names, without their place on this machine."""
    if text is None:
        return "pydoc_data.topics"
    return [Path(path).name for path in ([text] if isinstance(text, str | Path) else text)]


def dataset_name(dataset: str) -> str:
    """What a record says of a dataset: its id, or of one on this machine the name."""
    return Path(dataset).name if Path(dataset).exists() else dataset
