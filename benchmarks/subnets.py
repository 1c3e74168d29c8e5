"""
Sub-networks of a dense model, for rivals: widths of MLPs and attention heads, one choice for all tokens or one for each.

Neurons are those of `convert`, most important first; heads are ranked by their first-order effect on the loss. Everything is a mask: this
measures quality, not time. Shapes: L layers, T tokens, D hidden size.
"""

import math
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from dynamoe_hf.importance import SINK_POSITIONS
from dynamoe_hf.modeling.difficulty import best_gain, label_of
from dynamoe_hf.modeling.routing import ProfileRouter
from dynamoe_hf.router_fit import fit_router


STEPS = 16  # widths of each MLP that the search chooses from
EIGHTHS = 8  # widths of each MLP that a token chooses from
ROUTER_DIM = 48


class Subnet(NamedTuple):
    """Neurons and attention heads that each layer keeps, (L,) each; None keeps all."""

    widths: list[int] | None = None
    heads: list[int] | None = None
    head_order: list[list[int]] | None = None  # of each layer, most important first

    @classmethod
    def of_width(cls, share, config):
        return cls([round(share * config.intermediate_size)] * config.num_hidden_layers)


@contextmanager
def pruned(dense, subnet):
    """`dense` with everything outside of `subnet` at zero. For quality only: a mask saves no time."""

    def cut(keep):
        return lambda module, args: (args[0] * keep.to(args[0].dtype),)

    hooks = []
    for index, layer in enumerate(dense.model.layers):
        if subnet.widths is not None:
            keep = torch.zeros(dense.config.intermediate_size, device=dense.device)
            keep[: subnet.widths[index]] = 1
            hooks.append(layer.mlp.down_proj.register_forward_pre_hook(cut(keep)))
        if subnet.heads is not None:
            heads = dense.config.num_attention_heads
            keep = torch.zeros(heads, layer.self_attn.o_proj.in_features // heads, device=dense.device)
            keep[subnet.head_order[index][: subnet.heads[index]]] = 1
            hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(cut(keep.flatten())))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Errors(NamedTuple):
    """What each width of each module costs the loss to second order, c |O - O_w|^2 over calibration tokens, and how heads rank."""

    mlp: torch.Tensor  # (L, STEPS): with (step + 1) / STEPS of the neurons
    attention: torch.Tensor  # (L, heads): with step + 1 of the heads
    head_order: list[list[int]]
    weights: torch.Tensor  # (2, L): c of each MLP and of each attention


def module_errors(dense, blocks):
    """By one backward pass (c of each module, first-order importance of each head), and one forward (errors of each width)."""
    layers, heads = dense.model.layers, dense.config.num_attention_heads
    weights = torch.zeros(2, len(layers), dtype=torch.float64)
    importance = torch.zeros(len(layers), heads, dtype=torch.float64)

    def watch(kind, index):
        def add(gradient):
            weights[kind, index] += gradient.double().square().sum().item()

        def hook(module, args, output):
            (output[0] if isinstance(output, tuple) else output).register_hook(add)

        return hook

    def rank(index):
        def hook(module, args):
            value = args[0].detach()

            def add(gradient):
                effect = (value * gradient)[0].view(-1, heads, value.shape[-1] // heads).sum(-1)
                importance[index] += effect.abs().double().sum(0).cpu()

            args[0].register_hook(add)

        return hook

    hooks = [dense.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())]
    for index, layer in enumerate(layers):
        hooks.append(layer.mlp.register_forward_hook(watch(0, index)))
        hooks.append(layer.self_attn.register_forward_hook(watch(1, index)))
        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(rank(index)))
    dense.requires_grad_(False)
    for block in tqdm(blocks[:6], desc="Measuring gradients", leave=False):
        block = block.to(dense.device)
        logits = dense(block[None], use_cache=False).logits[0, :-1]
        F.cross_entropy(logits, block[1:], reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    weights /= blocks[:6].numel() * dense.config.hidden_size
    order = importance.argsort(1, descending=True).tolist()
    errors = Errors(torch.zeros(len(layers), STEPS), torch.zeros(len(layers), heads), order, weights)

    def tails(total, weight, columns):
        """Adds c |what the later groups of `columns` make|^2 for each number of groups kept."""

        def hook(module, args):
            hidden, tail = args[0][0, SINK_POSITIONS:], 0.0
            for kept in range(len(columns) - 1, 0, -1):
                tail = tail + hidden[:, columns[kept]] @ module.weight[:, columns[kept]].t()
                total[kept - 1] += weight * tail.square().sum().item()

        return hook

    neurons = torch.arange(dense.config.intermediate_size).chunk(STEPS)
    hooks = []
    for index, layer in enumerate(layers):
        size = layer.self_attn.o_proj.in_features // heads
        groups = [torch.arange(head * size, (head + 1) * size) for head in order[index]]
        hooks.append(
            layer.mlp.down_proj.register_forward_pre_hook(tails(errors.mlp[index], weights[0, index].item(), neurons))
        )
        hooks.append(
            layer.self_attn.o_proj.register_forward_pre_hook(tails(errors.attention[index], weights[1, index].item(), groups))
        )
    with torch.no_grad():
        for block in tqdm(blocks[:8], desc="Measuring widths", leave=False):
            dense.model(block[None].to(dense.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return errors


def search(errors, config, share, with_heads):
    """
    The sub-network with the least sum of errors at a budget, by a price for each parameter: widths of all layers, or widths and
    heads whose active parameters are those of `share` of the MLPs with all of the attention.
    """
    per_neuron, head_size = 3 * config.hidden_size, config.hidden_size // config.num_attention_heads
    mlp_cost = torch.arange(1, STEPS + 1) * config.intermediate_size / STEPS * per_neuron
    head_cost = torch.arange(1, config.num_attention_heads + 1) * 2.0 * head_size * config.hidden_size  # of q and o
    budget = share * mlp_cost[-1] * len(errors.mlp) + with_heads * head_cost[-1] * len(errors.mlp)

    def cheapest(log_price):
        price = math.exp(log_price)
        widths, heads = (errors.mlp + price * mlp_cost).argmin(1), (errors.attention + price * head_cost).argmin(1)
        return widths, heads, mlp_cost[widths].sum() + with_heads * head_cost[heads].sum()

    low, high = -60.0, 60.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cheapest(middle)[2] > budget else (low, middle)
    widths, heads, spent = cheapest(high)
    # One price reaches only the convex hull; what is left of the budget goes step by step to where it helps most.
    while True:
        steps = [(widths, layer, errors.mlp, mlp_cost) for layer in range(len(widths))]
        steps += [(heads, layer, errors.attention, head_cost) for layer in range(len(heads))] if with_heads else []
        steps = [step for step in steps if step[0][step[1]] + 1 < len(step[3]) and spent + step[3][0] <= budget]
        if not steps:
            break

        def gain(step):
            kept, layer, error, cost = step
            return (error[layer, kept[layer]] - error[layer, kept[layer] + 1]) / cost[0]

        kept, layer, _, cost = max(steps, key=gain)
        kept[layer] += 1
        spent += cost[0]
    widths = [(width + 1) * config.intermediate_size // STEPS for width in widths.tolist()]
    return Subnet(widths, [head + 1 for head in heads.tolist()], errors.head_order) if with_heads else Subnet(widths)


class InputRouters:
    """
    Flextron by the input: in each layer one small router for the MLP and one for the attention, which read what the module reads, and
    choose widths and heads for each token. They predict what the best wider choice takes off the loss for each parameter it adds, so that
    one price divides the budget between MLPs and attention; it is our difficulty, extended to heads.
    """

    def __init__(self, dense, blocks, errors):
        self.dense, config = dense, dense.config
        heads, hidden_size = config.num_attention_heads, config.hidden_size
        self.kinds = [
            _Kind("mlp", "down_proj", EIGHTHS, 3 * hidden_size * config.intermediate_size),
            _Kind("self_attn", "o_proj", heads, 2 * hidden_size * hidden_size),  # q and o
        ]
        self.order = errors.head_order
        weights = errors.weights / torch.tensor([[kind.cost] for kind in self.kinds])
        places = [(kind, index) for kind in range(2) for index in range(len(dense.model.layers))]
        # What every price is measured in: the middle of the gains at full width.
        at_full_width = self._collect(blocks[:4], weights, None)
        self.price = torch.cat([torch.cat(at_full_width[place][1]).flatten() for place in places]).median().item()
        collected = self._collect(blocks, weights, torch.Generator().manual_seed(0))
        self.routers = {}
        for kind, index in tqdm(places, desc="Fitting input routers", leave=False):
            inputs, gains = (torch.cat(kept) for kept in collected.pop((kind, index)))
            torch.manual_seed(0)
            router = ProfileRouter(hidden_size, ROUTER_DIM, self.kinds[kind].options).to(inputs.device)
            middle = torch.full((len(inputs),), 0.5, device=inputs.device)
            fit_router(router, [inputs], self._profile(gains), middle, 800, 512, 2e-2)
            self.routers[kind, index] = router.requires_grad_(False)

    def _profile(self, gain_TE):
        """As a similarity that rises to 1 at the full width, which is what routers predict."""
        return F.pad(1 / (1 + gain_TE / self.price), (0, 1), value=1.0)

    def _groups(self, kind, index):
        """Which columns of the last projection belong to each option beyond the first, in order: a list of index tensors."""
        if self.kinds[kind].name == "mlp":
            return list(torch.arange(self.dense.config.intermediate_size).chunk(EIGHTHS))
        size = self.dense.config.hidden_size // self.kinds[kind].options
        return [torch.arange(head * size, (head + 1) * size) for head in self.order[index]]

    def _mask(self, hidden, choice, groups):
        """`hidden` (B, S, H) with the groups beyond each token's choice (B, S) at zero."""
        rank = torch.empty(hidden.shape[-1], dtype=torch.long)
        for position, columns in enumerate(groups):
            rank[columns] = position
        return hidden * (rank.to(hidden.device) <= choice[..., None])

    @contextmanager
    def _hooked(self, choose):
        """Calls `choose(kind, layer, what the module reads, what its last projection reads)` for the choice (B, S), and applies it."""
        hooks = []
        for index, layer in enumerate(self.dense.model.layers):
            for kind, (name, last, _, _) in enumerate(self.kinds):
                module, read = getattr(layer, name), {}

                def keep(module, args, options, read=read):
                    read["x"] = args[0] if args else options["hidden_states"]

                def cut(module, args, kind=kind, index=index, read=read):
                    return (self._mask(args[0], choose(kind, index, read["x"], args[0]), self._groups(kind, index)),)

                hooks.append(module.register_forward_pre_hook(keep, with_kwargs=True))
                hooks.append(getattr(module, last).register_forward_pre_hook(cut))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _collect(self, blocks, weights, generator):
        """
        Inputs (T, D) of each module, and what a parameter gains beyond each option, (T, options - 1). Tokens follow their labels at
        thresholds drawn for each block, or the full width without a generator.
        """
        collected = {(kind, index): ([], []) for kind in range(2) for index in range(len(self.dense.model.layers))}
        theta = None

        def choose(kind, index, x, hidden):
            weight = getattr(getattr(self.dense.model.layers[index], self.kinds[kind].name), self.kinds[kind].last).weight
            tails, tail = [], 0.0
            for columns in reversed(self._groups(kind, index)[1:]):
                tail = tail + (hidden[..., columns] @ weight[:, columns].t()).flatten(0, 1)
                tails.append(tail.square().sum(-1))
            gain_ET = best_gain(torch.stack(tails[::-1]), range(1, self.kinds[kind].options + 1))
            gain_TE = weights[kind, index].item() * gain_ET.cummin(0).values.t()
            inputs, gains = collected[kind, index]
            inputs.append(x.flatten(0, 1).bfloat16())
            gains.append(gain_TE)
            if theta is None:
                return torch.full(x.shape[:2], self.kinds[kind].options - 1, device=x.device)
            return label_of(self._profile(gain_TE), theta).view(x.shape[:2])

        for block in tqdm(blocks, desc="Collecting router inputs", leave=False):
            if generator is not None:
                theta = 0.1 + 0.8 * torch.rand((), generator=generator).item()
            with self._hooked(choose):
                self.dense.model(block[None].to(self.dense.device), use_cache=False)
        return collected

    @contextmanager
    def routed(self, logit, records=None):
        """The dense model with every token's choice where the predicted logit reaches `logit`; `records` gets (kind, logits)."""

        def choose(kind, index, x, hidden):
            logits = self.routers[kind, index](x)
            if records is not None:
                records.append((kind, logits))
            return (logits < logit).sum(-1)

        with self._hooked(choose):
            yield

    def spent(self, records, logit):
        """Mean active parameters of a token in MLPs, q and o: of what `routed` recorded, had the threshold been `logit`."""
        total = 0.0
        for kind, logits in records:
            options = self.kinds[kind].options
            total += ((logits < logit).sum(-1) + 1).float().mean().item() / options * self.kinds[kind].cost
        return total * len(self.dense.model.layers) * len(self.kinds) / len(records)

    @torch.no_grad()
    def dial(self, blocks, budget, logit=0.0, rounds=4):
        """The logit at which a token has `budget` active parameters on average, to half a percent, found from `logit` on."""
        for _ in range(rounds):
            records = []
            with self.routed(logit, records):
                for batch in blocks.split(4):
                    self.dense.model(batch.to(self.dense.device), use_cache=False)
            # One tensor of each kind: on a GPU every number that is read waits, and the bisection reads one for each record.
            kept = [
                torch.cat([logits.flatten(0, 1) for of, logits in records if of == kind]) for kind in range(len(self.kinds))
            ]
            records = list(enumerate(kept))
            if abs(self.spent(records, logit) / budget - 1) < 0.005:
                break
            low, high = -30.0, 30.0
            for _ in range(40):
                logit = (low + high) / 2
                low, high = (logit, high) if self.spent(records, logit) < budget else (low, logit)
        return logit


class _Kind(NamedTuple):
    """A kind of module: its name in a layer, its last projection, how many widths it has, its parameters at full width."""

    name: str
    last: str
    options: int
    cost: int
