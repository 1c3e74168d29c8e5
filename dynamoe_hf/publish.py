# SPDX-License-Identifier: Apache-2.0
"""Variants of a model folder on the Hub: a repository or a branch for each budget, every one whole or not there at all."""

import copy
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import validate_repo_id

from .arguments import Layout, PublishArguments, resolve
from .card import Variant, render_card
from .folder import load_dynamoe_config, load_model, load_tokenizer, new_folder, read_json


LAYOUTS = get_args(Layout)
# What travels. A folder can hold more, such as an optimizer's state or somebody's notes, and none of that is published.
SHIPPED = (
    "*.safetensors",
    "*.json",
    "*.py",
    "*.jinja",
    "*.model",
    "merges.txt",
    "vocab.txt",
    "LICENSE*",
    "NOTICE*",
    "report/*.png",
)
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
TRIES = 4
LONGEST_WAIT = 300.0  # seconds; who asks for more is left in peace


def publish_model(folder: str | Path, repo: str, arguments: PublishArguments | None = None, **settings: Any) -> dict:
    """
    Publish a model folder: the dial itself, and a variant for each budget whose default sensitivity reaches it.

    A variant differs from the folder in its config and its card only. Each revision is one commit that holds weights, code,
    config and card, so none is ever there without its weights. Running it again sends only what has not arrived. The
    token is the one of `hf auth login` or HF_TOKEN.

    Args:
        folder: model folder, on disk; it is not changed.
        repo: `user/NAME` or `organisation/NAME`.
        arguments, settings: the fields of `PublishArguments`, as one object or by name.
            Layout `"repos"`: `repo` is the dial, `repo-0.75` the variant of budget 0.75, and a Collection holds them all.
            Layout `"revisions"`: `repo` is the dial, its branch `budget-0.75` the variant, which shares the weights.
            A dry run writes to `out` alone, weights as hard links, and nothing without it.

    Returns:
        What was, or would be, published: for each variant its repository, revision, budget, sensitivity, files, their `bytes`
        and `new_bytes` (those that no other variant of the repository has), and `url` of the commit or pull request.

    Raises:
        ValueError: nothing to publish, weights or code that should not be, an uncalibrated budget, or a repository that cannot be found or is in the way.
        PermissionError: no token, or one that may not write there.
        ConnectionError: the Hub could not be reached, or was overloaded, several times in a row.
    """
    arguments = resolve(PublishArguments, arguments, settings)
    layout, dry_run, out, private, folder = arguments.layout, arguments.dry_run, arguments.out, arguments.private, Path(folder)
    if layout not in LAYOUTS:
        raise ValueError(f"The layout {layout!r} is unknown. Choose one of {', '.join(LAYOUTS)}.")
    if out is not None and not dry_run:
        raise ValueError(f"out={out} is where a dry run writes, and this is none. Add `--dry-run`, or leave `--out` away.")
    if out is not None:
        with new_folder(out) as staging:
            plan = _planned(folder, repo, arguments)
            for variant, own in zip(plan.family, plan.contents):
                name = variant.repo.split("/")[-1] if layout == "repos" else variant.revision
                _write_variant(staging / name, plan.shared, own)
        return {**plan.summary, "out": str(out)}
    plan = _planned(folder, repo, arguments)
    if dry_run:
        return plan.summary
    token = _hub_token()
    _refuse_secrets(folder, plan, token)
    hub = _Hub(HfApi(token=token), token)
    # Made once, so that each weight file is hashed once for the whole family.
    operations = {name: CommitOperationAdd(name, path) for name, path in plan.shared.items()}
    for variant, own, entry in zip(plan.family, plan.contents, plan.summary["variants"]):
        entry["url"] = _send(hub, variant, operations, own, arguments)
    if plan.summary["collection"]:
        plan.summary["collection"] = _collect(hub, repo.split("/")[-1], plan.family, private)
    return plan.summary


class Plan(NamedTuple):
    """What is to be published."""

    family: list[Variant]
    shared: dict[str, Path]  # {path in the repository: file} that all variants share
    contents: list[dict[str, bytes]]  # what each variant has of its own
    summary: dict[str, Any]


def _planned(folder, repo, arguments: PublishArguments) -> Plan:
    """The variants and their files. Raises `ValueError` where they cannot be published: before anything is written or sent."""
    family = plan_family(folder, repo, arguments.variants, arguments.layout)
    shared = shipped_files(folder)
    _refuse_foreign_code(folder)
    load_tokenizer(folder)
    load_model(folder, device_map="cpu")  # refuses weights that are damaged, incomplete or not finite
    contents = [own_files(folder, variant, family, arguments.base_model) for variant in family]
    plan = Plan(family, shared, contents, {
        "folder": str(folder), "layout": arguments.layout, "dry_run": arguments.dry_run, "private": arguments.private,
        "variants": [_variant_entry(variant, shared, own) for variant, own in zip(family, contents)],
        "collection": repo.split("/")[-1] if arguments.layout == "repos" and len(family) > 1 else None,
    })  # fmt: skip
    _refuse_secrets(folder, plan)
    return plan


def _refuse_foreign_code(folder):
    """Users give `trust_remote_code=True` for the files of the folder, so nothing in it may name other code."""
    for path in sorted(folder.glob("*.json")):
        fields = (read_json(path) or {}) if path.name.endswith("config.json") else {}
        names = fields.get("auto_map", {})
        named = [str(name) for value in names.values() for name in (value if isinstance(value, list) else [value]) if name]
        own = path.name == "config.json" and all((folder / f"{name.split('.')[0]}.py").is_file() for name in named)
        pipelines = [str(entry.get("impl")) for entry in (fields.get("custom_pipelines") or {}).values()]
        if pipelines or named and not own:
            raise ValueError(
                f"{path} names code that does not come with the folder, and that its users would run: found "
                f"{', '.join(pipelines or named)}. Remove `auto_map` and `custom_pipelines` from it; DynaMoE folders need none but the "
                "`auto_map` of config.json."
            )


def _send(hub, variant, operations, own, arguments):
    """Commit one variant: the URL of the commit or pull request."""
    _prepare(hub, variant, arguments.private)
    named = "The dial" if variant.budget is None else f"Variant of budget {variant.budget:g}"
    message, what = arguments.commit_message or named, f"committing to {variant.repo}"
    commit = hub.ask(what, _commit, hub.api, variant, operations, own, message, arguments.create_pr)
    return commit.pr_url or commit.commit_url


def _variant_entry(variant, shared, own):
    """What the summary says of one variant: its files and their sizes in bytes."""
    sizes = {name: len(own[name]) if name in own else path.stat().st_size for name, path in shared.items()}
    sizes |= {name: len(content) for name, content in own.items()}
    new = own if variant.revision != "main" else sizes
    return {**variant._asdict(), "files": sizes, "bytes": sum(sizes.values()), "new_bytes": sum(sizes[name] for name in new)}


def _hub_token():
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set, so nothing can be sent. Unset it, or look at a `--dry-run`.")
    token = huggingface_hub.get_token()
    if token is None:
        raise PermissionError("There is no token for the Hub. Run `hf auth login`, or set HF_TOKEN to a token that may write.")
    return token


def plan_family(folder: str | Path, repo: str, variants: Sequence[float] | None, layout: str) -> list[Variant]:
    """
    The dial and the variants of a folder, each with its place on the Hub.

    Raises:
        ValueError: not a DynaMoE folder on disk, a name that the Hub does not take, or a budget that is not calibrated.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder. Give a model folder on this machine.")
    config = load_dynamoe_config(folder)
    if repo.count("/") != 1:
        raise ValueError(
            f"The repository must be named with its owner, found {repo!r}. Give for example user/{Path(repo).name}."
        )
    budgets = sorted({float(budget) for budget in (config.budgets if variants is None else variants)})
    family = [Variant(repo, config.sensitivity)]
    for budget in budgets:
        sensitivity = config.sensitivity_of(budget)
        if layout == "repos":
            family.append(Variant(f"{repo}-{budget:g}", sensitivity, budget))
        else:
            family.append(Variant(repo, sensitivity, budget, f"budget-{budget:g}"))
    for variant in family:
        validate_repo_id(variant.repo)
    return family


def shipped_files(folder: str | Path) -> dict[str, Path]:
    """
    {path in the repository: file} of what a folder publishes, its card excepted, which is rendered anew.

    Raises:
        ValueError: weights are missing, so nobody could load what would be published.
    """
    folder = Path(folder)
    paths = {path for pattern in SHIPPED for path in folder.glob(pattern) if path.is_file() and not path.name.startswith(".")}
    files = {path.relative_to(folder).as_posix(): path for path in sorted(paths)}
    index = read_json(folder / "model.safetensors.index.json")
    needed = set(index["weight_map"].values()) if index else {"model.safetensors"}
    if missing := needed - set(files):
        raise ValueError(
            f"{folder} lacks weights: {', '.join(sorted(missing))}. Publish a folder that `dynamoe train` has written."
        )
    return files


def own_files(folder: Path, variant: Variant, family: Sequence[Variant], base_model: str | None) -> dict[str, bytes]:
    """What a variant does not share with the folder: its config, unless it is the dial, and its card."""
    own = {"README.md": str(render_card(folder, variant, family, base_model)).encode()}
    if variant.budget is not None:
        config = {**(read_json(folder / "config.json") or {}), "sensitivity": variant.sensitivity, "force_expert": None}
        own["config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return own


def _write_variant(target, shared, own):
    for name, path in shared.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".safetensors":
            shutil.copyfile(path, target / name)
            continue
        try:
            os.link(path.resolve(), target / name)
        except OSError:  # another file system
            os.symlink(path.resolve(), target / name)
    for name, content in own.items():
        (target / name).write_bytes(content)


def _refuse_secrets(folder, plan, token=None):
    """No token, and no folder of this machine, may be in what travels. A tokenizer's vocabulary is not looked at for folders."""
    texts = [(name, content) for own in plan.contents for name, content in own.items()]
    texts += [(name, path.read_bytes()) for name, path in plan.shared.items() if path.suffix in (".json", ".py", ".jinja")]
    places = [str(path) for path in {Path.home(), folder.resolve().parent} if len(path.parts) > 1]
    for name, content in texts:
        if (token and token.encode() in content) or TOKEN.search(content):
            raise ValueError(
                f"{name} holds {'your' if token else 'a'} Hub token, and nothing was sent. Remove it from the file."
            )
        found = [place for place in places if f'"{place}'.encode() in content and name not in ("tokenizer.json", "vocab.json")]
        if found:
            raise ValueError(f"{name} names a folder of this machine: found {found[0]}. Replace it by a name without folders.")


def _prepare(hub, variant, private):
    """Make the repository and the branch of a variant where they are missing."""
    api, repo = hub.api, variant.repo
    # None leaves the choice to the owner's settings, where False would override an organisation's.
    hub.ask(f"creating {repo}", api.create_repo, repo, private=private or None, exist_ok=True)
    if private and not hub.ask(f"looking at {repo}", api.repo_info, repo).private:
        raise ValueError(f"{repo} exists and is public, so nothing was sent to it. Make it private, or choose another name.")
    if variant.revision != "main":
        # A branch begins as `main`, which has the weights by now.
        what = f"creating the branch {variant.revision} of {repo}"
        hub.ask(what, api.create_branch, repo, branch=variant.revision, exist_ok=True)


def _commit(api, variant, operations, own, message, create_pr):
    """One commit of everything; the client leaves out what the revision has, and large files that have arrived."""
    present = api.list_repo_files(variant.repo, revision=variant.revision)
    # The trap: a `model.safetensors` of old would be loaded instead of new shards.
    stale = [name for name in present if name.endswith(WEIGHTS) and name not in operations]
    changes: list[CommitOperationDelete | CommitOperationAdd] = [CommitOperationDelete(name) for name in stale]
    # Copies, since an operation can be committed once; they share the hash of their file.
    changes += [copy.copy(operation) for name, operation in operations.items() if name not in own]
    changes += [CommitOperationAdd(name, content) for name, content in own.items()]
    return api.create_commit(variant.repo, changes, commit_message=message, revision=variant.revision, create_pr=create_pr)


def _collect(hub, title, family, private):
    """Put the family into a Collection of its own, in order; the address of it."""
    owner, api = family[0].repo.split("/")[0], hub.api
    what = f"collecting the variants, which are all published, as {title!r}"
    # The Hub takes titles of up to 60 characters.
    made = hub.ask(what, api.create_collection, title[:60], namespace=owner, private=private, exists_ok=True)
    for variant in family:
        note = "the dial" if variant.budget is None else f"budget {variant.budget:g}, sensitivity {variant.sensitivity:.2f}"
        hub.ask(what, api.add_collection_item, made.slug, variant.repo, "model", note=note, exists_ok=True)
    return made.url


class _Hub:
    """The client, asked a bounded number of times, with errors that say what to do and never repeat the token."""

    def __init__(self, api: HfApi, token: str):
        self.api, self.token = api, token

    def ask(self, what: str, call: Callable, *args, **options):
        for attempt in range(TRIES):
            try:
                return call(*args, **options)
            except (HTTPError, ConnectionError, json.JSONDecodeError, RuntimeError) as error:
                # The client wraps what stopped a large file in a RuntimeError.
                cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
                response = getattr(cause, "response", None)
                status = getattr(response, "status_code", None)
                if status is not None and status != 429 and status < 500:
                    refusal = self._refusal(what, status, getattr(cause, "server_message", None))
                    break
                if status is None and not isinstance(cause, HTTPError | ConnectionError | json.JSONDecodeError):
                    raise
                said = response.headers.get("retry-after", "") if response is not None and status else ""
                wait = float(said) if said.isdigit() else 2.0**attempt
                trouble = f"status {status}" if status else f"{type(cause).__name__}, the connection broke"
                refusal = ConnectionError(
                    f"The Hub failed {attempt + 1} times while {what} ({trouble}). Run the same command again"
                    f"{f' in {wait:.0f} s' if said else ''}: what has arrived is not sent twice."
                )
                if wait > LONGEST_WAIT or attempt + 1 == TRIES:
                    break
                time.sleep(wait)
        # Outside of `except`, so that the request with its headers is not chained to what the user sees.
        raise refusal

    def _refusal(self, what, status, message):
        message = (message or "no reason given").replace(self.token, "***").strip().rstrip(".")
        said = f"while {what} (status {status}: {message})"
        if status == 401:
            return PermissionError(f"The Hub does not accept the token, {said}. Run `hf auth login`, or set HF_TOKEN anew.")
        if status == 403:
            return PermissionError(
                f"The token may not write there, {said}. Use a token of the role `write` whose owner may write to this "
                "repository, or offer the change with `--create-pr`."
            )
        if status == 404:
            return ValueError(
                f"The Hub has no such repository, or hides it, {said}. Check the name, and what the token may see."
            )
        if status in (409, 412):
            return ValueError(f"Something else changed the repository, {said}. Run the same command again.")
        return ValueError(f"The Hub refused, {said}. What is published already is whole.")
