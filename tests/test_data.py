"""Token blocks: nothing lost, nothing repeated, and the splits of the topics share no paragraph."""

import pytest
import torch
from conftest import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from dynamoe_hf.data import dataset_documents, documents_for, iterate_blocks, read_documents, token_blocks, topic_documents


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
