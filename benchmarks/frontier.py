"""
Quality against compute: DynaMoE and every alternative, trained on as many tokens and evaluated on the same ones.

    python benchmarks/frontier.py OUT                       # everything: hours, see the record for how many
    python benchmarks/frontier.py OUT --bf16 --jobs 2       # two contenders at a time, in mixed precision
    python benchmarks/frontier.py OUT --only ours dense     # some contenders, for now
    python benchmarks/frontier.py OUT --tokens 4096 --eval-tokens 2048   # a rehearsal, minutes

SmolLM2-135M-Instruct. Texts: Debian's `anarchism` and `perl-doc` and Python's topics (training, and held-out documents of
each), and `postgresql-doc-15`, which nothing trains on or calibrates with. Whatever is finished lies in OUT and is not done
again: stop it when you like, and run the same command to go on. Contenders, each at mean MLP shares of 90, 75, 60, 50 and 40%:

  ours          our recipe: one checkpoint, its routers, the dial set for each share
  ours-oracle   the same weights, labels instead of routers
  ours-random   the same weights, experts drawn with the routers' frequencies in each layer
  routers       our conversion with nothing but its routers trained, in minutes
  untrained     our conversion before training, labels as routes (an oracle)
  paper         the paper's recipe: projection labels, argmax routers, 0.2 LM loss + router loss, one run for each share
  static        one width for all tokens and layers, from a family trained for it (MatFormer)
  mixnmatch     one width a layer, searched on calibration text, from the same family
  flextron      widths and attention heads of each layer, searched for the active parameters of the share, a family of its own
  flextron-in   the same weights, widths and heads chosen for each token by small routers
  teal          magnitude sparsity of the activations that the MLP's products read, training-free (share: entries not zero)
  teal-adapted, teal-tuned   the same sparsity of the dense models below
  cmoe          shared and routed experts by clustering, training-free (share: neurons computed)
  adapted       the dense model after two fifths of the tokens, from which ours and the trained rivals learn (full width only)
  tuned         the dense model trained on all of the tokens (full width only)

and if named by `--only`:

  ours-long     ours on twice the tokens of all others: what more training of the experts gives
  ours-long-oracle, ours-long-random   its labels and random routes

Ratios are perplexities over the dense base's on the same tokens, with 95% intervals over paired blocks. Writes
benchmarks/results/frontier_<processor or GPU>_<yyyymm>.{json,md,png}, where what was measured before with the same settings stays.
"""

import argparse
import copy
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cache, cached_property, partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from rivals import shared_and_routed
from subnets import InputRouters, Subnet, module_errors, pruned, search
from texts import PACKAGES, write_texts
from tqdm.auto import tqdm
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

from dynamoe_hf.arguments import EIGHTHS
from dynamoe_hf.benchmark import machine
from dynamoe_hf.calibrate import sensitivity_at
from dynamoe_hf.convert import convert_model, load_dense
from dynamoe_hf.data import read_documents, token_blocks, topic_documents
from dynamoe_hf.demo import obtain_model
from dynamoe_hf.evaluate import block_nll, ratio_to, routed_nll
from dynamoe_hf.export import dense_prefix
from dynamoe_hf.folder import (
    CONVERSION,
    TRAINING,
    load_model,
    load_tokenizer,
    new_folder,
    read_json,
    update_config,
    write_json,
)
from dynamoe_hf.importance import SINK_POSITIONS
from dynamoe_hf.losses import LossesInChunks, layer_outputs, relative_error
from dynamoe_hf.observe import expert_shares, run_routers, sensitivity_for, shares_taken, similarity_profiles, watch
from dynamoe_hf.train import adapt_model, train_model


SHARES = (0.9, 0.75, 0.6, 0.5, 0.4)
UNSEEN = "postgresql-doc-15"
TRAINING_PACKAGES = tuple(name for name in PACKAGES if name != UNSEEN)
TEXTS = (UNSEEN, *TRAINING_PACKAGES, "topics")
PIECE = 4000  # characters of the pieces in which the training text is shuffled
# What every trained contender has in common with ours, so that only the architecture differs.
SCHEDULE = {"block_size": 256, "batch_size": 4, "learning_rate": 2e-4}
# First the full width learns the text, gently (`adapt_model`): a dense model that its narrower experts then learn from, on the rest.
ADAPT_SHARE = 0.4
LONGER = 2  # times the tokens of the others that `ours-long` learns from; its teacher is that of `ours`
OURS = {
    **SCHEDULE,
    "train_parts": "layers",
    "route": "router",
    "harm": "token",
    "lm_loss_coef": 0.0,
    "kd_loss_coef": 1.0,
    "hidden_loss_coef": 10.0,
    "router_loss_coef": 0.0,
    "logit_fraction": 1.0,
    "choice_share": 0.2,
    "width_loss_coef": 0.9,
}
ROUTER_TOKENS = 65_536
PAPER = {
    **SCHEDULE, "train_parts": "mlp", "route": "router", "teacher": "none", "lm_loss_coef": 0.2, "kd_loss_coef": 0.0,
    "hidden_loss_coef": 0.0, "router_loss_coef": 1.0, "logit_fraction": 1.0, "router_tokens": 0,
}  # fmt: skip
# Routers spend two fifths of the width at 0.3. At 1 the full width stays in what is trained, or it would drift.
TRAINED_SENSITIVITY = (0.2, 1.0)
SMALLEST_SHARE = 0.3  # that is drawn for the static families
SHARE_STEPS = 20  # shares that the static families draw, so that each sub-network is searched once
CMOE_GROUPS = 24
INPUT_TOKENS = 16_384  # that the routers of flextron-in are fitted on
CONVERSION_TOKENS = 32_768  # of two kinds of documents a smaller sample may be mostly one, which training does not undo
CALIBRATION_TOKENS = 8192
# Contenders are compared at one share of one text, so the dial is set there: first on every fifth block, then on all if that misses.
# No target is read, only what the routers say. How far a dial set on one text carries to another, `dynamoe evaluate` shows.
DIAL_PART, DIAL_TOLERANCE = 5, 0.002


FUNCTION_WORD = re.compile(
    r"a|an|the|of|to|in|on|at|by|for|from|with|as|and|or|but|if|then|than|that|this|these|those|it|its|is|are|"
    r"was|were|be|been|being|has|have|had|do|does|did|not|no|can|could|may|might|must|shall|should|will|would|"
    r"which|who|what|when|where|how|there|they|them|their|he|she|his|her|you|your|we|our|i",
    re.IGNORECASE,
)


def prepare_texts(out: Path):
    """
    `train.txt`, pieces of all training documents in a fixed random order, and `held-out/<text>.txt`: a tenth of the documents of
    each package, the topics' held-out split, and the unseen package.

    Documents of a package quote each other, so a paragraph that a held-out one has is dropped from the training text.
    """
    if (out / "train.txt").exists():
        return
    if not all((out / "texts" / f"{name}.txt").exists() for name in PACKAGES):
        write_texts(out / "texts")
    held_out = {"topics": topic_documents("held-out"), UNSEEN: read_documents(out / "texts" / f"{UNSEEN}.txt")}
    training = topic_documents("training")
    for name in TRAINING_PACKAGES:
        documents = read_documents(out / "texts" / f"{name}.txt")
        count, size = 0, 0
        while size < sum(map(len, documents)) / 10:
            size += len(documents[count])
            count += 1
        held_out[name], training = documents[:count], training + documents[count:]
    (out / "held-out").mkdir(parents=True, exist_ok=True)
    for name, documents in held_out.items():
        (out / "held-out" / f"{name}.txt").write_text("\f".join(documents))
    seen = {" ".join(p.split()) for documents in held_out.values() for d in documents for p in d.split("\n\n")}
    pieces = []
    for document in training:
        piece = ""
        for paragraph in document.split("\n\n"):
            if " ".join(paragraph.split()) not in seen:
                piece += paragraph + "\n\n"
            if len(piece) > PIECE:
                pieces, piece = [*pieces, piece], ""
        if piece.strip():
            pieces.append(piece)
    random.Random(0).shuffle(pieces)
    (out / "train.txt").write_text("\f".join(pieces))


class Bench:
    """Models and texts of one experiment, made when first asked for and kept in `out`."""

    def __init__(self, out: Path, tokens: int, eval_tokens: int, base=None, bf16=False):
        self.out, self.tokens, self.eval_tokens, self.bf16 = out, tokens, eval_tokens, bf16
        self.seconds_trained = 0.0  # in this process
        self.batch_size = 16 if torch.cuda.is_available() else 4  # sequences that are evaluated at once
        prepare_texts(out)
        self.base = base or obtain_model(out / "base")
        self.text, self.dense_model, self.ours, self.subnet, self.paper, self.family, self.magnitudes = map(
            cache, (self._text, self._dense_model, self._ours, self._subnet, self._paper, self._family, self._magnitudes)
        )

    @property
    def dense(self):
        return self.dense_model("dense")

    @cached_property
    def tokenizer(self):
        return load_tokenizer(self.converted)

    def _text(self, name):
        """Evaluation blocks, (N, 512), spread over the whole text."""
        blocks = token_blocks(read_documents(self.out / "held-out" / f"{name}.txt"), self.tokenizer, 512)
        count = -(-self.eval_tokens // 511)
        if len(blocks) < count:
            raise ValueError(f"{name} has {len(blocks)} blocks of 512 tokens, {count} are needed. Lower --eval-tokens.")
        return blocks[torch.linspace(0, len(blocks) - 1, count).long()]

    @cached_property
    def training_blocks(self):
        tokens = self.tokens - self.adapt_tokens
        return token_blocks(read_documents(self.out / "train.txt"), self.tokenizer, SCHEDULE["block_size"], tokens)

    @cached_property
    def calibration(self):
        return token_blocks(read_documents(self.out / "train.txt"), self.tokenizer, 512, CALIBRATION_TOKENS)

    @cached_property
    def converted(self):
        folder, staging = self.out / "converted", self.out / "converted.partial"
        if not folder.exists():
            shutil.rmtree(staging, ignore_errors=True)
            options = {"text": self.out / "train.txt", "max_tokens": min(CONVERSION_TOKENS, self.tokens)}
            convert_model(self.base, staging, widths=EIGHTHS, similarity="loss_gain", **options)
            update_config(staging, train_sensitivity=TRAINED_SENSITIVITY)
            staging.rename(folder)
        return folder

    def trained(self, name, source, tokens, stage=train_model, **settings):
        """A folder trained from `source`, going on where an earlier run stopped."""
        folder = self.out / name
        if not folder.exists():
            resume = Path(f"{folder}.checkpoints", "run.json").exists()
            settings = {**settings, "text": self.out / "train.txt", "max_tokens": tokens, "bf16": self.bf16}
            with self._training_time():
                stage(source, folder, resume=resume, **settings)
        return folder

    def precision(self):
        """In which everything is evaluated: that of the training."""
        return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16, enabled=self.bf16)

    def nll(self, model, text):
        with self.precision():
            return block_nll(model, self.text(text), self.batch_size).tolist()

    @contextmanager
    def _training_time(self):
        started = time.monotonic()
        yield
        self.seconds_trained += time.monotonic() - started

    @property
    def adapt_tokens(self):
        """In whole steps."""
        a_step = SCHEDULE["block_size"] * SCHEDULE["batch_size"]
        return int(ADAPT_SHARE * self.tokens) // a_step * a_step

    @cached_property
    def adapted(self):
        return self.trained("adapted", self.converted, self.adapt_tokens, adapt_model)

    @cached_property
    def tuned(self):
        return self.trained("tuned", self.converted, self.tokens, adapt_model)

    def _ours(self, name):
        tokens = {"ours": 1, "ours-long": LONGER}[name] * self.tokens - self.adapt_tokens
        return load_model(self.trained(name, self.adapted, tokens, router_tokens=min(ROUTER_TOKENS, tokens), **OURS))

    @cached_property
    def routers(self):
        tokens = min(ROUTER_TOKENS, self.tokens)
        return load_model(
            self.trained("routers", self.converted, tokens, train_parts="routers", harm="token", choice_share=1.0)
        )

    @cached_property
    def untrained(self):
        return load_model(self.converted)

    def _paper(self, share):
        """The paper's model of one share: the labels of the projection take that share on the calibration text, before training."""
        source = self.out / "paper-converted"
        if not source.exists():
            convert_model(
                self.base, source, widths=(0.25, 0.5, 0.75, 1), similarity="projection", router_type="argmax", importance="activation",
                text=self.out / "train.txt",
            )  # fmt: skip
        model = load_model(source)
        theta = sensitivity_for(similarity_profiles(model, self.calibration), expert_shares(model), share)
        update_config(source, train_sensitivity=[theta, theta])
        return load_model(self.trained(f"paper-{share:.0%}", source, self.tokens // len(SHARES), **PAPER))

    def _dense_model(self, name):
        """The base, or what it was at the end of a training; of the latter, neurons are in the order of importance."""
        return load_dense(self.base)[0] if name == "dense" else dense_prefix(load_model(getattr(self, name)), 1.0)

    @property
    def adapted_dense(self):
        """Where rivals that take prefixes start, as ours does."""
        return self.dense_model("adapted")

    @cached_property
    def errors(self):
        return module_errors(self.adapted_dense, self.calibration)

    def _subnet(self, share, with_heads):
        return search(self.errors, self.adapted_dense.config, share, with_heads)

    def _family(self, name):
        """A dense model trained so that its sub-networks serve too; each step draws one of them. With ours' losses and tokens."""
        folder = self.out / name
        if not folder.exists():
            draw, teacher = {"static": self._draw_static, "flextron": self._draw_flextron}[name], self.adapted_dense
            with self._training_time():
                train_family(self, folder, teacher, draw)
        return load_dense(folder)[0]

    def _draw_static(self, share, coin):
        return self.subnet(share, False) if coin else Subnet.of_width(share, self.adapted_dense.config)

    def _draw_flextron(self, share, coin):
        return self.subnet(share, True)

    @cached_property
    def input_routers(self):
        blocks = token_blocks(read_documents(self.out / "train.txt"), self.tokenizer, 512, min(INPUT_TOKENS, self.tokens))
        return InputRouters(self.family("flextron"), blocks, self.errors)

    @cached_property
    def clusters(self):
        return shared_and_routed(self.dense, self.calibration[:8], groups=CMOE_GROUPS, shared=CMOE_GROUPS // 4)

    def _magnitudes(self, name):
        """For each layer, sorted sizes of what gate and up read, and of what down reads, over calibration tokens."""
        return activation_sizes(self.dense_model(name), self.calibration[:4])

    def training_seconds(self):
        """Of each folder that was trained."""
        return {path.parent.name: read_json(path)["seconds"] for path in sorted(self.out.glob(f"*/{TRAINING}"))}

    def measured(self, contender, share, text):
        """`{"share": reached, "nll": [each block], ...}` of one contender on one text, kept in `out`."""
        path = self.out / "measured" / f"{contender}-{share:g}-{text}.json"
        if not path.exists():
            started, trained = time.monotonic(), self.seconds_trained
            record = CONTENDERS[contender](self, share, text)
            # A contender is trained when it is first asked for, and its training keeps its own time.
            record["seconds"] = round(time.monotonic() - started - (self.seconds_trained - trained), 1)
            path.parent.mkdir(exist_ok=True)
            staging = path.with_suffix(".partial")
            staging.write_text(json.dumps(record))
            staging.rename(path)
        return json.loads(path.read_text())


def train_family(bench, folder, teacher, draw):
    """
    Train a copy of the `teacher`, the adapted dense model, under sub-networks drawn step by step, with the tokens, the losses and the schedule of ours.
    A state is kept every fifty steps, from which the next call goes on.
    """
    model = copy.deepcopy(teacher)
    model.requires_grad_(True).get_input_embeddings().requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=SCHEDULE["learning_rate"], betas=(0.9, 0.95), weight_decay=0.0)
    blocks, size = bench.training_blocks, SCHEDULE["batch_size"]
    steps = len(blocks) // size
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, min(10, steps // 10), steps, min_lr_rate=0.05)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(blocks), generator=generator)
    draws = torch.rand(steps, 2, generator=generator)
    shares = SMALLEST_SHARE + (1 - SMALLEST_SHARE) * draws[:, 0]
    shares = (shares * SHARE_STEPS).round() / SHARE_STEPS
    path, first, seconds = Path(f"{folder}.state.pt"), 0, 0.0
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first, seconds = state["step"], state["seconds"]
    model.train()
    started = time.monotonic() - seconds
    for step in tqdm(range(first, steps), desc=folder.name, initial=first, total=steps):
        batch = blocks[order[step * size : (step + 1) * size]].to(model.device)
        subnet = draw(shares[step].item(), draws[step, 1] < 0.5)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bench.bf16), pruned(model, subnet):
            with layer_outputs(model.model.layers) as states:
                hidden = model.model(batch, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
            with torch.no_grad(), layer_outputs(teacher.model.layers) as target_states:
                target_hidden = teacher.model(batch, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)

            def losses(hidden, target_hidden):
                with torch.no_grad():
                    wanted = teacher.lm_head(target_hidden).float().log_softmax(-1)
                log_probs = model.lm_head(hidden).float().log_softmax(-1)
                return F.kl_div(log_probs, wanted, log_target=True, reduction="sum")[None]

            loss, _ = LossesInChunks.apply(losses, torch.ones(1, device=model.device) / len(hidden), hidden, target_hidden)
            loss = loss + OURS["hidden_loss_coef"] * relative_error(states, target_states)[:, :-1].mean()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            torch.save({**state, "step": step + 1, "seconds": time.monotonic() - started}, f"{path}.partial")
            Path(f"{path}.partial").rename(path)
    with new_folder(folder) as target:
        model.save_pretrained(target)
        bench.tokenizer.save_pretrained(target)
        write_json(
            target / TRAINING, {"tokens": steps * size * blocks.shape[1], "seconds": round(time.monotonic() - started, 1)}
        )
    path.unlink()


@torch.no_grad()
def activation_sizes(dense, blocks):
    sizes = [([], []) for _ in dense.model.layers]
    hooks = []
    for layer, kept in zip(dense.model.layers, sizes):
        for projection, values in zip((layer.mlp.up_proj, layer.mlp.down_proj), kept):
            hooks.append(
                projection.register_forward_pre_hook(
                    lambda module, args, values=values: values.append(args[0][0, SINK_POSITIONS:].abs().flatten()[::7])
                )
            )
    for block in blocks:
        dense.model(block[None].to(dense.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [[torch.cat(values).sort().values for values in kept] for kept in sizes]


def unrouted(bench, text, dense):
    return {"share": 1.0, "nll": bench.nll(dense, text)}


def routed(bench, share, text, model):
    """At a share of 1 the full width; else the dial is set so that the routers reach the share on the text."""
    if share == 1:
        return _routed(bench, model, text, force_expert=model.config.expert_count - 1)
    blocks, size = bench.text(text), bench.batch_size
    with bench.precision():
        theta = sensitivity_at(model, blocks[::DIAL_PART], share, size)
        reached = run_routers(model, blocks, expert_shares(model), theta, size).share_N.mean().item()
        if abs(reached - share) > DIAL_TOLERANCE:
            theta = sensitivity_at(model, blocks, share, size, DIAL_TOLERANCE)
    return _routed(bench, model, text, sensitivity=theta)


def oracle(bench, share, text, model):
    """Labels as routes. Narrow experts in early layers change what later labels are, so the threshold is corrected twice."""
    part, shares = bench.text(text)[::DIAL_PART], expert_shares(model)
    with bench.precision(), torch.no_grad():
        theta = sensitivity_for(similarity_profiles(model, part, bench.batch_size), shares, share)
        for _ in range(2):
            profiles = similarity_profiles(model, part, bench.batch_size, route="label", sensitivity=theta)
            theta = sensitivity_for(profiles, shares, share)
    return _routed(bench, model, text, route="label", sensitivity=theta)


def random_routes(bench, share, text, name):
    use = torch.tensor(bench.measured(name, share, text)["expert_use"])
    torch.manual_seed(0)
    return _routed(bench, bench.ours(name), text, route="random", histogram=use)


def _routed(bench, model, text, **routing):
    with bench.precision():
        found = routed_nll(model, bench.text(text), bench.batch_size, **routing)
    routing.pop("histogram", None)
    return {"share": found.share, "nll": found.nll.tolist(), "expert_use": found.use.tolist(), **routing}


def paper(bench, share, text):
    return _routed(bench, bench.paper(share), text)


def family(bench, share, text, name, subnet):
    model, subnet = bench.family(name), subnet(bench, share)
    with pruned(model, subnet):
        nll = bench.nll(model, text)
    widths = subnet.widths or [model.config.intermediate_size]
    return {
        "share": share,
        "nll": nll,
        "mlp_share": sum(widths) / len(widths) / model.config.intermediate_size,
        **subnet._asdict(),
    }


def flextron_by_input(bench, share, text):
    """Tokens have, on average, the active parameters of `share` of the MLPs with all of the attention."""
    routers, blocks = bench.input_routers, bench.text(text)
    config = routers.dense.config
    mlp, attention = (kind.cost * config.num_hidden_layers for kind in routers.kinds)
    budget = share * mlp + attention
    with bench.precision():
        logit = routers.dial(blocks, budget, routers.dial(blocks[::DIAL_PART], budget))
    records = []
    with routers.routed(logit, records):
        nll = bench.nll(routers.dense, text)
    spent = routers.spent(records, logit)
    return {
        "share": (spent - attention) / mlp,
        "nll": nll,
        "mlp_share": routers.spent([r for r in records if r[0] == 0], logit) / 2 / mlp,
    }


def teal(bench, share, text, name="dense"):
    """Entries below a quantile of calibration sizes are zero; the share is that of the entries left, over all three products."""
    dense, seen = bench.dense_model(name), [0, 0]

    def hook(threshold):
        def cut(module, args):
            keep = args[0].abs() > threshold
            # An entry that is read keeps one column of the product's weight.
            seen[0] += keep.sum().item() * module.out_features
            seen[1] += keep.numel() * module.out_features
            return (args[0] * keep,)

        return cut

    hooks = []
    for layer, (reads, activations) in zip(dense.model.layers, bench.magnitudes(name)):
        low, high = (values[min(int((1 - share) * len(values)), len(values) - 1)].item() for values in (reads, activations))
        hooks += [
            layer.mlp.gate_proj.register_forward_pre_hook(hook(low)),
            layer.mlp.up_proj.register_forward_pre_hook(hook(low)),
            layer.mlp.down_proj.register_forward_pre_hook(hook(high)),
        ]
    try:
        nll = bench.nll(dense, text)
    finally:
        for each in hooks:
            each.remove()
    return {"share": seen[0] / seen[1], "nll": nll}


def cmoe(bench, share, text):
    """At the next share that its parts can make, so never at less than asked."""
    groups = math.ceil(share * CMOE_GROUPS)
    for layer in bench.clusters.model.layers:
        layer.mlp.top_k = groups - CMOE_GROUPS // 4
    return {"share": groups / CMOE_GROUPS, "nll": bench.nll(bench.clusters, text)}


def uniform_width(bench, share):
    return Subnet.of_width(share, bench.adapted_dense.config)


CONTENDERS: dict[str, Callable] = {
    "dense": lambda bench, share, text: unrouted(bench, text, bench.dense),
    "ours": lambda bench, share, text: routed(bench, share, text, bench.ours("ours")),
    "ours-long": lambda bench, share, text: routed(bench, share, text, bench.ours("ours-long")),
    "ours-oracle": lambda bench, share, text: oracle(bench, share, text, bench.ours("ours")),
    "ours-random": partial(random_routes, name="ours"),
    "ours-long-oracle": lambda bench, share, text: oracle(bench, share, text, bench.ours("ours-long")),
    "ours-long-random": partial(random_routes, name="ours-long"),
    "untrained": lambda bench, share, text: oracle(bench, share, text, bench.untrained),
    "routers": lambda bench, share, text: routed(bench, share, text, bench.routers),
    "adapted": lambda bench, share, text: unrouted(bench, text, bench.adapted_dense),
    "tuned": lambda bench, share, text: unrouted(bench, text, bench.dense_model("tuned")),
    "teal": teal,
    "teal-adapted": partial(teal, name="adapted"),
    "teal-tuned": partial(teal, name="tuned"),
    "cmoe": cmoe,
    "static": partial(family, name="static", subnet=uniform_width),
    "mixnmatch": partial(family, name="static", subnet=lambda bench, share: bench.subnet(share, False)),
    "flextron": partial(family, name="flextron", subnet=lambda bench, share: bench.subnet(share, True)),
    "flextron-in": flextron_by_input,
    "paper": paper,
}
FULL_ONLY, WITH_FULL = ("dense", "adapted", "tuned"), ("ours", "ours-long")
IF_NAMED = ("ours-long", "ours-long-oracle", "ours-long-random")
# Contenders that share what is trained, for `--jobs`: the longest first.
GROUPS = (
    IF_NAMED,
    ("ours", "ours-oracle", "ours-random"),
    ("flextron", "flextron-in"),
    ("paper",),
    ("static", "mixnmatch"),
    ("tuned", "teal-tuned"),
    ("routers",),
    ("untrained", "adapted", "teal", "teal-adapted"),
    ("cmoe",),
)
WITHOUT_OURS = ("dense", "tuned", "teal", "teal-tuned", "cmoe", "paper")  # what they are does not depend on our recipe
ORACLES = ("ours-oracle", "ours-long-oracle", "untrained")
LABELS = {
    "dense": "dense base",
    "ours": "DynaMoE",
    "ours-long": f"DynaMoE, {LONGER} times the tokens",
    "ours-oracle": "its labels (oracle)",
    "ours-random": "random routes",
    "ours-long-oracle": f"labels (oracle), {LONGER} times the tokens",
    "ours-long-random": f"random routes, {LONGER} times the tokens",
    "routers": "routers alone trained",
    "untrained": "labels before training (oracle)",
    "adapted": "dense, adapted: the teacher",
    "tuned": "dense, trained on the same tokens",
    "teal": "activation sparsity (TEAL-style)",
    "teal-adapted": "activation sparsity of the adapted model",
    "teal-tuned": "activation sparsity of the dense model trained on the same tokens",
    "cmoe": "shared + routed experts (CMoE-style)",
    "static": "static width",
    "mixnmatch": "static width per layer (Mix'n'Match)",
    "flextron": "widths and heads (Flextron-style, static)",
    "flextron-in": "widths and heads by the input (Flextron-style)",
    "paper": "the paper's recipe",
}


@torch.no_grad()
def what_is_learned(bench, name, share):
    """Mean share of MLP width at one setting on the unseen text: by layer, by position in the block, by class of token."""
    model, blocks = bench.ours(name), bench.text(UNSEEN)
    kept, shares, theta = [], expert_shares(model), bench.measured(name, share, UNSEEN)["sensitivity"]
    with bench.precision():
        for records in watch(model, blocks, sensitivity=theta):
            kept.append(shares_taken(shares, [record.expert for record in records]))
    width_LNS = torch.cat(kept, 1)
    width_NS, classes = width_LNS.mean(0), {}
    names = {token: token_class(bench.tokenizer.convert_ids_to_tokens(token)) for token in blocks.unique().tolist()}
    for token, width in zip(blocks.flatten().tolist(), width_NS.flatten().tolist()):
        classes.setdefault(names[token], []).append(width)
    edges = [0, 1, 4, 16, 64, 256, 512]
    return {
        "share": share,
        "by_layer": [round(value, 4) for value in width_LNS.mean((1, 2)).tolist()],
        "by_position": {f"{a} to {b - 1}": round(width_NS[:, a:b].mean().item(), 4) for a, b in zip(edges, edges[1:])},
        "by_class": {name: {"tokens": len(v), "share": round(sum(v) / len(v), 4)} for name, v in sorted(classes.items())},
    }


def token_class(token):
    """What a piece of a byte-level vocabulary is; its space is written as the letter that stands for that byte."""
    word = token.lstrip("\u0120")
    if not word or "\u010a" in token:
        return "space and line ends"
    if FUNCTION_WORD.fullmatch(word):
        return "function word"
    if word.isalpha():
        return "beginning of a word" if token != word else "inside of a word"
    return "number" if word.isdigit() else "punctuation and symbols"


def measure_in_parallel(bench, names, args):
    """
    Each of `GROUPS` in a process of its own, which leaves what it measures in `out`; what several of them need is made first.
    The output of each is in `out/jobs`.
    """
    for text in args.texts:
        bench.measured("dense", 1.0, text)
    if not {*names} <= {*WITHOUT_OURS, "routers", "untrained"}:
        _ = bench.adapted
    groups = [wanted for group in GROUPS if (wanted := [name for name in group if name in names])]
    logs = args.out / "jobs"
    logs.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // args.jobs))}
    settings = {"--tokens": args.tokens, "--eval-tokens": args.eval_tokens, "--results": logs}
    settings |= {"--base": args.base} if args.base else {}
    command = [sys.executable, __file__, args.out, *(part for setting in settings.items() for part in setting)]
    command += ["--texts", *args.texts, *["--bf16"] * args.bf16]

    def run(group):
        with open(logs / f"{group[0]}.log", "w") as log:
            arguments = [*map(str, command), "--only", *group]
            return subprocess.run(arguments, stdout=log, stderr=log, env=environment).returncode

    with ThreadPoolExecutor(args.jobs) as pool:
        running = {pool.submit(run, group): f"{group[0]}.log" for group in groups}
        finished = tqdm(as_completed(running), desc="Groups of contenders", total=len(groups))
        failed = [running[each] for each in finished if each.result() != 0]
    if failed:
        raise SystemExit(
            f"{len(failed)} of {len(groups)} processes failed; what the others measured is kept. Read {', '.join(failed)} in {logs}, "
            "and run the same command to go on."
        )


def hardware(device):
    """As `machine`, by the name of the GPU where that is what computes."""
    found = machine(torch.get_num_threads())
    if device.type == "cpu":
        return found
    processor = torch.cuda.get_device_name(device)
    name = "-".join(processor.lower().split()[:2])
    return {**found, "name": f"{name}_{found['name'].rpartition('_')[2]}", "processor": processor}


def compare(bench, names, texts):
    """Rows of the record: each contender at each share on each text, beside the dense base, and beside ours where it is measured."""
    rows = []
    for text, name in product(texts, names):
        for share in (1.0,) if name in FULL_ONLY else (*((1.0,) if name in WITH_FULL else ()), *SHARES):
            record = bench.measured(name, share, text)
            nll = torch.tensor(record["nll"], dtype=torch.float64)
            dense_nll = torch.tensor(bench.measured("dense", 1.0, text)["nll"], dtype=torch.float64)
            row = {"contender": name, "asked": share, "text": text, "share": record["share"], "blocks": len(nll)}
            row |= {"perplexity": math.exp(nll.mean().item()), **ratio_to(nll, dense_nll)}
            row |= {key: record[key] for key in ("sensitivity", "mlp_share", "seconds") if key in record}
            if "ours" in names and name != "ours" and name not in FULL_ONLY:
                best = torch.tensor(bench.measured("ours", share, text)["nll"], dtype=torch.float64)
                row["ours_over_this"] = ratio_to(best, nll)
            rows.append(row)
    return rows


def joined(record, kept):
    """
    A record, and what an earlier one of the same settings has beside it: contenders and texts may be run on several days, in
    several folders. Of another recipe of ours those stay that do not learn from it. Rows of a text are kept where the dense base had
    the same perplexity there, but for what mixed precision changes (0.1%), hence the same tokens.
    """
    if any(kept.get(key) != record[key] for key in ("tokens", "eval_tokens", "base", "bf16")):
        return record
    same_recipe = kept["recipe"] == record["recipe"]
    old, new = ({row["text"]: row["perplexity"] for row in r["rows"] if row["contender"] == "dense"} for r in (kept, record))
    same = {text for text in old if math.isclose(old[text], new.get(text, old[text]), rel_tol=2e-3)}
    done = {(row["contender"], row["text"]) for row in record["rows"]}
    rows = [row for row in kept["rows"] if row["text"] in same and (row["contender"], row["text"]) not in done]
    if not same_recipe:
        rows = [row for row in rows if row["contender"] in WITHOUT_OURS]
        rows = [{key: value for key, value in row.items() if key != "ours_over_this"} for row in rows]
        seconds = {key: s for key, s in kept["training_seconds"].items() if key.split("-")[0] in WITHOUT_OURS}
        kept = {**kept, "learned": {}, "training_seconds": seconds}
    rows = sorted(record["rows"] + rows, key=lambda row: (TEXTS.index(row["text"]), list(CONTENDERS).index(row["contender"])))
    whole = {"in_one_go": kept["in_one_go"]} if same_recipe and "in_one_go" in kept else {}
    return {**whole, **record, "rows": rows} | {key: kept[key] | record[key] for key in ("training_seconds", "learned")}


def table(record):
    seconds = sum(record["training_seconds"].values()) + sum(row["seconds"] for row in record["rows"])
    whole = record.get("in_one_go")
    lines = [
        f"{record['machine']['processor']}, torch {record['machine']['torch']}, transformers {record['machine']['transformers']}, "
        f"{record['machine']['date']}. Perplexity over the dense base's on the same tokens, with 95% intervals; in brackets the "
        f"mean MLP share reached, where it is not the one asked for. {record['tokens']:,} training tokens each, if its row does not say otherwise. "
        f"Made by `python benchmarks/frontier.py OUT --tokens {record['tokens']}{' --bf16' * record['bf16']}` (the contenders of the "
        f"table): {seconds / 3600:.1f} hours, those of all processes together"
        + (f"; in one go, `--jobs {whole['jobs']}`, {whole['seconds'] / 3600:.2f} hours." if whole else "."),
    ]
    for text in dict.fromkeys(row["text"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["text"] == text]
        dense = next(row for row in rows if row["contender"] == "dense")
        tokens = dense["blocks"] * 511
        lines += [
            "",
            f"**{text}**"
            + (", never trained on" if text == UNSEEN else "")
            + f": dense {dense['perplexity']:.2f}, {tokens:,} tokens",
            "",
        ]
        lines += [
            "| | full width | " + " | ".join(f"{share:.0%}" for share in SHARES) + " |",
            "|---" * (2 + len(SHARES)) + "|",
        ]
        for name in dict.fromkeys(row["contender"] for row in rows):
            cells = {row["asked"]: _cell(row) for row in rows if row["contender"] == name}
            lines.append(f"| {LABELS[name]} | " + " | ".join(cells.get(share, "") for share in (1.0, *SHARES)) + " |")
    return "\n".join(lines) + "\n"


def _cell(row):
    low, high = row["ratio_interval"]
    reached = "" if abs(row["share"] - row["asked"]) < 0.01 else f" [{row['share']:.0%}]"
    return f"{row['ratio_to_dense']:.3f} ({low:.3f} to {high:.3f}){reached}"


def draw(record, path):
    """One panel for each text: ratio to dense against the mean share, on a logarithmic axis."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colors = colormaps["tab20"].colors
    lowest = min(0.85, 0.98 * min(row["ratio_interval"][0] for row in record["rows"]))
    # A tick below the axis would widen it.
    ticks = [tick for tick in (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 4) if tick >= lowest]
    texts = list(dict.fromkeys(row["text"] for row in record["rows"]))
    figure = Figure(figsize=(4.2 * len(texts), 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(texts), sharey=True, squeeze=False)[0]
    for axis, text in zip(axes, texts):
        for index, name in enumerate(LABELS):
            rows = sorted(
                (row for row in record["rows"] if (row["text"], row["contender"]) == (text, name) and name != "dense"),
                key=lambda row: row["share"],
            )
            if not rows:
                continue
            shares, ratios = [100 * row["share"] for row in rows], [row["ratio_to_dense"] for row in rows]
            mine, style = name in WITH_FULL, {"ours-long": "--"} | dict.fromkeys(ORACLES, ":")
            axis.plot(
                shares, ratios, label=LABELS[name], color="black" if mine else colors[index], linewidth=2.5 if mine else 1.2,
                marker="o" if mine else ".", linestyle=style.get(name, "-"), zorder=3 if mine else 2,
            )  # fmt: skip
            if mine:
                low, high = zip(*(row["ratio_interval"] for row in rows))
                axis.fill_between(shares, low, high, color="black", alpha=0.15)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(yscale="log", ylim=(lowest, 4), xlim=(38, 102), xlabel="mean share of the MLPs, %")
        axis.set_title(text + (" (never trained on)" if text == UNSEEN else ""), fontsize=10)
        axis.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    axes[0].set_ylabel("perplexity / dense perplexity")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=1 + len(texts), fontsize=8)
    figure.savefig(path, dpi=130)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for everything that is made; run again with the same to go on")
    parser.add_argument("--tokens", type=int, default=786_432, help="training tokens of each contender (786432)")
    parser.add_argument("--eval-tokens", type=int, default=20_480, help="evaluation tokens of each text (20480)")
    parser.add_argument(
        "--only", nargs="+", choices=CONTENDERS, metavar="NAME", help="contenders, in this order (all but ours-long)"
    )
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=TEXTS, metavar="NAME", help=f"of {', '.join(TEXTS)}")
    parser.add_argument("--base", help="another Llama-style model, by folder or id (SmolLM2-135M-Instruct)")
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="train in mixed precision: on CPUs with AMX or AVX512_BF16 twice as fast, elsewhere slow",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with its part of torch's threads (1)")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(argv)
    settings = {"tokens": args.tokens, "eval_tokens": args.eval_tokens, "base": args.base, "bf16": args.bf16}
    args.out.mkdir(parents=True, exist_ok=True)
    kept = read_json(args.out / "settings.json")
    if kept not in (None, settings):
        raise SystemExit(
            f"{args.out} was begun with {kept}, now {settings}. Go on with the same numbers, or in another folder."
        )
    if kept is None:
        write_json(args.out / "settings.json", settings)
    started, bench = time.monotonic(), Bench(args.out, **settings)
    names = list(dict.fromkeys(["dense", *(args.only or [name for name in CONTENDERS if name not in IF_NAMED])]))
    if args.jobs > 1:
        measure_in_parallel(bench, names, args)
    for name in tqdm(names, desc="Contenders"):
        rows = compare(bench, [name] if name == "dense" else ["dense", name], args.texts)
        for row in rows:
            if row["contender"] == name:
                print(
                    f"{name:12} {row['text']:18} {row['asked']:4.0%} [{row['share']:.1%}] {row['ratio_to_dense']:.3f}",
                    flush=True,
                )
    conversion = read_json(bench.converted / CONVERSION)
    ours = {
        "train": OURS["train_parts"],
        **{name: value for name, value in OURS.items() if name != "train_parts"},
    }  # as in training.json
    recipe = {"importance": conversion["importance"], "conversion_tokens": conversion["calibration"]["tokens"]}
    record = {
        "machine": hardware(bench.dense.device), **settings, "recipe": {**recipe, "adapt_share": ADAPT_SHARE, **ours},
        "texts": read_json(args.out / "texts" / "versions.json"), "training_seconds": bench.training_seconds(),
        "rows": compare(bench, names, args.texts),
    }  # fmt: skip
    if kept is None and not args.only and args.texts == TEXTS:
        record["in_one_go"] = {"jobs": args.jobs, "seconds": round(time.monotonic() - started)}
    seen = [name for name in WITH_FULL if name in names and UNSEEN in args.texts]
    record["learned"] = {name: what_is_learned(bench, name, 0.6) for name in seen}
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"frontier_{record['machine']['name']}"
    if path.with_suffix(".json").exists():
        record = joined(record, read_json(path.with_suffix(".json")))
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(record))
    draw(record, path.with_suffix(".png"))
    print(table(record))


if __name__ == "__main__":
    main()
