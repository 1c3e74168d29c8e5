"""Text that a model writes itself: of its own distribution, with its chat template, the same in every run, and `train --text self`."""

import pytest
import torch
from conftest import tiny_dynamoe, tiny_tokenizer

from dynamoe_hf import self_text
from dynamoe_hf.convert import convert_model
from dynamoe_hf.self_text import own_text_file, write_texts
from dynamoe_hf.train import adapt_model, train_model


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(self_text, "BATCH", 4)
    monkeypatch.setattr(self_text, "LENGTH", 24)
    monkeypatch.setattr(self_text, "QUESTION", 8)


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["no template", "a template"])
def test_so_many_tokens_the_same_each_time(template):
    model, tokenizer = tiny_dynamoe(), tiny_tokenizer()
    tokenizer.chat_template = template
    texts = write_texts(model, tokenizer, 400)
    assert texts == write_texts(model, tokenizer, 400)
    assert texts != write_texts(model, tokenizer, 400, seed=1)
    assert 400 <= sum(len(tokenizer(text)["input_ids"]) for text in texts) < 800
    chats = [text for text in texts if text.startswith("[user]")]
    assert bool(chats) == bool(template)
    assert all("[assistant]" in text for text in chats)


def test_tokenizers_without_a_last_token_or_any():
    model, tokenizer = tiny_dynamoe(), tiny_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, None
    assert write_texts(model, tokenizer, 200)
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="found none in the tokenizer. Give files"):
        write_texts(model, tokenizer, 200)


def test_it_is_the_full_width_that_writes(monkeypatch):
    model, tokenizer, seen = tiny_dynamoe(), tiny_tokenizer(), []
    for mlp in model.nested_mlps:
        mlp.register_forward_hook(lambda mlp, args, output: seen.append(mlp.slot.current.force_expert))
    write_texts(model, tokenizer, 50)
    assert set(seen) == {model.config.expert_count - 1}


def test_the_chat_template_is_continued():
    """What comes before a question, as the template writes it, is what the model continues."""
    model, tokenizer, prompts = tiny_dynamoe(), tiny_tokenizer(), []
    tokenizer.chat_template = TEMPLATE
    original = model.generate

    def generate(input_ids, **options):
        prompts.extend(tokenizer.batch_decode(input_ids, skip_special_tokens=True))
        return original(input_ids=input_ids, **options)

    model.generate = generate
    self_text._conversations(model, tokenizer)
    assert prompts[:4] == ["[user]"] * 4
    assert all(prompt.endswith(";[assistant]") for prompt in prompts[4:])


def test_train_on_own_text_and_files(dense_folder, text_file, tmp_path):
    convert_model(dense_folder, tmp_path / "converted", max_tokens=512, block_size=32)
    settings = {"max_tokens": 512, "block_size": 16, "batch_size": 2, "router_tokens": 256, "self_tokens": 300}
    record = train_model(tmp_path / "converted", tmp_path / "trained", text=["self", text_file], **settings)
    assert record["text"] == ["self", text_file.name]
    assert record["settings"]["self_tokens"] == 300
    assert not (tmp_path / "trained.text").exists(), "the text goes with the checkpoints"


def test_several_processes_are_told(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"One process writes.*found 2"):
        own_text_file("self", tmp_path, tmp_path / "text", 100)
    assert own_text_file(["a.txt"], tmp_path, tmp_path / "text", 100) == ["a.txt"]
    (tmp_path / "text").write_text("written before")
    assert own_text_file("self", tmp_path, tmp_path / "text", 100) == [tmp_path / "text"]


def test_adapt_has_nothing_to_learn_from_it(tmp_path):
    with pytest.raises(ValueError, match="`adapt` teaches a text that the base does not know"):
        adapt_model(tmp_path, tmp_path / "out", text="self")


def test_documents_that_are_cut(monkeypatch):
    """A text ends where the model ends it: padding is not part of it."""
    model, tokenizer = tiny_dynamoe(), tiny_tokenizer()
    end = tokenizer.eos_token_id
    monkeypatch.setattr(model, "generate", lambda input_ids, **options: torch.tensor([[1, 70, 71, end, end]] * len(input_ids)))
    assert set(self_text._documents(model, tokenizer)) == {"FG"}
