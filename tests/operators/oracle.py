"""Independent truths for the operator tests: written from the definitions, token by token, sharing no code with us."""

import itertools

import torch


def axis_window(i, n, k, s=1, d=1, causal=False):
    """Keys that query `i` sees on one axis of Generalized Neighborhood Attention."""
    group = [key for key in range(n) if key % d == i % d]
    j, m = group.index(i), len(group)
    members = [x for x in range(m) if x // s == j // s]  # queries that share i's window
    if causal:
        leader = min(j // s * s + s - 1, m - 1)
        return [group[t] for t in range(max(0, leader - k + 1), j + 1)]
    middle = members[0] + s // 2
    leader = min(middle, m - 1)
    start = leader - k // 2
    while start < 0:
        start += 1
    while start + k > m:
        start -= 1
    return [group[t] for t in range(start, start + k)]


def box_mask(grid, kernel, stride, dilation, causal):
    """Bool `[N, N]` of a GNA window."""
    windows = [
        [axis_window(i, n, k, s, d, c) for i in range(n)]
        for n, k, s, d, c in zip(grid, kernel, stride, dilation, causal, strict=True)
    ]
    tokens = list(itertools.product(*map(range, grid)))
    index = {token: i for i, token in enumerate(tokens)}
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for token in tokens:
        for key in itertools.product(*(w[x] for w, x in zip(windows, token, strict=True))):
            mask[index[token], index[key]] = True
    return mask


def ball_mask(grid, radius):
    """Bool `[N, N]` of CLEAR's circle: strictly nearer than `radius`."""
    tokens = list(itertools.product(*map(range, grid)))
    return torch.tensor(
        [[sum((a - b) ** 2 for a, b in zip(q, k, strict=True)) < radius**2 for k in tokens] for q in tokens]
    )


def joint_mask(window, before, after):
    """A window among text tokens that see and are seen by everything."""
    total = before + len(window) + after
    mask = torch.ones(total, total, dtype=torch.bool)
    mask[before : before + len(window), before : before + len(window)] = window
    return mask


def attention(query, key, value, mask=None, scale=None, extra_key=None, extra_value=None):
    """`[B, S, H, D]` softmax attention in float64, one head at a time; output and log-sum-exp."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if extra_key is not None:
        key, value = torch.cat([key, extra_key], 1), torch.cat([value, extra_value], 1)
    outputs, lses = [], []
    for head in range(query.shape[2]):
        source = head // (query.shape[2] // key.shape[2])
        logits = torch.einsum("bqd,bkd->bqk", query[:, :, head].double(), key[:, :, source].double()) * scale
        if mask is not None:
            visible = mask if extra_key is None else torch.nn.functional.pad(mask, (0, extra_key.shape[1]), value=True)
            logits = logits.masked_fill(~visible, float("-inf"))
        outputs.append(logits.softmax(-1) @ value[:, :, source].double())
        lses.append(logits.logsumexp(-1))
    return torch.stack(outputs, 2), torch.stack(lses, 2)


def gradients(function, tensors, seed=0):
    """Outputs of `function` and gradients of a fixed random combination of them for `tensors`."""
    outputs = function()
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in outputs]
    total = sum((x.double() * w).sum() for x, w in zip(outputs, weights, strict=True))
    return outputs, torch.autograd.grad(total, tensors)
