"""Plain loops over tokens and experts: what every fast path must equal, in outputs and in gradients."""

import torch


def assert_close(name, actual, expected, atol=1e-5, rtol=1e-4):
    """As `torch.testing.assert_close`, naming the tensor, and never accepting NaN."""
    assert not torch.isnan(actual).any(), f"{name} holds NaN"
    error = (actual - expected).abs().max().item() if actual.numel() else 0.0
    assert torch.allclose(actual, expected, atol=atol, rtol=rtol), f"{name}: largest error {error:.3g}, allowed {atol:g}"


def expert_output(mlp, x, expert):
    """Output of expert `expert` of a NestedMLP for x of any shape (..., D): the dense MLP with the other neurons at zero."""
    hidden = mlp.hidden(x)
    kept = torch.zeros_like(hidden)
    kept[..., : mlp.widths[expert]] = 1
    return mlp.down_linear(hidden * kept)


def nested_mlp(mlp, x_TD, expert_T):
    """Each token through its own expert, one at a time: (T, D), (T,) -> (T, D)."""
    return torch.stack([expert_output(mlp, x, int(expert)) for x, expert in zip(x_TD, expert_T)])


def kept(value, threshold, ramp):
    """A number, or what the straight line from (1 - ramp) times the threshold, where it is 0, up to the threshold makes of it."""
    size, foot = abs(value.detach()), (1 - ramp) * threshold
    if size >= threshold:
        return value
    return value * 0 if size <= foot else value.sign() * (abs(value) - foot) / ramp


def nested_mixture(experts, x_TD, index_TK, weight_TK, expert_TK, input_T=None, hidden_T=None, ramp=0.0):
    """
    The routed experts of a mixture, each token and each of its experts alone, by the base's own formula, with the neurons beyond the
    width of the pair at zero, and what `kept` makes of x and of the activations, with thresholds for each token: (T, D).
    And the share of the weights of its experts that each token reads.
    """
    outputs, shares, zero = [], [], torch.zeros(len(x_TD))
    limits = zip(zero if input_T is None else input_T, zero if hidden_T is None else hidden_T)
    for x, index, weight, expert, (least_x, least_hidden) in zip(x_TD, index_TK, weight_TK, expert_TK, limits):
        total, read = 0, 0
        x = torch.stack([kept(value, least_x, ramp) for value in x])
        for number, share, width in zip(index.tolist(), weight, expert.tolist()):
            gate_up, down = experts.gate_up_proj[number], experts.down_proj[number]
            both = x @ (gate_up if experts.is_transposed else gate_up.T)
            if experts.has_bias:
                both = both + experts.gate_up_proj_bias[number]
            hidden = torch.stack([kept(value, least_hidden, ramp) for value in experts._apply_gate(both)])
            hidden = hidden * (torch.arange(len(hidden)) < experts.widths[width])
            read += 2 * experts.widths[width] * int((x != 0).sum()) + len(x) * int((hidden != 0).sum())
            output = hidden @ (down if experts.is_transposed else down.T)
            if experts.has_bias:
                output = output + experts.down_proj_bias[number]
            total = total + share * output
        outputs.append(total)
        shares.append(read / (3 * len(x) * len(hidden) * len(index)))
    return torch.stack(outputs), torch.tensor(shares)


def in_a_gap(values, low, high):
    """A threshold that rounding takes no value across: the middle of the largest gap between their sizes."""
    sizes = values.abs().flatten().sort().values
    sizes = sizes[(sizes > low) & (sizes < high)]
    gap = (sizes[1:] - sizes[:-1]).argmax()
    return ((sizes[gap] + sizes[gap + 1]) / 2).item()


def sparse_mlp(mlp, x_TD, expert_T, input_T, hidden_T, gates_TE=None, ramp=0.0):
    """
    As `nested_mlp`, without the numbers that are smaller than a threshold, one for each token: of x, and of the activations.
    With gates (T, E) the experts do not count. And the share of the MLP's weights that each token reads.
    """
    outputs, shares = [], []
    inputs = 1 if mlp.layout.ungated else 2
    for index, x in enumerate(x_TD):
        x = torch.stack([kept(value, input_T[index], ramp) for value in x])
        hidden = mlp.hidden(x)
        hidden = torch.stack([kept(value, hidden_T[index], ramp) for value in hidden])
        width = mlp.widths[int(expert_T[index])]
        factor = torch.zeros_like(hidden)
        factor[:width] = 1
        if gates_TE is not None:
            low = 0
            for gate, high in zip(gates_TE[index], mlp.widths):
                factor[low:high], low = gate, high
        outputs.append(mlp.down_linear(hidden * factor))
        read = inputs * width * int((x != 0).sum()) + len(x) * int((hidden[:width] != 0).sum())
        shares.append(read / ((inputs + 1) * len(x) * len(hidden)))
    return torch.stack(outputs), torch.tensor(shares)


def gated_mlp(mlp, x_TD, gates_TE):
    """Each neuron times the gate of the block that it lies in, one token at a time: (T, D), (T, E) -> (T, D)."""
    outputs = []
    for x, gates in zip(x_TD, gates_TE):
        hidden, low = mlp.hidden(x), 0
        factor = torch.zeros_like(hidden)
        for gate, high in zip(gates, mlp.widths):
            factor[low:high], low = gate, high
        outputs.append(mlp.down_linear(hidden * factor))
    return torch.stack(outputs)


def similarity(mlp, x, expert, name, error_weight=1.0):
    """Similarity of one expert's output to the full one, for one token x (D,), straight from the definition."""
    full, output = expert_output(mlp, x, len(mlp.widths) - 1), expert_output(mlp, x, expert)
    if name == "projection":
        return (output @ full) / (full @ full)
    if name == "cosine":
        return (output @ full) / (output.norm() * full.norm())
    if name == "relative_error":
        return 1 - (full - output).norm() / full.norm()
    error = (full - output).square().sum()
    if name == "loss_gain":
        gains = [torch.zeros(())]
        for wider in range(expert + 1, len(mlp.widths)):
            gain = error - (full - expert_output(mlp, x, wider)).square().sum()
            gains.append(gain * mlp.widths[-1] / (mlp.widths[wider] - mlp.widths[expert]))
        error = max(gains)
    return 1 / (1 + error_weight * error)


def label(mlp, x, sensitivity, name, error_weight=1.0):
    """The smallest expert whose similarity reaches the sensitivity, for one token x (D,)."""
    for expert in range(len(mlp.widths) - 1):
        if similarity(mlp, x, expert, name, error_weight) >= sensitivity:
            return expert
    return len(mlp.widths) - 1


def expert_of(router, x, sensitivity):
    """The expert that a router chooses for one token x (D,), step by step."""
    hidden = torch.nn.functional.silu(router.input.weight @ x + router.input.bias)
    outputs = router.output.weight @ hidden + router.output.bias
    if not router.has_dial:
        return int(outputs.argmax())
    logit, threshold = 0.0, torch.logit(torch.tensor(sensitivity, dtype=torch.float64)).item()
    for expert, step in enumerate(outputs.tolist()):
        logit += step if expert == 0 else torch.nn.functional.softplus(torch.tensor(step)).item()
        if logit >= threshold:
            return expert
    return len(outputs)


def gates(logits, noise, sensitivity, temperature):
    """
    One token's gates, and the gradient of each by the logit that decides on it: (E - 1,), a number each -> (E,), (E - 1,). The next
    block is taken while the predicted similarity is short of the noisy threshold; the gradient is that of the sigmoid.
    """
    threshold = torch.logit(torch.tensor(sensitivity)) + noise
    soft = torch.sigmoid((threshold - logits) / temperature)
    return torch.tensor([1.0] + [float(logit < threshold) for logit in logits]), -soft * (1 - soft) / temperature


def causal_losses(logits, target_logits, labels):
    """Sums over the positions that count of the LM loss and of KL(target || logits): (B, S, V), (B, S, V), (B, S)."""
    lm_loss = kd_loss = torch.zeros(())
    for log_probs, target, following in zip(
        logits[:, :-1].log_softmax(-1).flatten(0, 1),
        target_logits[:, :-1].log_softmax(-1).flatten(0, 1),
        labels[:, 1:].flatten(),
    ):
        if following != -100:
            lm_loss = lm_loss - log_probs[following]
            kd_loss = kd_loss + (target.exp() * (target - log_probs)).sum()
    return lm_loss, kd_loss


def consistency(taken, segment, cache):
    """
    SRP and SCH of one sequence, taken (S, U) bool, straight from the definition: of each segment the units that at least so many of its
    tokens take, as a prediction for each of its tokens; and the units that most of them take, as many as the cache holds.
    """
    starts = range(len(taken) - segment + 1)
    windows = [[set(row.nonzero().flatten().tolist()) for row in taken[start : start + segment]] for start in starts]
    each = [[sum(unit in token for token in window) for unit in range(taken.shape[1])] for window in windows]
    best = 0.0
    for least in range(1, segment + 1):
        right = wrong = missed = 0
        for window, counts in zip(windows, each):
            group = {unit for unit, count in enumerate(counts) if count >= least}
            for token in window:
                right, wrong, missed = right + len(token & group), wrong + len(group - token), missed + len(token - group)
        best = max(best, 2 * right / (2 * right + wrong + missed))
    chosen = sum(map(sum, each))
    room = round(cache * chosen / (len(windows) * segment))
    return best, sum(sum(sorted(counts)[-room:]) for counts in each) / chosen


def relative_error(states, targets, mask):
    """Mean over layers and tokens that count of |h - t|^2 / |t|^2, token by token: L of (B, S, D), as many, (B, S) -> scalar."""
    errors = []
    for state, target in zip(states, targets):
        errors += [(h - t).square().sum() / t.square().sum() for h, t in zip(state[mask], target[mask])]
    return torch.stack(errors).mean()
