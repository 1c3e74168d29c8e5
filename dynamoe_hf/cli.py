# SPDX-License-Identifier: Apache-2.0
"""
`dynamoe`: one subcommand a stage. The flags of a stage are the fields of its dataclass in `arguments`. Nothing here imports
torch, transformers or a stage before the stage runs, so that `--help` and wrong flags are answered at once.
"""

import difflib
import logging
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import tyro

from ._version import __version__
from .arguments import (
    BenchArguments,
    CalibrateArguments,
    ConvertArguments,
    DemoArguments,
    EvaluateArguments,
    ExportArguments,
    GenerateArguments,
    InspectArguments,
    PlanArguments,
    PublishArguments,
    ReportArguments,
    ServeArguments,
)
from .flags import command_type
from .screens import (
    show_benchmark,
    show_calibration,
    show_evaluation,
    show_generation,
    show_inspection,
    show_json,
    show_paths,
    show_plan,
    show_publication,
    show_record,
    show_training,
)
from .training_arguments import AdaptArguments, TrainArguments


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


TRAINED_FOLDERS = {
    "folder": "model folder to read",
    "out": "folder to write; checkpoints lie in OUT.checkpoints until the end",
}


@dataclass(frozen=True)
class Stage:
    """One subcommand: `function` of the module `module`, which takes `positionals` and an instance of `arguments`."""

    module: str
    function: str
    arguments: type | None
    positionals: dict[str, str]  # name -> help
    show: Callable[[Any], None]
    help: str
    examples: list[str]
    json: bool = False
    exclusive: list[str] = field(default_factory=list)  # fields of which one at most may be given
    optional: list[str] = field(default_factory=list)  # positionals that may be left out


STAGES = {
    "plan": Stage(
        "plan", "plan_base", PlanArguments, {"base": "Hub id or folder of a dense model, or of a DynaMoE one; or a config.json"}, show_plan,
        "What a base will cost, from its config alone: sizes at each budget, FLOPs, memory, hours.",
        ["dynamoe plan HuggingFaceTB/SmolLM2-135M-Instruct --tokens 2000000",
         "dynamoe plan meta-llama/Llama-3.1-8B --tokens 200000000 --hardware h100 --devices 8 --dtype bfloat16"],
        json=True,
    ),
    "convert": Stage(
        "convert", "convert_model", ConvertArguments,
        {"base": "Hub id or folder of a dense model; or a .gguf file, or its folder", "out": "folder to write; must not exist"},
        show_record,
        "Dense model -> DynaMoE: rank and reorder neurons, add routers, prove parity.",
        ["dynamoe convert HuggingFaceTB/SmolLM2-135M-Instruct converted",
         "dynamoe convert ./gguf-folder converted --widths 0,0.25,0.5,1 --text notes.txt"],
    ),
    "adapt": Stage(
        "train", "adapt_model", AdaptArguments, TRAINED_FOLDERS, show_training,
        "Let the full width learn a text that the base does not know, before `train`. Leave it out to keep the base's.",
        ["dynamoe adapt converted adapted --text corpus.txt --max-tokens 800000       # two fifths of the tokens you can afford",
         "dynamoe train adapted trained --text corpus.txt --max-tokens 1200000"],
    ),
    "train": Stage(
        "train", "train_model", TrainArguments, TRAINED_FOLDERS, show_training,
        "Fine-tune routers and experts, close to what the full width says. The defaults are the recipe of docs/results.md.",
        ["dynamoe train converted trained",
         "dynamoe train converted trained --text a.txt b.txt --max-tokens 2000000",
         "dynamoe train converted trained --resume              # after an interruption",
         "dynamoe train converted trained --dataset HuggingFaceFW/fineweb-edu:sample-10BT --train lora --bf16"],
    ),
    "calibrate": Stage(
        "calibrate", "calibrate_budgets", CalibrateArguments, {"folder": "trained model folder"}, show_calibration,
        "Budgets (mean share of the MLPs' weights) -> sensitivities, written into the folder's config.",
        ["dynamoe calibrate trained --budgets 0.5,0.6,0.75,0.9"],
    ),
    "evaluate": Stage(
        "evaluate", "evaluate_model", EvaluateArguments, {"folder": "model folder or Hub id"}, show_evaluation,
        "Perplexity, mean width and use of experts at a setting of the dial -> results.json.",
        ["dynamoe evaluate trained --budget 0.5,0.75 --base HuggingFaceTB/SmolLM2-135M-Instruct --baselines static random",
         "dynamoe evaluate trained --force-expert 3 --json",
         "dynamoe evaluate trained --budget 0.75 --tasks literature"],
        json=True, exclusive=["budget", "sensitivity", "force_expert"],
    ),
    "generate": Stage(
        "generate", "generate_on_terminal", GenerateArguments,
        {"folder": "model folder or Hub id", "prompt": "text to continue, or a question with --chat; --chat alone is a conversation"},
        show_generation,
        "Continue a prompt at a setting of the dial, answer a question, or hold a conversation.",
        ['dynamoe generate trained "The with statement" --budget 0.5',
         'dynamoe generate trained "What is a prime number?" --chat',
         "dynamoe generate trained --chat --budget 0.75            # /quit or Ctrl-D ends it, Ctrl-C an answer",
         'dynamoe generate trained "The with statement" --budget 0.5 --int8     # on a CPU'],
        exclusive=["budget", "sensitivity", "draft_budget"], optional=["prompt"],
    ),
    "serve": Stage(
        "serve", "serve_folder", ServeArguments, {"folder": "model folder or Hub id"}, lambda nothing: None,
        "A server with OpenAI's API, by the best engine that is installed: vLLM, or transformers.",
        ["dynamoe serve trained --budget 0.75",
         "dynamoe serve trained --engine vllm --dtype bfloat16 --engine-flags='--max-model-len 2048'"],
        exclusive=["budget", "sensitivity"],
    ),
    "inspect": Stage(
        "folder", "inspect_folder", InspectArguments, {"folder": "model folder or Hub id"}, show_inspection,
        "What a model folder holds, in one screen.",
        ["dynamoe inspect trained", "dynamoe inspect trained --verify     # the weights too, by SHA-256"], json=True,
    ),
    "bench": Stage(
        "benchmark", "bench_folder", BenchArguments, {"folder": "calibrated model folder"}, show_benchmark,
        "Wall-clock against the dense model in the same run -> benchmark.json.",
        ["dynamoe bench trained",
         "dynamoe bench trained --budgets 0.5 --threads 2 --json",
         "dynamoe bench trained --dtype bfloat16                  # as it will be served"],
        json=True,
    ),
    "report": Stage(
        "report", "report_folder", ReportArguments, {"folder": "evaluated model folder"}, show_paths,
        "Pictures: frontier, use of experts by layer, a text coloured by difficulty.",
        ["dynamoe report trained", "dynamoe report trained --text story.txt --budget 0.5"],
    ),
    "publish": Stage(
        "publish", "publish_model", PublishArguments,
        {"folder": "evaluated model folder", "repo": "user/NAME or organisation/NAME; the token is that of `hf auth login` or HF_TOKEN"},
        show_publication,
        "Variants on the Hub: cards, repositories or branches, a Collection.",
        ["dynamoe publish trained user/SmolLM2-135M-DynaMoE --dry-run",
         "dynamoe publish trained user/SmolLM2-135M-DynaMoE --variants 0.5,0.75 --layout revisions"],
    ),
    "export": Stage(
        "export", "export_dense", ExportArguments,
        {"folder": "model folder or Hub id", "out": "folder to write; must not exist"}, show_record,
        "One width as a plain smaller dense model, for runtimes without routers: transformers or llama.cpp (GGUF).",
        ["dynamoe export trained small --width 0.5",
         "dynamoe export trained small --width 0.5 --gguf q8_0     # small/small-q8_0.gguf, for llama.cpp",
         "dynamoe export trained small --budget 0.6 --gguf f16     # each layer its own width"],
        exclusive=["width", "budget"],
    ),
    "demo": Stage(
        "demo", "run_demo", DemoArguments, {}, lambda rows: None,
        "The whole way on SmolLM2-135M-Instruct: about 20 minutes on two cores.",
        ["dynamoe demo --out runs/demo"],
    ),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one subcommand. What goes wrong is told in one line on stderr, with exit code 1, and an interruption with 130; `--debug` shows
    the traceback instead.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    name = argv[0] if argv else ""
    if name not in STAGES:
        return tell_stages(name)
    stage = STAGES[name]
    values = parse(name, argv[1:])
    show = show_json if values.pop("json", False) else stage.show
    inputs = [values.pop(positional) for positional in stage.positionals]
    quieten_imports()
    is_main = int(os.environ.get("RANK", 0)) == 0
    if not is_main:
        if stage.module != "train":
            return 0  # the first process does it
        os.environ["TQDM_DISABLE"] = "1"
    try:
        if stage.arguments is not None:
            inputs.append(stage.arguments(**values))
        with terminable():
            result = getattr(import_module(f".{stage.module}", __package__), stage.function)(*inputs)
            if is_main:
                show(result)
            if "RANK" in os.environ:
                import_module(".processes", __package__).leave_processes()
    except KeyboardInterrupt as error:
        if debug:
            raise
        # A progress bar may have begun the line.
        print(
            f"\ndynamoe: {error if str(error) else 'Interrupted. Nothing is half-written: give the same command again.'}",
            file=sys.stderr,
        )
        return 130
    except Exception as error:
        if debug:
            raise
        print(f"dynamoe: {' '.join(explained(error).split())}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end a stage as Ctrl-C does, so that it removes what it has begun to write."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def explained(error: Exception) -> str:
    """What is wrong, what was found, and what to do."""
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return (
            f"A file cannot be read or written: found {error.strerror}{f', {error.filename}' if error.filename else ''}. Look whether the "
            "path is right and the disk has room, then give the same command again."
        )
    if isinstance(error, ValueError | OSError | FloatingPointError):
        return str(error)
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"The GPU's memory does not suffice: {str(error).partition('. ')[0]}. Take smaller batches or blocks where the "
            "stage has them (`--help`), or compute on the CPU: `CUDA_VISIBLE_DEVICES= dynamoe ...`."
        )
    return (
        f"The stage failed in a way that is not foreseen: found {type(error).__name__}: {error}. Look whether its inputs are whole "
        "(`dynamoe inspect FOLDER --verify`); with `--debug` the same command shows where it failed."
    )


def tell_stages(name: str) -> int:
    """What `dynamoe` says without a stage: its version, the list of stages, or that a stage does not exist."""
    if name == "--version":
        print(f"dynamoe {__version__}")
    elif name in ("-h", "--help"):
        stages = "\n".join(f"  {name:10} {stage.help}" for name, stage in STAGES.items())
        options = "  -h, --help (also after a stage: its flags, defaults and examples)\n  --version\n  --debug (a traceback where a stage fails)"
        print(f"usage: dynamoe STAGE ...\n\n{DESCRIPTION}\n\nstages:\n{stages}\n\noptions:\n{options}")
    else:
        near = difflib.get_close_matches(name, STAGES, 1)
        what = f"There is no stage {name!r}." if name else "A stage is missing."
        advice = f"Did you mean {near[0]!r}?" if near else f"Choose one of {', '.join(STAGES)}."
        print(f"dynamoe: {what} {advice} See `dynamoe --help`.", file=sys.stderr)
        return 2
    return 0


def parse(name: str, argv: Sequence[str]) -> dict[str, Any]:
    """The values of a stage's positionals and flags. Wrong ones end the process with exit code 2, and `--help` with 0."""
    stage = STAGES[name]
    command = command_type(stage.arguments, stage.positionals, stage.json, stage.exclusive, stage.optional)
    description = f"{stage.help}\n\nexample:\n" + textwrap.indent("\n".join(stage.examples), "  ")
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    return dict(vars(tyro.cli(command, prog=f"dynamoe {name}", description=description, args=argv, config=config)))


def quieten_imports() -> None:
    """
    Drop two messages that appear when transformers or peft import torchao, and that say nothing about a stage: which of its kernels
    cannot be loaded on this machine, and a deprecation that concerns torchao's own code.
    """
    dropped = ("Failed to load ", "%s is an Enum subclass and is now natively supported")

    def keeps(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(dropped)

    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).addFilter(keeps)


if __name__ == "__main__":
    sys.exit(main())
