"""
Downstream: lm-evaluation-harness on tasks built from held-out texts, since public task data needs a network.

    python benchmarks/tasks.py OUT                        # OUT: the folder of frontier.py, with our model trained
    python benchmarks/tasks.py OUT --tasks literature     # the public tasks, where there is a network

Three kinds of items from the held-out documents, in equal parts of each text, drawn with a fixed seed:

- ending: the beginning of a paragraph, and four sentences of the same document, of which one goes on with it;
- word: a sentence up to a word, and four words of the paragraph, each with the rest of the sentence; one was there;
- cloze: a paragraph up to the last word of a sentence, one that has been used before in it; it must be the model's first guess.

Evaluates the dense base, our model at every share (the one trained longest) and, where frontier.py has made them, the dense model
trained on the same tokens and a static width for each layer; in bfloat16 where they were trained in it. Writes OUT/tasks/*.{yaml,jsonl}
(`dynamoe evaluate FOLDER --tasks FILE.yaml` reads them) and benchmarks/results/tasks_<processor>_<yyyymm>.{json,md}.
"""

import argparse
import json
import math
import random
import re
from contextlib import nullcontext
from itertools import product, takewhile
from pathlib import Path

import torch
from frontier import LABELS, SHARES, TEXTS, UNSEEN, Bench
from subnets import pruned

from dynamoe_hf.benchmark import machine
from dynamoe_hf.data import read_documents
from dynamoe_hf.evaluate import run_tasks
from dynamoe_hf.folder import read_json, write_json


KINDS = ("ending", "word", "cloze")
CONTEXT = 600  # characters before the gap, at most
TEMPLATE = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {output_type}
doc_to_text: context
doc_to_target: {target}
{choices}metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def sentences(paragraph):
    """The sentences that a paragraph of prose begins with; none for code and lists."""
    parts = re.split(r"(?<=[.?!]) +(?=[A-Z])", " ".join(paragraph.split()))
    return list(takewhile(lambda part: part[0].isupper() and part[-1] in ".?!" and 40 < len(part) < 300, parts))


def items(documents, kind, count, draw):
    """Up to `count` items of one kind: {"context", "choices", "label"}, or {"context", "target"} for the cloze."""
    makers = {"ending": _ending, "word": _word, "cloze": _cloze}
    paragraphs = [[sentences(p) for p in document.split("\n\n") if p.strip()] for document in documents]
    places = [(prose, p) for prose in paragraphs for p in prose if len(p) >= 3]
    draw.shuffle(places)
    made = (makers[kind](prose, paragraph, draw) for prose, paragraph in places)
    return [item for item, _ in zip(filter(None, made), range(count))]


def _ending(document, paragraph, draw):
    others = [s for p in document if p is not paragraph for s in p if s not in paragraph]
    if len(others) < 3:
        return None
    cut = draw.randrange(2, len(paragraph))
    return _choice(" ".join(paragraph[:cut])[-CONTEXT:], paragraph[cut], draw.sample(others, 3), draw)


def _word(document, paragraph, draw):
    words = sorted({w for s in paragraph for w in re.findall(r"\b[a-z]{5,}\b", s)})
    cut = draw.randrange(1, len(paragraph))
    gaps = list(re.finditer(r"(?<= )[a-z]{5,}\b", paragraph[cut]))
    if len(words) < 8 or not gaps:
        return None
    gap = draw.choice(gaps)
    before, rest = paragraph[cut][: gap.start()].rstrip(), paragraph[cut][gap.end() :]
    # The other words end alike where there are such: then grammar does not give the answer away.
    others = [word for word in words if word != gap.group()]
    others.sort(key=lambda word: (word[-2:] != gap.group()[-2:], draw.random()))
    context = " ".join([*paragraph[:cut], before]).strip()[-CONTEXT:]
    return _choice(context, gap.group() + rest, [word + rest for word in others[:3]], draw)


def _cloze(document, paragraph, draw):
    for end in range(len(paragraph), 1, -1):
        match = re.fullmatch(r"(.*) ([A-Za-z]{4,})[.?!]", " ".join(paragraph[:end]))
        if match is not None and match.group(2) in re.findall(r"\w+", match.group(1)):
            return {"context": match.group(1)[-CONTEXT:], "target": " " + match.group(2)}
    return None


def _choice(context, right, wrong, draw):
    choices = [right, *wrong]
    draw.shuffle(choices)
    return {"context": context, "choices": choices, "label": choices.index(right)}


def write_tasks(held_out: Path, out: Path, count: int) -> list[Path]:
    """Task files of every kind and text, `count` items in all, the same ones each time: their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths, draw, left = [], random.Random(0), count
    # The shortest text first: what it cannot give, the others do.
    pairs = list(product(sorted(TEXTS, key=lambda text: (held_out / f"{text}.txt").stat().st_size), KINDS))
    for index, (text, kind) in enumerate(pairs):
        name = f"{kind}_{text.replace('-', '_')}"
        documents = read_documents(held_out / f"{text}.txt")
        rows = items(documents, kind, -(-left // (len(pairs) - index)), draw)
        left -= len(rows)
        if not rows:  # a short text may have none of a kind, and lm-eval takes no empty task
            continue
        data = out / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)) + "\n")
        choice = kind != "cloze"
        path = out / f"{name}.yaml"
        path.write_text(
            TEMPLATE.format(
                name=name, data=data.resolve(), output_type="multiple_choice" if choice else "loglikelihood",
                target="label" if choice else '"{{target}}"', choices="doc_to_choice: choices\n" if choice else "",
            )
        )  # fmt: skip
        paths.append(path)
    return paths


def settings(bench):
    """(name, share, model, context in which it is evaluated) of each row."""
    yield "dense base", 1.0, bench.dense, nullcontext()
    ours = "ours-long" if (bench.out / "ours-long").exists() else "ours"
    model = bench.ours(ours)
    yield f"{LABELS[ours]}, full width", 1.0, model, model.routing(force_expert=model.config.expert_count - 1)
    for share in SHARES:
        theta = bench.measured(ours, share, UNSEEN)["sensitivity"]
        yield f"{LABELS[ours]}, {share:.0%}", share, model, model.routing(sensitivity=theta)
    if (bench.out / "tuned").exists():
        yield LABELS["tuned"], 1.0, bench.dense_model("tuned"), nullcontext()
    if (bench.out / "static").exists():
        for share in (0.75, 0.5):
            model = bench.family("static")
            yield f"static width per layer, {share:.0%}", share, model, pruned(model, bench.subnet(share, False))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--items", type=int, default=1000, help="of all kinds and texts together (1000)")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="tasks of lm-eval instead of the local ones")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(argv)
    bench = Bench(args.out, **read_json(args.out / "settings.json"))
    local = args.tasks is None
    paths = write_tasks(args.out / "held-out", args.out / "tasks", args.items) if local else args.tasks
    counts = {path.stem: len(path.with_suffix(".jsonl").read_text().splitlines()) for path in paths} if local else {}
    rows = []
    for name, share, model, context in settings(bench):
        kept = args.out / "tasks" / f"{name.replace(' ', '-')}.{args.items if local else '-'.join(paths)}.json"
        if not kept.exists():
            if bench.bf16:
                model.bfloat16()
            with context:
                results = run_tasks(model, bench.tokenizer, list(map(str, paths)), batch_size=16)
            kept.parent.mkdir(exist_ok=True)
            write_json(kept, results)
        rows.append({"model": name, "share": share, "tasks": read_json(kept)})
        print(
            name, {task: round(metrics["acc,none"], 3) for task, metrics in rows[-1]["tasks"].items() if "acc,none" in metrics}
        )
    record = {"machine": machine(torch.get_num_threads()), "items": counts, "rows": rows}
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"tasks_{record['machine']['name']}"
    write_json(path.with_suffix(".json"), record)
    if local:
        path.with_suffix(".md").write_text(table(record))
        print(table(record))


def table(record):
    """Accuracy of each kind over all texts, in percent, with the half width of its 95% interval."""
    total = {kind: sum(n for task, n in record["items"].items() if task.startswith(kind)) for kind in KINDS}
    lines = [
        f"Accuracy in % (half of the 95% interval) on items built from held-out texts: "
        f"{', '.join(f'{n} {kind}' for kind, n in total.items())}. Chance is 25% for ending and word. "
        "All texts together; one of them was never trained on. Made by `python benchmarks/tasks.py OUT`.",
        "",
        "| | " + " | ".join(KINDS) + " | all |",
        "|---" * (2 + len(KINDS)) + "|",
    ]
    for row in record["rows"]:
        right = {
            kind: sum(record["items"][task] * m["acc,none"] for task, m in row["tasks"].items() if task.startswith(kind))
            for kind in KINDS
        }
        cells = [(right[kind], total[kind]) for kind in KINDS] + [(sum(right.values()), sum(total.values()))]
        shown = [f"{100 * r / n:.1f} ({196 * math.sqrt(r / n * (1 - r / n) / n):.1f})" for r, n in cells]
        lines.append(f"| {row['model']} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
