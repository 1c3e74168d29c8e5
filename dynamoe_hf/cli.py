# SPDX-License-Identifier: Apache-2.0
"""`dynamoe`: one subcommand a stage. It only unpacks arguments; each stage is also a function with the same parameters."""

import argparse
import json
import sys
from typing import get_args

import torch

from ._version import __version__
from .arguments import Harm, TrainedParts
from .benchmark import SHAPES, bench_folder
from .calibrate import calibrate_budgets
from .convert import EIGHTHS, convert_model, export_dense
from .demo import run_demo
from .evaluate import evaluate_model
from .folder import inspect_folder
from .generate import generate_text
from .publish import publish_model
from .report import report_folder
from .train import adapt_model, train_model


DESCRIPTION = """\
Turn a dense Llama-style language model into one that spends less compute on easy tokens.

  dynamoe convert HuggingFaceTB/SmolLM2-135M-Instruct converted   # nest the MLPs, prove parity
  dynamoe train converted trained                                 # teach routers and experts
  dynamoe calibrate trained --budgets 0.5,0.75,0.9                # put marks on the dial
  dynamoe evaluate trained --budget 0.75 --base HuggingFaceTB/SmolLM2-135M-Instruct
  dynamoe generate trained "Once upon a time" --budget 0.5

Every stage reads a model folder and writes one, so any of them can be run alone or on another machine. Stages that are
given no text read one that every Python carries (pydoc_data.topics), each its own part of it. They compute on the GPU where there
is one, and on the CPU where CUDA_VISIBLE_DEVICES is empty; `bench` times the CPU."""


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand. Wrong input is told in one line on stderr, with exit code 1; a bug shows its traceback."""
    args = vars(make_parser().parse_args(argv))
    stage, show = args.pop("stage"), args.pop("show")
    if args.pop("json", False):
        show = show_json
    try:
        result = stage(**args)
    except (ValueError, OSError) as error:
        print(f"dynamoe: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(
            f"dynamoe: The GPU's memory does not suffice: {str(error).partition('. ')[0]}. Take smaller batches or blocks where the "
            "stage has them (`--help`), or compute on the CPU: `CUDA_VISIBLE_DEVICES= dynamoe ...`.",
            file=sys.stderr,
        )
        return 1
    show(result)
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("dynamoe", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"dynamoe {__version__}")
    stages = parser.add_subparsers(title="stages", required=True, metavar="STAGE")

    def add(name, help, example, stage, show):
        epilog = "example:\n" + "\n".join(f"  {line}" for line in example.splitlines())
        formatter = argparse.RawDescriptionHelpFormatter
        command = stages.add_parser(name, help=help, description=help, epilog=epilog, formatter_class=formatter)
        command.set_defaults(stage=stage, show=show)
        return command

    c = add("convert", "Dense model -> DynaMoE: rank and reorder neurons, add routers, prove parity.",
            "dynamoe convert HuggingFaceTB/SmolLM2-135M-Instruct converted\n"
            "dynamoe convert ./gguf-folder converted --widths 0,0.25,0.5,1 --text notes.txt",
            convert_model, show_record)  # fmt: skip
    c.add_argument("base", help="Hub id or folder of a dense model; folders with a .gguf file too")
    c.add_argument("out", help="folder to write; must not exist")
    c.add_argument(
        "--widths", type=numbers, default=EIGHTHS, metavar="A,B,..,1", help="expert widths (eight: 0.125,0.25,..,1)"
    )
    c.add_argument("--text", nargs="+", metavar="FILE", help="calibration text")
    c.add_argument(
        "--importance",
        default="taylor_share",
        metavar="NAME",
        help="order of the neurons: taylor_share, taylor, activation, normalised",
    )
    c.add_argument(
        "--similarity",
        default="loss_gain",
        metavar="NAME",
        help="loss_gain, loss_weighted, projection, cosine, relative_error",
    )
    c.add_argument(
        "--router-type", default="profile", choices=("profile", "argmax"), help="profile has a dial; argmax is the paper's"
    )
    c.add_argument("--router-dim", type=count, help="hidden size of the routers (about 1%% of the MLP)")
    c.add_argument("--max-tokens", type=count, default=8192, help="calibration tokens, a sample of the text (8192)")
    c.add_argument("--block-size", type=count, default=512, help="tokens in one sequence (512)")
    c.add_argument("--dtype", default="auto", help="dtype of the weights (as in the checkpoint)")
    c.add_argument("--seed", type=int, default=0)

    def add_training(c, max_tokens, learning_rate):
        c.add_argument("folder", help="model folder to read")
        c.add_argument("out", help="folder to write; checkpoints lie in OUT.checkpoints until the end")
        c.add_argument("--text", nargs="+", metavar="FILE", help="training text")
        c.add_argument("--dataset", metavar="ID[:CONFIG]", help="or a dataset, streamed")
        c.add_argument("--column", default="text", help="its text column (text)")
        c.add_argument("--max-tokens", type=count, default=max_tokens, help=f"tokens to train on ({max_tokens})")
        c.add_argument("--learning-rate", type=float, default=learning_rate, help=f"of all but routers ({learning_rate:g})")
        c.add_argument("--resume", action="store_true", help="go on with an interrupted run")
        c.add_argument("--block-size", type=count, default=256, help="tokens in one sequence (256)")
        c.add_argument("--batch-size", type=count, default=4, help="sequences in one step (4)")
        c.add_argument("--gradient-accumulation-steps", type=count, default=1)
        c.add_argument("--bf16", action="store_true", help="mixed precision; for GPUs, and CPUs with AMX or AVX512_BF16")
        c.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
        c.add_argument("--save-steps", type=count, default=50, help="steps between checkpoints (50)")
        c.add_argument("--seed", type=int, default=0)

    c = add("adapt", "Let the full width learn a text that the base does not know, before `train`. Leave it out to keep the base's.",
            "dynamoe adapt converted adapted --text corpus.txt --max-tokens 800000       # two fifths of the tokens you can afford\n"
            "dynamoe train adapted trained --text corpus.txt --max-tokens 1200000", adapt_model, show_training)  # fmt: skip
    add_training(c, 65_536, 6e-5)

    c = add("train", "Fine-tune routers and experts, close to what the full width says. The defaults are the recipe of docs/results.md.",
            "dynamoe train converted trained\n"
            "dynamoe train converted trained --text a.txt b.txt --max-tokens 2000000\n"
            "dynamoe train converted trained --resume              # after an interruption\n"
            "dynamoe train converted trained --dataset HuggingFaceFW/fineweb-edu:sample-10BT --train lora --bf16",
            train_model, show_training)  # fmt: skip
    add_training(c, 100_000, 2e-4)
    c.add_argument(
        "--train",
        dest="train_parts",
        default="layers",
        choices=get_args(TrainedParts),
        help="what is trained (layers: all but the embeddings); mlp: routers and MLPs",
    )
    c.add_argument(
        "--route",
        default="router",
        choices=("router", "label", "random"),
        help="expert of each token in training (router: fitted before, and after)",
    )
    c.add_argument(
        "--teacher", default="frozen", choices=("frozen", "self", "none"), help="whose full width is distilled (frozen)"
    )
    c.add_argument(
        "--sensitivity-range",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="sequences draw their sensitivity from it (the config's); 1 1 trains the full width alone",
    )
    c.add_argument("--router-learning-rate", type=float, default=1e-3, help="of the routers, if they have a loss (1e-3)")
    c.add_argument("--lm-loss-coef", type=float, default=0.0, help="next tokens of the text (0)")
    c.add_argument("--router-loss-coef", type=float, default=0.0, help="routers learn while experts do (0: only in the fits)")
    c.add_argument("--kd-loss-coef", type=float, default=1.0, help="what the full width says (1)")
    c.add_argument(
        "--hidden-loss-coef",
        type=float,
        default=10.0,
        help="relative error of each layer's hidden states to the full width's (10)",
    )
    c.add_argument(
        "--logit-fraction", type=float, default=1.0, help="share of positions whose logits are computed (1); less saves time"
    )
    c.add_argument(
        "--router-tokens", type=int, default=65536, help="tokens of the fit of the routers, at most (65536); 0: none"
    )
    c.add_argument(
        "--harm",
        choices=get_args(Harm),
        help="what routers are fitted to: an error costs the same in a layer (layer), or what its token's gradient says (token; "
        "default where the similarity allows)",
    )
    c.add_argument(
        "--choice-share",
        type=float,
        help="share of the tokens, at the end, on which routers learn by choosing (0.2 where they have a profile and are fitted); "
        "0: none",
    )
    c.add_argument("--width-loss-coef", type=float, default=0.9, help="price of width that they weigh the loss against (0.9)")
    c.add_argument("--lora-rank", type=count, default=16)

    c = add("calibrate", "Budgets (mean share of MLP width) -> sensitivities, written into the folder's config.",
            "dynamoe calibrate trained --budgets 0.5,0.6,0.75,0.9", calibrate_budgets, show_calibration)  # fmt: skip
    c.add_argument("folder", help="trained model folder")
    c.add_argument(
        "--budgets", type=numbers, default=(0.5, 0.6, 0.75, 0.9), metavar="A,B,..", help="shares (0.5,0.6,0.75,0.9)"
    )
    c.add_argument("--text", nargs="+", metavar="FILE", help="text that was not trained on")
    c.add_argument("--max-tokens", type=count, default=8192, help="calibration tokens, a sample of the text (8192)")
    c.add_argument("--block-size", type=count, default=512, help="tokens in one sequence (512)")
    c.add_argument("--batch-size", type=count, default=4)

    c = add("evaluate", "Perplexity, mean width and use of experts at a setting of the dial -> results.json.",
            "dynamoe evaluate trained --budget 0.5,0.75 --base HuggingFaceTB/SmolLM2-135M-Instruct --baselines static random\n"
            "dynamoe evaluate trained --force-expert 3 --json\n"
            "dynamoe evaluate trained --budget 0.75 --tasks literature",
            evaluate_model, show_evaluation)  # fmt: skip
    c.add_argument("folder", help="model folder")
    c.add_argument("--text", nargs="+", metavar="FILE", help="held-out text")
    setting = c.add_mutually_exclusive_group()
    setting.add_argument("--budget", type=numbers, metavar="B[,B]", help="calibrated mean share of MLP width")
    setting.add_argument("--sensitivity", type=numbers, metavar="S[,S]", help="threshold in (0, 1]; 1 is the dense model")
    setting.add_argument("--force-expert", type=int, metavar="E", help="one expert for every token")
    c.add_argument("--base", help="the dense base, to state ratios")
    c.add_argument(
        "--baselines", nargs="+", default=(), metavar="NAME", help="static, random, label: same weights, same share"
    )
    c.add_argument("--tasks", nargs="+", default=(), metavar="TASK", help="lm-eval tasks, task files, or `literature`")
    c.add_argument("--task-limit", type=count, help="examples of each task at most")
    c.add_argument("--max-tokens", type=count, default=16384, help="tokens (16384)")
    c.add_argument("--block-size", type=count, default=512, help="tokens in one sequence (512)")
    c.add_argument("--batch-size", type=count, default=4)
    add_json(c)

    c = add("generate", "Continue a prompt at a setting of the dial.",
            'dynamoe generate trained "The with statement" --budget 0.5\n'
            'dynamoe generate trained "What is a prime number?" --chat', generate_text, print)  # fmt: skip
    c.add_argument("folder", help="model folder or Hub id")
    c.add_argument("prompt")
    setting = c.add_mutually_exclusive_group()
    setting.add_argument("--budget", type=float, metavar="B", help="calibrated mean share of MLP width")
    setting.add_argument("--sensitivity", type=float, metavar="S", help="threshold in (0, 1]")
    c.add_argument("--max-new-tokens", type=count, default=64)
    c.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (0)")
    c.add_argument("--chat", action="store_true", help="treat the prompt as a question, through the chat template")
    c.add_argument("--seed", type=int, default=0)

    c = add("inspect", "What a model folder holds, in one screen.",
            "dynamoe inspect trained", inspect_folder, show_inspection)  # fmt: skip
    c.add_argument("folder", help="model folder")
    add_json(c)

    c = add("bench", "Wall-clock against the dense model in the same run -> benchmark.json.",
            "dynamoe bench trained\ndynamoe bench trained --budgets 0.5 --threads 2 --json\n"
            "dynamoe bench trained --dtype bfloat16                  # as it will be served",
            bench_folder, show_benchmark)  # fmt: skip
    c.add_argument("folder", help="calibrated model folder")
    c.add_argument("--budgets", type=numbers, metavar="A,B,..", help="marks of the dial (all calibrated ones)")
    c.add_argument(
        "--shares", type=numbers, default=(), metavar="A,B,..", help="also where the timed text takes these shares of the MLPs"
    )
    c.add_argument("--threads", type=count, default=1, help="of torch (1: steady on a busy machine)")
    c.add_argument("--rounds", type=count, default=5, help="counted rounds, after one to warm up (5)")
    c.add_argument("--new-tokens", type=count, default=16, help="tokens decoded in each round (16)")
    c.add_argument(
        "--shapes", nargs="+", default=("SmolLM2-135M", "Llama-3.2-1B"), metavar="NAME", help=f"MLPs: {', '.join(SHAPES)}"
    )
    c.add_argument("--compile", action="store_true", help="also decode with torch.compile on both sides (minutes)")
    c.add_argument("--dtype", default="auto", help="in which both sides are timed (as in the folder)")
    add_json(c)

    c = add("report", "Pictures: frontier, use of experts by layer, a text coloured by difficulty.",
            "dynamoe report trained\ndynamoe report trained --text story.txt --budget 0.5", report_folder, show_paths)  # fmt: skip
    c.add_argument("folder", help="evaluated model folder")
    c.add_argument("--out", help="folder for the pictures (FOLDER/report)")
    c.add_argument("--text", metavar="FILE", help="text to colour")
    c.add_argument("--budget", type=float, metavar="B", help="budget at which it is coloured")

    c = add("publish", "Variants on the Hub: cards, repositories or branches, a Collection.",
            "dynamoe publish trained user/SmolLM2-135M-DynaMoE --dry-run\n"
            "dynamoe publish trained user/SmolLM2-135M-DynaMoE --variants 0.5,0.75 --layout revisions",
            publish_model, show_publication)  # fmt: skip
    c.add_argument("folder", help="evaluated model folder")
    c.add_argument("repo", help="user/NAME or organisation/NAME; you are known by `hf auth login` or HF_TOKEN")
    c.add_argument("--variants", type=numbers, metavar="A,B,..", help="calibrated budgets (all)")
    c.add_argument(
        "--layout", default="repos", choices=("repos", "revisions"), help="a repository or a branch for each (repos)"
    )
    c.add_argument("--dry-run", action="store_true", help="send nothing; write what would be sent")
    c.add_argument("--out", help="folder of a dry run (FOLDER.publish)")
    c.add_argument("--private", action="store_true", help="create private repositories")
    c.add_argument("--create-pr", action="store_true", help="open pull requests instead of committing")
    c.add_argument("--commit-message", help="names the variant by default")
    c.add_argument("--base-model", help="Hub id of the dense base, if it was converted from a local copy")

    c = add("export", "One width as a plain smaller dense model, for runtimes without routers.",
            "dynamoe export trained small --width 0.5", export_dense, show_record)  # fmt: skip
    c.add_argument("folder", help="model folder")
    c.add_argument("out", help="folder to write; must not exist")
    c.add_argument("--width", type=float, default=1.0, help="share of the MLP width (1)")

    c = add("demo", "The whole way on SmolLM2-135M-Instruct: about a quarter of an hour on two cores.",
            "dynamoe demo --out runs/demo", run_demo, lambda rows: None)  # fmt: skip
    c.add_argument("--out", default="runs/demo", help="folder for everything that is made (runs/demo)")
    c.add_argument(
        "--budgets", type=numbers, default=(0.9, 0.75, 0.6, 0.5), metavar="A,B,..", help="shares (0.9,0.75,0.6,0.5)"
    )
    c.add_argument("--max-tokens", type=count, default=65_536, help="training tokens (65536)")
    return parser


def count(value: str) -> int:
    """`16` -> 16; nothing less than 1."""
    if not value.strip().isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {value!r}")
    return int(value)


def numbers(value: str) -> tuple[float, ...]:
    """`0.5,0.75` -> (0.5, 0.75)."""
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers divided by commas, such as 0.5,0.75, found {value!r}") from None


def add_json(command):
    command.add_argument("--json", action="store_true", help="print everything as JSON")


def show_json(result):
    print(json.dumps(result, indent=2))


def show_record(record):
    for name, value in record.items():
        print(f"{name.replace('_', ' '):12} {value}")


def show_training(record):
    last = record["history"][-1] if record["history"] else {}
    print(f"Trained on {record['tokens']:,} tokens in {record['steps']} steps, {record['seconds']:.0f} s")
    for name in ("loss", "lm_loss", "kd_loss", "hidden_loss", "router_loss", "width_loss", "mean_width", "router_accuracy"):
        if last.get(name):  # 0 is a loss that this training does not have
            print(f"  {name:16} {last[name]:.4f}")
    print("Next: `dynamoe calibrate` puts marks on the dial.")


def show_calibration(record):
    print("budget  sensitivity  mean share reached (95%)")
    for budget, entry in record["budgets"].items():
        interval = "" if entry["interval"] is None else " ({:.1%} to {:.1%})".format(*entry["interval"])
        print(f"{float(budget):6.0%}  {entry['sensitivity']:11.4f}  {entry['mean_share']:.1%}{interval}")
    largest = max(record["budgets"], key=float)
    print(f"Without further settings the model now uses budget {float(largest):.0%}.")


def show_evaluation(entries):
    print(f"{'setting':20} {'MLP share':>9} {'active':>9} {'perplexity (95%)':>26} {'to dense (95%)':>24} {'agreement':>9}")
    for entry in entries:
        low, high = entry["perplexity_interval"]
        ratio = "not measured"
        if "ratio_to_dense" in entry:
            ratio = "{:.3f} ({:.3f} to {:.3f})".format(entry["ratio_to_dense"], *entry["ratio_interval"])
        agreement = "" if entry["router_agreement"] is None else f"{entry['router_agreement']:.0%}"
        print(
            f"{entry['setting']:20} {entry['mean_share']:9.1%} {entry['active_parameters'] / 1e6:7.1f} M "
            f"{entry['perplexity']:8.2f} ({low:.2f} to {high:.2f}) {ratio:>24} {agreement:>9}"
        )
        for kind, row in entry["baselines"].items():
            print(
                f"  {kind:18} {row['mean_share']:9.1%} {'':9} {row['perplexity']:8.2f}   ratio {row.get('ratio_to_dense', float('nan')):.3f}"
            )
        for task, metrics in entry.get("tasks", {}).items():
            print(f"  {task}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))


def show_benchmark(record):
    machine = record["machine"]
    print(
        f"{machine['processor']}, {machine['threads']} thread(s), {machine['dtype']}, torch {machine['torch']}, {machine['date']}"
    )
    print(f"Parity at full width: largest relative difference {record['parity']['largest_relative_difference']:.1g}\n")
    print(f"{'what':44} {'share':>6} {'time to dense (range)':>24} {'limit':>7} {'reached':>8}")
    for row in record["mlp"]:
        show_time(f"MLP {row['shape']}, {row['tokens']} tokens, {row['case']}", row)
    for row in record["decode"]:
        show_time(f"decode, batch {row['batch']}, {row['setting']}", row)
    for row in record["prefill"]:
        show_time(f"prefill {row['tokens']}, {row['setting']}", row)
    for row in record["generate"]:
        show_time(f"generate, {row['setting']}", row)
    for row in record.get("compiled", []):
        show_time(f"decode, compiled, {row['setting']}", row)


def show_time(what, row):
    low, high = row["range"]
    spread = f"{row['ratio']:.3f} ({low:.3f} to {high:.3f})"
    print(f"{what:44} {row['share']:6.1%} {spread:>24} {row['limit']:7.3f} {row['reached']:8.2f}")


def show_inspection(facts):
    counts, widths = facts["parameters"], facts["expert_widths"]
    print(f"{facts['folder']}: DynaMoE of {facts['base'] or 'an unknown base'} ({facts['family']})")
    print(f"  layers        {facts['layers']}, hidden size {facts['hidden_size']}, MLP width {facts['mlp_width']}")
    print(f"  experts       {widths if not isinstance(widths[0], list) else 'a ladder for each layer'} neurons")
    print(
        f"  parameters    {counts['total'] / 1e6:.1f} M, of which MLPs {counts['mlp'] / 1e6:.1f} M, routers {counts['router'] / 1e6:.2f} M"
    )
    print(f"  router        {facts['router_type']}, predicts {facts['similarity']} similarity")
    dial = (
        "forced to expert {}".format(facts["force_expert"])
        if facts["force_expert"] is not None
        else f"sensitivity {facts['sensitivity']:.4g}"
    )
    print(
        f"  dial          {dial}"
        + (" (the dense model)" if facts["sensitivity"] == 1 and facts["force_expert"] is None else "")
    )
    budgets = ", ".join(f"{float(b):.0%} at {s:.4f}" for b, s in facts["budgets"].items())
    print(f"  budgets       {budgets or 'none: run `dynamoe calibrate`'}")
    if facts["training"]:
        print(f"  trained       {facts['training']['tokens']:,} tokens, {facts['training']['settings']['train']}")
    else:
        print("  trained       no: run `dynamoe train`")
    for entry in (facts["results"] or {"evaluations": []})["evaluations"]:
        ratio = f", {entry['ratio_to_dense']:.3f} of dense" if "ratio_to_dense" in entry else ""
        print(
            f"  evaluated     {entry['setting']}: share {entry['mean_share']:.1%}, perplexity {entry['perplexity']:.2f}{ratio}"
        )
    if not facts["results"]:
        print("  evaluated     no: run `dynamoe evaluate`")


def show_publication(summary):
    for variant in summary["variants"]:
        budget = "the dial" if variant["budget"] is None else f"budget {variant['budget']:g}"
        sent = f"{variant['new_bytes'] / 1e6:.2f} MB new of {variant['bytes'] / 1e6:.2f}"
        print(f"{variant['repo']}@{variant['revision']}: {budget}, sensitivity {variant['sensitivity']:.4f}, {sent}")
    if summary["dry_run"]:
        print(f"Nothing was sent. What would be is in {summary['out']}")
    elif summary["collection"]:
        print(f"Collection: {summary['collection']}")


def show_paths(paths):
    for path in paths:
        print(path)


if __name__ == "__main__":
    sys.exit(main())
