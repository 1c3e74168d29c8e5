"""Text on the terminal: streamed, through the chat template, as a conversation; it stops where the base stops."""

import io
import re
import sys

import pytest
import torch
from conftest import tiny_dense, tiny_dynamoe, tiny_tokenizer

from dynamoe_hf import cli, generate
from dynamoe_hf.card import render_card
from dynamoe_hf.convert import convert_model
from dynamoe_hf.folder import load_model
from dynamoe_hf.generate import generate_on_terminal, generate_text, inputs_of


TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}:{{ message['content'] }}]{% endfor %}"
    "{% if add_generation_prompt %}[assistant:{% endif %}"
)


def saved(folder, template=TEMPLATE, **dense):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    tiny_dynamoe(dense_settings=dense).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture
def asked(monkeypatch):
    """The texts that models are asked to continue, as they are asked."""
    texts = []

    def remember(tokenizer, prompt):
        inputs = inputs_of(tokenizer, prompt)
        texts.append(tokenizer.decode(inputs["input_ids"][0]))
        return inputs

    monkeypatch.setattr(generate, "inputs_of", remember)
    return texts


def test_an_answer_is_streamed_and_returned(folder, asked, capsys):
    expected = generate_text(folder, "Why?", chat=True, max_new_tokens=6)
    assert asked == ["[user:Why?][assistant:"]
    found = generate_on_terminal(folder, "Why?", chat=True, max_new_tokens=6)
    assert found == expected
    assert capsys.readouterr().out == expected.text + "\n"
    assert 0 < found.share <= 1


def test_a_conversation_keeps_what_was_said(folder, asked, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Why?\n\nAnd then?\n/quit\nnever read\n"))
    assert cli.main(["generate", str(folder), "--chat", "--max-new-tokens", "5"]) == 0
    first = generate_text(folder, "Why?", chat=True, max_new_tokens=5).text
    assert asked[0] == "[user:Why?][assistant:"
    assert f"[user:Why?][assistant:{first}][user:And then?][assistant:" in asked
    assert not any("never" in text for text in asked)
    written = capsys.readouterr()
    assert written.out.startswith(f"> {first}\n> ")
    assert "of the MLPs' weights" in written.err


def test_a_conversation_ends_with_the_input(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert cli.main(["generate", str(folder), "--chat"]) == 0
    assert capsys.readouterr().out == "> \n"


def test_an_answer_can_be_stopped(folder, asked, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Why?\nWho?\n"))
    whole, calls = generate._continue, []

    def interrupted_once(*args, **options):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return whole(*args, **options)

    monkeypatch.setattr(generate, "_continue", interrupted_once)
    assert generate_on_terminal(folder, chat=True, max_new_tokens=3).text
    assert asked[-1] == "[user:Who?][assistant:", "a question without an answer is forgotten"
    assert "(stopped)" in capsys.readouterr().out


def test_a_long_conversation_forgets_its_beginning(tmp_path, asked, monkeypatch):
    folder = saved(tmp_path / "model", max_position_embeddings=64)
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"question {index}\n" for index in range(4))))
    generate_on_terminal(folder, chat=True, max_new_tokens=4)
    assert asked[-1].startswith("[user:question 3]")
    assert all(len(text) <= 60 for text in asked[-1:])


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--chat"], "no chat template"), (["Why?", "--chat"], "no chat template"), ([], "There is no prompt")],
)
def test_what_cannot_be_generated_is_told_first(words, message, tmp_path, capsys):
    saved(tmp_path, template=None)
    (tmp_path / "model.safetensors").unlink()  # so it is not read before
    assert cli.main(["generate", str(tmp_path), *words]) == 1
    assert message in capsys.readouterr().err


def test_the_stop_tokens_of_the_base_are_carried(tmp_path):
    """Bases name several, in `generation_config.json` alone: the end of a turn is not the end of a text."""
    dense = tiny_dense()
    greedy = dense.generate(torch.tensor([[40, 41, 42]]), max_new_tokens=8, do_sample=False, eos_token_id=127)[0, 3:]
    dense.generation_config.eos_token_id = [2, greedy[3].item()]
    dense.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    convert_model(tmp_path / "dense", tmp_path / "model", max_tokens=512, block_size=64)
    model = load_model(tmp_path / "model")
    assert model.generation_config.eos_token_id == [2, greedy[3].item()]
    found = model.generate(torch.tensor([[40, 41, 42]]), max_new_tokens=8, do_sample=False)[0, 3:]
    assert found[-1] == greedy[3]
    assert len(found) <= 4


def test_a_draft_tells_what_it_did(tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    tiny_dynamoe(budgets={"0.4": 0.3}).save_pretrained(tmp_path)
    expected = generate_text(tmp_path, "words", sensitivity=1.0, max_new_tokens=12)
    assert generate_text(tmp_path, "words", draft_budget=0.4, max_new_tokens=12)[:2] == (expected.text, 1.0)
    assert cli.main(["generate", str(tmp_path), "words", "--draft-budget", "0.4", "--max-new-tokens", "12"]) == 0
    written = capsys.readouterr()
    assert written.out == expected.text + "\n"
    assert "were accepted" in written.err and "passes" in written.err
    with pytest.raises(ValueError, match="More than one of budget, sensitivity and draft_budget"):
        generate_text(tmp_path, "words", draft_budget=0.4, sensitivity=0.5)
    assert cli.main(["generate", str(tmp_path), "words", "--draft-budget", "0.4", "--temperature", "1"]) == 1
    assert "found sampling" in capsys.readouterr().err


def test_the_card_of_a_chat_model_asks_through_the_template(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    card = render_card(".", local_files_only=True).text
    code = re.search(r"```python\n(.*?)```", card, flags=re.S)[1]
    assert "apply_chat_template" in code and "dynamoe generate . --chat" in card
    exec(code.replace("max_new_tokens=64", "max_new_tokens=4"), {})
    assert capsys.readouterr().out
    saved(tmp_path, template=None)
    card = render_card(tmp_path, local_files_only=True).text
    assert "--chat" not in card and "apply_chat_template" not in card
