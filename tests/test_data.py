"""Token blocks: nothing lost, nothing repeated, and the splits of the topics share no paragraph."""

import json
import tracemalloc

import datasets
import pytest
import torch
from conftest import tiny_dynamoe, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from dynamoe_hf import adapt_model, convert_model
from dynamoe_hf.data import (
    dataset_documents,
    documents_for,
    iterate_blocks,
    packed_blocks,
    read_documents,
    token_blocks,
    topic_documents,
)
from dynamoe_hf.folder import load_tokenizer


def test_blocks_hold_every_token_once():
    tokenizer = tiny_tokenizer()
    documents = ["one two", "three", "four five six"]
    blocks = token_blocks(documents, tokenizer, block_size=4)
    text = tokenizer.decode(blocks.flatten(), skip_special_tokens=False)
    whole = "".join(document + "<2>" for document in documents)
    assert whole.startswith(text)
    assert len(whole.replace("<2>", "#")) - blocks.numel() < 4, "only an incomplete last block may be dropped"
    assert token_blocks(documents, tokenizer, 4, max_tokens=9).shape == (2, 4)
    assert torch.equal(token_blocks(iter(documents), tokenizer, 4), blocks)


def test_few_blocks_stand_for_the_whole_text():
    """Two thirds of one subject, then another: a text is not read from its beginning alone, nor all of a long one."""
    tokenizer, read = tiny_tokenizer(), []
    documents = [letter * 300 for letter in "a" * 40 + "b" * 20]

    class Counting:
        eos_token_id, bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id

        def __call__(self, text, **options):
            read.append(len(text))
            return tokenizer(text, **options)

    blocks = token_blocks(documents, Counting(), 16, max_tokens=40 * 16)
    assert blocks.shape == (40, 16)
    text = tokenizer.decode(blocks.flatten())
    assert 0.55 < text.count("a") / (text.count("a") + text.count("b")) < 0.78
    assert sum(read) <= 40 * 16 * 16 < 60 * 300, "a long text must not be tokenised whole"
    assert torch.equal(blocks, token_blocks(documents, tokenizer, 16, max_tokens=40 * 16)), "the same in every run"
    ends = (blocks == tokenizer.eos_token_id).any(-1).float().mean()
    assert ends < 0.1, "a block ends within a document, as most of these do"
    whole = token_blocks(documents[:2], tokenizer, 16)
    sample = {tuple(block) for block in token_blocks(documents[:2], tokenizer, 16, max_tokens=10 * 16).tolist()}
    assert sample <= {tuple(block) for block in whole.tolist()}
    first = token_blocks(iter(documents), tokenizer, 16, max_tokens=40 * 16)
    assert "b" not in tokenizer.decode(first.flatten()), "a stream is read from its beginning"


def test_blocks_are_streamed():
    def endless():
        while True:
            yield "abc " * 10

    blocks = iterate_blocks(endless(), tiny_tokenizer(), 16)
    assert [len(next(blocks)) for _ in range(50)] == [16] * 50


def test_topic_splits_share_no_paragraph():
    splits = {split: topic_documents(split) for split in ("held-out", "calibration", "training")}
    paragraphs = {
        split: {" ".join(p.split()) for document in documents for p in document.split("\n\n") if p.strip()}
        for split, documents in splits.items()
    }
    assert not paragraphs["held-out"] & paragraphs["training"]
    assert not paragraphs["held-out"] & paragraphs["calibration"]
    assert not paragraphs["calibration"] & paragraphs["training"]
    sizes = {split: sum(map(len, documents)) for split, documents in splits.items()}
    assert sizes["training"] > sizes["held-out"] > 60_000
    assert sizes["calibration"] > 40_000


def test_local_dataset(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "first"}\n{"text": "second"}\n')
    assert list(dataset_documents(str(tmp_path))) == ["first", "second"]
    with pytest.raises(ValueError, match="no column 'body', found text"):
        list(dataset_documents(str(tmp_path), column="body"))


@pytest.mark.parametrize("value", ["null", "3", '["a"]'])
def test_a_row_without_text_is_named(value, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "first", "other": null}\n{"text": "second", "other": ' + value + "}\n")
    assert list(dataset_documents(str(tmp_path))) == ["first", "second"]
    with pytest.raises(
        ValueError, match=r"Row 0 of dataset .* has no text in column 'other', found None. Leave such rows out"
    ):
        list(dataset_documents(str(tmp_path), column="other"))
    (tmp_path / "rows.jsonl").write_text('{"text": "first"}\n{"text": null}\n')
    documents = dataset_documents(str(tmp_path))
    assert next(documents) == "first"
    with pytest.raises(ValueError, match="Row 1 of dataset"):
        next(documents)


@pytest.mark.parametrize("content", ["null", "7", "{}"])
def test_a_message_without_text_is_named(content, tmp_path):
    """A chat template would write the word None. Calls of tools have no text and are messages."""
    question, answer = '{"role": "user", "content": "Why?"}', f'{{"role": "assistant", "content": {content}}}'
    (tmp_path / "rows.jsonl").write_text(f'{{"text": [{question}, {answer}]}}\n')
    # Older versions of datasets fail on columns of several types.
    with pytest.raises(ValueError, match="Row 0 of dataset .* has no text in column 'text'|cannot be read from row 0 on"):
        list(dataset_documents(str(tmp_path / "rows.jsonl")))
    called = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]},
    ]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": called}))
    assert len(list(dataset_documents(str(tmp_path / "rows.jsonl")))) == 1


def test_blank_rows_are_no_documents(tmp_path):
    """Else a dataset of empty texts would be one of ends of texts, and something to train on."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("", "first", " \n", "second")))
    assert list(dataset_documents(str(tmp_path / "rows.jsonl"))) == ["first", "second"]


@pytest.mark.parametrize("rows", ["", '{"text": "first"}\n{"text"'])
def test_a_damaged_dataset_is_named(rows, tmp_path):
    (tmp_path / "rows.jsonl").write_text(rows)
    with pytest.raises(ValueError, match=r"Dataset .*rows\.jsonl cannot be read"):
        list(dataset_documents(str(tmp_path / "rows.jsonl")))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("beyond", ["text", "end"])
def test_ids_beyond_the_vocabulary_are_told_before_training(beyond, streamed, dense_folder, tmp_path):
    """Also the end of a text, which few blocks hold, and where the text is streamed."""
    convert_model(dense_folder, tmp_path / "model", max_tokens=512, block_size=64)
    tokenizer = load_tokenizer(tmp_path / "model")
    tokenizer.add_special_tokens({"eos_token": "<end>"}) if beyond == "end" else tokenizer.add_tokens(["zz"])
    tokenizer.save_pretrained(tmp_path / "model")
    text = ("zz " if beyond == "text" else "") + "a quiet word and " * 50
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": text}))
    source = {"dataset": str(tmp_path / "rows.jsonl")} if streamed else {"text": str(tmp_path / "text.txt")}
    with pytest.raises(ValueError, match="found token id 128 and a vocabulary of 128"):
        adapt_model(tmp_path / "model", tmp_path / "out", max_tokens=1024, block_size=32, batch_size=2, **source)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("begins", [False, True])
def test_a_vocabulary_without_letters(begins):
    """Of DNA, without a token for what it does not know: nothing is assumed of its letters."""
    from tokenizers import Tokenizer, models, processors

    plain = Tokenizer(models.BPE(vocab={"<s>": 0, "A": 1, "C": 2, "G": 3, "T": 4}, merges=[]))
    if begins:
        plain.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>")
    blocks = token_blocks(["ACGTACGT", "xyz"], tokenizer, 4)
    assert blocks.tolist() == ([[0, 1, 2, 3], [0, 4, 1, 2]] if begins else [[1, 2, 3, 4], [1, 2, 3, 4]])


def test_bad_text(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        read_documents(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match=r"binary\.txt cannot be read"):
        read_documents([tmp_path / "binary.txt"])
    with pytest.raises(ValueError, match=r"missing\.txt cannot be read"):
        read_documents(tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="too short.*512"):
        token_blocks(["short"], tiny_tokenizer(), 512)
    for block_size in (-4, 0, 1):  # with a token before each text, blocks of one would never end
        with pytest.raises(ValueError, match=f"two tokens or more.*found {block_size}"):
            token_blocks(["some words"], tiny_tokenizer(), block_size, 64)
    with pytest.raises(ValueError, match="Give one of them"):
        documents_for("training", text="a.txt", dataset="b")
    with pytest.raises(ValueError, match="no split 'test'"):
        topic_documents("test")


def test_form_feed_divides_documents(tmp_path):
    (tmp_path / "two.txt").write_text("first\fsecond\f\n")
    assert read_documents(tmp_path / "two.txt") == ["first", "second"]


ROWS = {"text": ["first", "second", "third"], "body": ["one", "two", "three"]}
WRITERS = {
    "rows.jsonl": lambda rows, path: rows.to_json(path),
    "rows.jsonl.gz": lambda rows, path: rows.to_json(path, compression="gzip"),
    "rows.parquet": lambda rows, path: rows.to_parquet(path),
    "saved": lambda rows, path: rows.save_to_disk(path),
    "splits": lambda rows, path: datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(path),
    "folder/part-0.parquet": lambda rows, path: rows.to_parquet(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_local_datasets(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    WRITERS[name](datasets.Dataset.from_dict(ROWS), str(tmp_path / name))
    source = tmp_path / name.split("/")[0]
    assert list(dataset_documents(str(source))) == ROWS["text"]
    assert list(dataset_documents(str(source), column="body")) == ROWS["body"]
    with pytest.raises(ValueError, match="no column 'words', found text, body"):
        next(dataset_documents(str(source), column="words"))


def test_datasets_that_are_not_there(tmp_path):
    datasets.Dataset.from_dict(ROWS).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(test=datasets.Dataset.from_dict(ROWS)).save_to_disk(tmp_path / "splits")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.parquet").write_text("no parquet")
    for name in ("missing.jsonl", "empty", "splits", "broken.parquet"):
        with pytest.raises(ValueError, match=f"{name} cannot be read: .*Give an id of the Hub"):
            next(dataset_documents(str(tmp_path / name)))


def test_a_long_dataset_is_never_in_memory(tmp_path):
    line = json.dumps({"text": "abc " * 250}) + "\n"
    with open(tmp_path / "rows.jsonl", "w") as file:
        file.writelines(line for _ in range(60_000))  # 60 MB
    blocks = packed_blocks(dataset_documents(str(tmp_path / "rows.jsonl")), tiny_tokenizer(), 64)
    next(blocks)
    tracemalloc.start()
    count = sum(1 for _, block in zip(range(2000), blocks) if len(block.ids) == 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2000 and peak < 30e6


CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
CONVERSATION = [
    {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"},
    {"role": "user", "content": "who"}, {"role": "assistant", "content": "me"},
]  # fmt: skip


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.parquet"])
def test_answers_alone_are_learned(name, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    write = WRITERS[name.replace("chats", "rows")]
    write(datasets.Dataset.from_dict({"messages": [CONVERSATION] * 3}), str(tmp_path / name))
    documents = list(dataset_documents(str(tmp_path / name), column="messages"))
    text = "[user]hi\n[assistant]yes?\n[user]who\n[assistant]me\n"
    (block,) = packed_blocks(documents[:1], tokenizer, len(text))
    example = block.example(apart=False)
    assert tokenizer.decode(example["input_ids"]) == text
    learned = tokenizer.decode(example["labels"][example["labels"] != -100])
    assert learned == "yes?\nme\n", "the answers, with what ends them"
    assert "position_ids" not in example
    with pytest.raises(ValueError, match="need a chat template, found none"):
        next(packed_blocks(documents, tiny_tokenizer(), 16))


def test_an_answer_that_changes_as_the_conversation_goes_on_is_not_learned():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT.replace(
        "{{ m.content }}", "{{ '(thought)' if loop.last and m.role == 'assistant' }}{{ m.content }}"
    )
    text = "[user]hi\n[assistant]yes?\n[user]who\n[assistant](thought)me\n"
    (block,) = packed_blocks([CONVERSATION], tokenizer, len(text))
    labels = block.example(apart=True)["labels"]
    assert tokenizer.decode(labels[labels != -100]) == "(thought)me\n"


def test_packed_documents_are_kept_apart():
    """Each token of a packed block gets the logits of its document alone."""
    tokenizer, model = tiny_tokenizer(), tiny_dynamoe()
    texts = ["first one", "second", "the third one"]
    length = sum(map(len, texts)) + len(texts)
    (block,) = packed_blocks(texts, tokenizer, length)
    example = {name: value[None] for name, value in block.example(apart=True).items()}
    with torch.no_grad():
        packed = model(example["input_ids"], position_ids=example["position_ids"], sensitivity=0.6, use_cache=False).logits[0]
        place = 0
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
            alone = model(ids, sensitivity=0.6, use_cache=False).logits[0]
            torch.testing.assert_close(packed[place : place + ids.numel()], alone, rtol=1e-4, atol=1e-4)
            assert example["labels"][0, place] == -100, "nothing before it tells the first token"
            assert torch.equal(example["labels"][0, place + 1 : place + ids.numel()], ids[0, 1:])
            place += ids.numel()
    cut = [block.example(apart=True)["position_ids"].tolist() for block in packed_blocks(texts, tokenizer, 8)]
    assert cut == [[*range(8)], [0, 1, *range(6)], [0, *range(7)]], "a document that goes on begins anew in each block"
