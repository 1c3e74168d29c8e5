# SPDX-License-Identifier: Apache-2.0
"""
See the difficulty: which tokens of a text are hard for a DynaMoE model, and what the easy ones save.

    DYNAMOE_MODEL=user/model python app.py        # or: python app.py FOLDER

Needs torch, transformers and gradio. The model's code travels with the model.
"""

import html
import os
import statistics
import sys
import time
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import NamedTuple

import gradio as gr
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer


LIMIT, NEW_TOKENS = 512, 128  # tokens read of a text, and written at most
FEWEST, MOST, SECONDS = 3, 7, 2.0  # timed passes of each side, and the time after which no more than FEWEST are made
PROMPT, EXAMPLE = "Why is the sky blue?", """\
The capital of France is Paris, and the capital of Peru is Lima. In 1969, two astronauts walked on the Moon while the world watched.

def area(radius):
    return 3.14159 * radius ** 2

Roses are red, violets are blue, sugar is sweet, and so are you. 🙂"""  # fmt: skip
INTRODUCTION = """spends less on easy tokens: in each layer a router lets a token stop after a part of the MLP. <i>Dense</i> is the
same weights at full width, through the dense kernels, so both sides differ by routing alone. Point at a token, tap it, or tab to
the first and use the arrow keys for its share."""
EMPTY = '<p class="note" role="alert">There is no text yet. Type or paste some words, then try again.</p>'

CSS = """
.shares { --hard: 66 140 228; --paper: #fff; --ink: #1b1f24; }
.dark .shares { --hard: 38 106 196; --paper: #0f1318; --ink: #e6edf3; }
.shares span { color: var(--ink); border-radius: 3px; background-color: var(--paper);
  background-image: linear-gradient(rgb(var(--hard) / calc(.06 + .94 * var(--place))) 0 0); }
.legend { display: flex; flex-wrap: wrap; gap: .25rem; align-items: center; margin: .75rem 0 .35rem; font-size: .9rem; }
.legend span { padding: .1rem .55rem; }
.tokens { padding: .75rem 1rem; border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg); min-height: 3.5rem;
  background: var(--paper); white-space: pre-wrap; overflow-wrap: anywhere; font: .95rem/1.8 var(--font-mono); }
.tokens span { padding: .15em 0; box-shadow: inset 1px 0 var(--paper); }
.tokens .newline::before { content: "↵"; }
.tokens span:focus { outline: 2px solid var(--ink); outline-offset: 1px; }
.tokens span:focus::after { content: attr(title); position: fixed; inset: auto 0 0; padding: .75rem 1rem; z-index: 9;
  font: 1rem system-ui; white-space: normal; text-align: center; background: var(--ink); color: var(--paper); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 0 1.25rem; }
.pair p { margin-top: .5rem; }
.prose table.figures { width: 100%; margin: 1rem 0 .5rem; border: 0; font-variant-numeric: tabular-nums; }
.prose .figures tr, .prose .figures th, .prose .figures td { border-width: 0 0 1px; border-color: var(--border-color-primary); }
.prose .figures th, .prose .figures td { padding: .4rem .5rem; text-align: right; }
.prose .figures tr > :first-child { padding-left: 0; text-align: left; font-weight: normal; }
.faint { color: var(--body-text-color-subdued); }
.note { padding: .6rem .9rem; border-left: 4px solid var(--color-accent); background: var(--background-fill-secondary); }
"""
# One tab stop for a whole text; the arrow keys go from token to token.
HEAD = """<script>
document.addEventListener("keydown", event => {
  const way = {ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling"}[event.key];
  if (way && event.target.matches?.(".tokens span")) { event.preventDefault(); event.target[way]?.focus(); }
});
</script>"""


class Pieces:
    """Tokens as text with their shares. Tokens that cut a character are one piece: nothing can be drawn of half an emoji."""

    def __init__(self):
        self.tokens, self.token_shares_L, self.seconds, self._before, self._open = [], [], [], [], 0
        self.text, self.shares_L = [], []

    def add(self, decode, token, share_L, last, seconds=0.0):
        self.tokens.append(token)
        self.token_shares_L.append(share_L)
        self.seconds.append(seconds)
        self._open += 1
        ids = self.tokens[-self._open :]
        # The trap: some tokenizers drop the space before what they decode first, so the piece before comes along.
        text = decode(self._before + ids)[len(decode(self._before)) :]
        if (text and not text.endswith("\ufffd")) or len(ids) == 4 or last:  # a character has four bytes at most
            self.text.append(text)
            self.shares_L.append(torch.stack(self.token_shares_L[-self._open :]).mean(0))
            self._before, self._open = ids, 0

    def means(self, layer=0):
        """The shares in one layer, or with 0 on average over all: of each piece, and the mean of the tokens."""
        pick = (lambda share_L: share_L[int(layer) - 1].item()) if layer else (lambda share_L: share_L.mean().item())
        return [pick(share_L) for share_L in self.shares_L], statistics.fmean(map(pick, self.token_shares_L))


class Reading(NamedTuple):
    """A text as the dynamic model reads it."""

    ids: torch.Tensor  # (1, S), with the begin token where the tokenizer has one
    sensitivity: float
    pieces: Pieces
    perplexity: float
    note: str


class Engine:
    """The model, for all visitors. How it routes is said with each call, so calls in several threads do not mix."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.shares_LE = torch.tensor([mlp.shares for mlp in model.nested_mlps])
        self.floor = self.shares_LE.min().item()
        self.limit = min(LIMIT, model.config.max_position_embeddings // 2)
        self.begin = [tokenizer.bos_token_id] if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else []
        ends = model.generation_config.eos_token_id
        self.ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
        # Forced, not sensitivity 1: the dense kernels then run whichever router the model has, and no router does.
        self.dense = {"force_expert": self.shares_LE.shape[1] - 1}

    @torch.no_grad()
    def run(self, ids, score=False, **options):
        """One forward pass: its outputs, the perplexity of `ids` or the next token, seconds."""
        begun = time.perf_counter()
        outputs = self.model(ids, logits_to_keep=0 if score else 1, **options)
        if score:
            value = F.cross_entropy(outputs.logits[0, :-1].float(), ids[0, 1:]).exp().item()
        else:
            value = outputs.logits[0, -1].argmax().item()
        return outputs, value, time.perf_counter() - begun

    def shares(self, outputs):
        """The share of the MLP that each token of a pass took in each layer, (L, S); all of it where no experts are told."""
        if outputs.expert_indices is None:
            return torch.ones(len(self.shares_LE), outputs.logits.shape[1])
        return self.shares_LE.gather(1, torch.cat(outputs.expert_indices))

    def tokens_of(self, text, keep_end=False):
        """At most `limit` token ids of a text, and a note where there are more."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) <= self.limit:
            return ids, ""
        note = f"Only the {'last' if keep_end else 'first'} {self.limit:,} of {len(ids):,} tokens are read."
        return ids[-self.limit :] if keep_end else ids[: self.limit], f'<p class="note" role="status">{note}</p>'

    def read(self, text, sensitivity, layer):
        """The coloured tokens, the comparison as far as it is known, and what `measure` and `paint` go on with."""
        if not (text or "").strip():
            return EMPTY, "", None
        tokens, note = self.tokens_of(text)
        ids = torch.tensor([self.begin + tokens])
        options = {"sensitivity": sensitivity, "use_cache": False, "output_router_logits": True}
        outputs, perplexity, _ = self.run(ids, score=True, **options)
        shares_LT = self.shares(outputs)[:, len(self.begin) :]
        pieces = Pieces()
        for index, token in enumerate(tokens):
            pieces.add(self.tokenizer.decode, token, shares_LT[:, index], last=index == len(tokens) - 1)
        reading = Reading(ids, sensitivity, pieces, perplexity, note)
        return self.paint(reading, layer), comparison(reading), reading

    def measure(self, reading):
        """The comparison, finer with each pair of passes. The sides take turns, so that a busy machine slows both alike."""
        yield gr.skip()
        begun, times = time.perf_counter(), []
        while reading and (len(times) < FEWEST or (len(times) < MOST and time.perf_counter() - begun < SECONDS)):
            _, dense, dense_time = self.run(reading.ids, score=True, use_cache=False, **self.dense)
            _, _, own_time = self.run(reading.ids, score=True, use_cache=False, sensitivity=reading.sensitivity)
            times.append((dense_time, own_time))
            yield comparison(reading, dense, times)

    def paint(self, reading, layer):
        """The tokens of a reading coloured by one layer, or with layer 0 by the mean of all."""
        if reading is None:
            return gr.skip()
        text, layers, (means, mean) = reading.pieces.text, len(self.shares_LE), reading.pieces.means(layer)
        where = f"layer {layer:g} of {layers}" if layer else f"mean of {layers} layers"
        summary = f"{len(reading.pieces.tokens)} tokens take {mean:.0%} of the MLP width ({where})."
        order = sorted((index for index, piece in enumerate(text) if piece.strip()), key=means.__getitem__)
        if order and means[order[0]] < means[order[-1]]:
            summary += f" Easiest: {named(text, means, order)}. Hardest: {named(text, means, order[::-1])}."
        return f"{reading.note}<p>{summary}</p>{self.legend()}{self.spans(text, means, where)}"

    def write(self, prompt, sensitivity, count, chat):
        """Dense and dynamic continuations side by side, a page for each token of each. They take turns, as in `measure`."""
        if not (prompt or "").strip():
            yield EMPTY
            return
        ids, note = self.tokens_of(prompt, keep_end=True)
        if chat:
            messages = [{"role": "user", "content": self.tokenizer.decode(ids) if note else prompt}]
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        else:
            ids = self.begin + ids
        dynamic = {"sensitivity": sensitivity, "output_router_logits": True}
        settings = {"Dense": self.dense, f"Dynamic at {sensitivity:g}": dynamic}
        sides = {name: Pieces() for name in settings}
        yield note + self.page(sides)
        for steps in zip_longest(*(self.decode(ids, int(count), setting) for setting in settings.values())):
            for pieces, step in zip(sides.values(), steps):
                if step is not None:
                    pieces.add(self.tokenizer.decode, *step)
            yield note + self.page(sides)
        if not any(pieces.tokens for pieces in sides.values()):
            yield f'{note}<p class="note" role="status">Both end here: they have nothing to add to this prompt.</p>'

    def decode(self, ids, count, setting):
        """Greedy decoding: what `Pieces.add` takes, for each new token once it has been read as well."""
        outputs, token, _ = self.run(torch.tensor([ids]), use_cache=True, **setting)
        while count and token not in self.ends:
            count -= 1
            step = torch.tensor([[token]])
            outputs, following, seconds = self.run(step, past_key_values=outputs.past_key_values, **setting)
            yield token, self.shares(outputs)[:, 0], count == 0 or following in self.ends, seconds
            token = following

    def page(self, sides):
        columns, (dense, dynamic) = "", (pieces.tokens for pieces in sides.values())
        for name, pieces in sides.items():
            means, figures = [], "…"
            if pieces.tokens:
                speed, (means, share) = 1 / statistics.median(pieces.seconds), pieces.means()
                figures = f"{len(pieces.tokens)} tokens, <b>{speed:.1f} tokens/s</b>, <b>{share:.0%}</b> of the MLP width"
            spans = self.spans(pieces.text, means, f"mean of {len(self.shares_LE)} layers")
            columns += f"<section><h3>{name}</h3>{spans}<p>{figures}</p></section>"
        same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(dense, dynamic))))
        parted = same < max(len(dense), len(dynamic))
        alike = f"They part at token {same + 1}." if parted else "The same text so far." if same else "Reading the prompt…"
        return f'{self.legend()}<div class="pair">{columns}</div><p class="faint">{alike}</p>'

    def legend(self):
        shares = [self.floor + (1 - self.floor) * step / 3 for step in range(4)]
        swatches = "".join(f'<span style="--place:{self.place(share):.3f}">{share:.0%}</span>' for share in shares)
        return f'<div class="shares legend faint">easy {swatches} hard: share of the MLP width that a token takes</div>'

    def place(self, share):
        """Where a share stands on the colour scale. Most take more than half, so the upper half gets most of the colours."""
        return ((share - self.floor) / (1 - self.floor)) ** 1.7 if self.floor < 1 else 1.0

    def spans(self, pieces, means, where):
        body = ""
        for index, (piece, mean) in enumerate(zip(pieces, means)):
            kind = ' class="newline"' if piece.endswith("\n") and not piece.strip() else ""
            look = f'style="--place:{self.place(mean):.3f}" title="{mean:.0%} of the MLP width, {where}"'
            body += f'<span tabindex="{-min(index, 1)}" {look}{kind}>{html.escape(piece)}</span>'
        return f'<div class="shares tokens" role="group" aria-label="Tokens by difficulty" dir="auto">{body}</div>'


def named(pieces, means, indices):
    """The first four different words among `indices`, with their shares."""
    words = {}
    for index in indices:
        words.setdefault(pieces[index].strip(), means[index])
    return ", ".join(f"<b>{html.escape(word)}</b> {mean:.0%}" for word, mean in list(words.items())[:4])


def comparison(reading, dense=None, times=(), note="Measuring…"):
    """Dense against dynamic as a table; what is not yet known is an ellipsis."""
    rows = {
        ("Perplexity of the text", ".2f"): (dense, reading.perplexity),
        ("Share of the MLP width", ".0%"): (1.0, reading.pieces.means()[1]),
        ("Time to read it, ms", ".0f"): [1000 * statistics.median(side) for side in zip(*times)] or (None, None),
    }
    body = ""
    for (name, form), (left, right) in rows.items():
        ratio = right / left if left and right else None
        cells = ["…" if value is None else format(value, form) for value in (left, right)]
        cells += ["…" if ratio is None else f"{ratio:.2f}×"]
        body += f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    body = body.replace("nan×", "–").replace("nan", "–")  # nothing predicts the only token of a text
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Dense", f"Dynamic at {reading.sensitivity:g}", "Ratio"))
    note = f"Times are medians of {len(times)}, in turns, over {reading.ids.shape[1]} tokens." if times else note
    return f'<table class="figures"><tr><td></td>{head}</tr>{body}</table><p class="faint" role="status">{note}</p>'


def dial(config):
    """The slider, and a mark for each calibrated budget."""
    budgets = sorted((float(share), round(theta, 2)) for share, theta in config.budgets.items())
    start = budgets[len(budgets) // 2][1] if budgets else config.sensitivity
    with gr.Column(visible=config.has_dial):
        info = "1 is the dense model, less lets more tokens stop early. The marks are mean shares of the MLP width."
        slider = gr.Slider(0.01, 1, start, step=0.01, label="Sensitivity", info=info)
        with gr.Row():
            for share, theta in [*budgets, (1.0, 1.0)]:
                mark = gr.Button(f"{share:.0%}", size="sm", min_width=60)
                mark.click(None, None, slider, js=f"() => {theta}")
    return slider


def build(engine, name):
    """The app. Its example is read already: that warms the model up, and nobody meets an empty page."""
    config, layers, most = engine.model.config, len(engine.shares_LE), min(NEW_TOKENS, engine.limit - 16)
    has_template = bool(engine.tokenizer.chat_template)
    with gr.Blocks(title="See the difficulty", analytics_enabled=False) as demo:
        gr.HTML(f"<h1>See the difficulty</h1><p><b>{html.escape(name)}</b> {INTRODUCTION}</p>")
        with gr.Tab("Read") as read_tab, gr.Row():
            with gr.Column(min_width=320):
                read_dial = dial(config)
                text = gr.Textbox(EXAMPLE, label="Text (Shift+Enter reads it)", lines=5, max_lines=12, max_length=100_000)
                button = gr.Button("Read", variant="primary")
            with gr.Column(min_width=320, scale=2):
                layer = gr.Slider(0, layers, 0, step=1, label="Layer", info="0: mean of all, 1: model.layers[0]")
                painted, _, first = engine.read(EXAMPLE, read_dial.value, 0)
                _, dense, _ = engine.run(first.ids, score=True, use_cache=False, **engine.dense)
                table = comparison(first, dense, note="Press Read to time both sides.")
                tokens, table, reading = gr.HTML(painted), gr.HTML(table), gr.State(first)
        with gr.Tab("Write") as write_tab, gr.Row():
            with gr.Column(min_width=320):
                write_dial = dial(config)
                prompt = gr.Textbox(PROMPT, label="Prompt (Enter writes)", max_lines=8, max_length=100_000)
                count = gr.Slider(8, most, min(32, most), step=1, label="New tokens")
                chat = gr.Checkbox(has_template, label="Answer as a chat", visible=has_template)
                with gr.Row():
                    write, stop = gr.Button("Write", variant="primary", min_width=120), gr.Button("Stop", min_width=120)
            with gr.Column(min_width=320, scale=2):
                pair = gr.HTML(engine.legend() + "<p>Both sides write greedily and take turns, token by token.</p>")

        quiet = {"show_progress": "hidden", "trigger_mode": "always_last"}
        # Visitors' calls may run at once. They take turns because times are shown, and two texts at once slow each other down.
        queue = {"concurrency_id": "model", "concurrency_limit": 1}
        asks = [button.click, text.submit, read_dial.change]
        read = gr.on(asks, engine.read, [text, read_dial, layer], [tokens, table, reading], **quiet, **queue)
        timed = read.then(engine.measure, reading, table, **quiet, **queue)
        gr.on(asks, None, cancels=[timed])
        layer.change(engine.paint, [reading, layer], tokens, **quiet)
        asks = [write.click, prompt.submit]
        wrote = gr.on(asks, engine.write, [prompt, write_dial, count, chat], pair, show_progress="hidden", **queue)
        stop.click(None, cancels=[wrote])
        # One dial to the eye; two components, so that writing does not wait for a text that is read again.
        write_tab.select(None, read_dial, write_dial, js="value => value")
        read_tab.select(None, write_dial, read_dial, js="value => value")
    return demo


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DYNAMOE_MODEL")
    if not name:
        raise SystemExit("No model is named. Set DYNAMOE_MODEL to a folder or Hub id, or give it as the first argument.")
    os.environ.setdefault("MPLBACKEND", "agg")  # where matplotlib is installed, the first visitor would wait for its windows
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
    if model.config.model_type != "dynamoe":
        raise SystemExit(f"{name} is not a DynaMoE model: found {model.config.model_type}. Run `dynamoe convert` on it first.")
    engine = Engine(model, AutoTokenizer.from_pretrained(name, trust_remote_code=False))
    demo = build(engine, Path(name).name if os.path.isdir(name) else name)
    # The trap: Gradio's semibold of this font lacks most letters, and its subdued grey is hard to read.
    theme = gr.themes.Default(primary_hue="blue", font=[gr.themes.LocalFont("Source Sans Pro", (400, 700)), "sans-serif"])
    theme.set(body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_300")
    demo.launch(theme=theme, css=CSS, head=HEAD, ssr_mode=False)


if __name__ == "__main__":
    main()
