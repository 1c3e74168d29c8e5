# SPDX-License-Identifier: Apache-2.0
"""What the command line prints of a stage's result: one function for each kind of record."""

import json
import sys


def show_json(result):
    print(json.dumps(json.loads(json.dumps(result), parse_constant=lambda name: None), indent=2))  # JSON has no NaN


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


def show_plan(plan):
    counts = plan["parameters"]
    print(
        f"{plan['base']}: {plan['family']}, {counts['total']:,} parameters, {counts['mlp']:,} of them in MLPs; routers add {counts['router']:,}"
    )
    print("budget  active parameters       bytes  GFLOPs a token")
    for budget, row in plan["budgets"].items():
        speed = row.get("decoded_tokens_per_second")
        print(
            f"{float(budget):6.0%}  {row['active_parameters']:17,}  {row['bytes'] / 1e9:7.2f} GB  {row['forward_flops'] / 1e9:14.2f}"
            + (f"  decodes at most {speed:,.0f} tokens/s" if speed else "")
        )
    training = plan["training"]
    hours = f", {training['hours']:.3g} hours" if "hours" in training else ""
    print(f"Training on {training['tokens']:,} tokens: {training['flops']:.3g} FLOPs{hours}")
    for layout, parts in plan["memory"].items():
        told = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if name != "total")
        print(f"Memory of a training process, {layout}: {parts['total'] / 1e9:.2f} GB ({told})")
    for line in plan["assumptions"]:
        print(f"- {line}")


def show_calibration(record):
    print("budget  sensitivity  density  mean share reached (95%)   of the width")
    for budget, entry in record["budgets"].items():
        interval = "" if entry["interval"] is None else " ({:.1%} to {:.1%})".format(*entry["interval"])
        print(
            f"{float(budget):6.0%}  {entry['sensitivity']:11.4f}  {entry['density']:7.2f}  {entry['mean_share']:.1%}{interval}   "
            f"{entry['mean_width']:.1%}"
        )
    largest = max(record["budgets"], key=float)
    print(f"Without further settings the model now uses budget {float(largest):.0%}.")


def show_evaluation(entries):
    from .tables import evaluation_table  # with jinja2, which `--help` does without

    print(evaluation_table(entries))


def show_generation(generation):  # the text has been written already
    if generation is None:
        return
    if draft := generation.draft:
        seconds = draft.draft_seconds + draft.check_seconds
        print(
            f"Drafted {draft.drafted} tokens, of which {draft.accepted} were accepted, and checked them in {draft.passes} passes: "
            f"{draft.accepted + draft.passes} tokens in {seconds:.2f} s, {draft.draft_seconds:.2f} s of them for drafts.",
            file=sys.stderr,
        )
        return
    asked = "" if generation.budget is None else f", at a budget of {generation.budget:.0%}"
    print(f"A token read {generation.share:.0%} of the MLPs' weights{asked}.", file=sys.stderr)


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
    for row in record.get("int8", []):
        show_time(f"decode, int8, {row['setting']}", row)


def show_time(what, row):
    low, high = row["range"]
    spread = f"{row['ratio']:.3f} ({low:.3f} to {high:.3f})"
    print(f"{what:44} {row['share']:6.1%} {spread:>24} {row['limit']:7.3f} {row['reached']:8.2f}")


def show_inspection(facts):
    counts, widths = facts["parameters"], facts["expert_widths"]
    print(f"{facts['folder']}: DynaMoE of {facts['base'] or 'an unknown base'} ({facts['family']})")
    print(f"  layers        {facts['layers']}, hidden size {facts['hidden_size']}, MLP width {facts['mlp_width']}")
    print(f"  experts       {widths if not isinstance(widths[0], list) else 'a ladder for each MLP'} neurons")
    print(
        f"  parameters    {counts['total'] / 1e6:.1f} M, of which MLPs {counts['mlp'] / 1e6:.1f} M, routers {counts['router'] / 1e6:.2f} M"
    )
    if counts["idle"]:
        print(
            f"  mixture       a token is not sent to experts of {counts['idle'] / 1e6:.1f} M, which are beside those of the MLPs"
        )
    print(f"  router        {facts['router']}, predicts {facts['similarity']} similarity")
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
    if "verified" in facts:
        known = f"{len(facts['verified'])} as recorded (SHA-256)" if facts["verified"] else "not in the records"
        print(f"  verified      weights load and are finite; weight files: {known}")


def show_publication(summary):
    for variant in summary["variants"]:
        budget = "the dial" if variant["budget"] is None else f"budget {variant['budget']:g}"
        sent = f"{variant['new_bytes'] / 1e6:.2f} MB new of {variant['bytes'] / 1e6:.2f}"
        print(f"{variant['repo']}@{variant['revision']}: {budget}, sensitivity {variant['sensitivity']:.4f}, {sent}")
    if summary["dry_run"]:
        place = f"is in {summary['out']}" if "out" in summary else "is written with `--out FOLDER`"
        print(f"Nothing was sent. What would be {place}")
    elif summary["collection"]:
        print(f"Collection: {summary['collection']}")


def show_paths(paths):
    for path in paths:
        print(path)
