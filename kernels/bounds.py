"""Where a window begins and ends on one axis, in whole numbers: the one definition that Python and Triton share.

Masks and the simulator call these functions; the kernels compile the same source (see `tile_walk`). So they are written
in what both languages read alike: `+ - * // min max`, with operands of `//` never negative (Triton's rounds towards
zero) and no calls among them. Positions are those of one dilation group: every `dilation`-th token of the axis, as many
as `length`.
"""

from __future__ import annotations


def group_length(n, dilation, residue):
    """Tokens of an axis of `n` tokens whose position is `residue` modulo `dilation`."""
    return (n - residue + dilation - 1) // dilation


# ---- box: Generalized Neighborhood Attention (arXiv 2504.16922, section 3) ----


def box_start(query, length, kernel, stride, causal):
    """First key of a query's window."""
    if causal:
        leader = min(query // stride * stride + stride - 1, length - 1)
        start = max(leader - kernel + 1, 0)
    else:
        # The leader of an even stride stands right of the centre: it cancels the left bias of an even kernel.
        leader = min(query // stride * stride + stride // 2, length - 1)
        start = min(max(leader - kernel // 2, 0), length - kernel)
    return start


def box_stop(query, start, kernel, causal):
    """One past the last key of a query's window that starts at `start`."""
    if causal:
        stop = query + 1
    else:
        stop = start + kernel
    return stop


def box_first_query(key, length, kernel, stride, causal):
    """First query whose window ends after `key`: starts and stops never fall, so those that see it follow."""
    if causal:
        query = key
    else:
        # The window that starts at `key - kernel + 1` is the first that still holds the key.
        leader = max(key - kernel + 1 + kernel // 2, 0)
        group = min((max(leader - stride // 2, 0) + stride - 1) // stride, (length - 1) // stride)
        query = min(max(key - kernel + 1, 0), 1) * group * stride
    return query


def box_last_query(key, length, kernel, stride, causal):
    """Last query whose window starts at or before `key`."""
    if causal:
        leader = key + kernel - 1
        group = (leader - stride + 1) // stride
    else:
        leader = key + kernel // 2
        group = (leader - stride // 2) // stride
    # A leader that the axis cuts short, or a window that the border holds back, serves the last query too.
    reaches_end = max(min(leader - length + 2, 1), 0)
    if not causal:
        reaches_end = max(reaches_end, max(min(key - length + kernel + 1, 1), 0))
    return max(reaches_end * (length - 1), min(group * stride + stride - 1, length - 1))


# ---- ball: CLEAR (arXiv 2412.16112, equation 4); a distance is the weighted sum of an axis' squared steps ----


def nearest(first, last, other_first, other_last):
    """Least number of steps between a position of one range and one of the other."""
    return max(max(first - other_last, other_first - last), 0)


def farthest(first, last, other_first, other_last):
    """Largest number of steps between a position of one range and one of the other."""
    return max(last - other_first, other_last - first)
