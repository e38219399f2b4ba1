"""Which captions shapes-sd learns from, and which are kept for asking what it was never shown."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count as counted
from itertools import islice

from .scenes import CaptionSpec, sample_scene

# (color, shape) that no training picture shows; each color and each shape occurs in other pairs.
HELD_OUT_PAIRS = frozenset(
    {("red", "star"), ("green", "circle"), ("blue", "triangle"), ("yellow", "square"), ("purple", "star")}
)
SPLITS = ("one", "two", "new pair", "three", "hard")
# First word of the seeds of captions; training seeds start with the run's seed, which is small.
_SEED = 20_011_203
_MOST = {"one": 19, "two": 100, "new pair": 100, "three": 100, "hard": 200}


def has_held_out_pair(spec: CaptionSpec) -> bool:
    """Whether a caption names a pair of color and shape that training never shows."""
    return any((item.color, item.shape) in HELD_OUT_PAIRS for item in spec.objects)


def caption_count(split: str, *, tuning: bool = False) -> int:
    """How many captions a split has.

    Args:
        split: See `split_captions`.
        tuning: See `split_captions`.

    Raises:
        ValueError: an unknown split, one without captions for tuning.
    """
    if split not in SPLITS:
        raise ValueError(f"split_captions: split must be one of {', '.join(SPLITS)}, got {split!r}")
    if tuning and split == "one":
        raise ValueError(f"split_captions: split must have captions for tuning, got {split!r}: choose another")
    return _MOST[split]


def split_captions(split: str, count: int, *, tuning: bool = False) -> list[str]:
    """Different captions, always the same ones, without sizes, relations and backgrounds.

    Args:
        split: `"one"` and `"two"` objects of pairs seen in training; `"new pair"`: two objects, at least one of a
            held-out pair; `"three"`: three objects, of which training shows none; `"hard"`: the last two in turns.
        count: How many.
        tuning: Other captions, to choose settings on; of one object there are none. Pairs of two objects are few, so
            that some of these captions name the objects of others in another order.

    Raises:
        ValueError: as `caption_count`; a count below 1 or of more captions than there are.

    Example:
        >>> split_captions("hard", 2)
        ['a green circle and a red triangle', 'a red circle, a black star and a green circle']
    """
    most = caption_count(split, tuning=tuning)
    if not 1 <= count <= most:
        purpose = " for tuning" if tuning else ""
        raise ValueError(f"split_captions: count must be from 1 to {most} of split {split!r}{purpose}, got {count}")
    if split == "hard":
        halves = [split_captions(half, -(-count // 2), tuning=tuning) for half in ("new pair", "three")]
        return [caption for pair in zip(*halves, strict=True) for caption in pair][:count]
    first = _MOST[split] if tuning else 0
    return list(islice(_all_captions(split), first, first + count))


def _all_captions(split: str) -> Iterator[str]:
    """Every caption of a split once, in random order; endless, so only as many as there are may be taken."""
    kind = {"one": "one", "three": "many"}.get(split, "two")
    seen: set[str] = set()
    for index in counted():
        spec = sample_scene([_SEED, SPLITS.index(split), index], kind=kind).spec
        if _belongs(spec, split) and str(spec) not in seen:
            seen.add(str(spec))
            yield str(spec)


def _belongs(spec: CaptionSpec, split: str) -> bool:
    if spec.background is not None or any(item.size is not None for item in spec.objects):
        return False
    if split == "three":
        return len(spec.objects) == 3
    return has_held_out_pair(spec) == (split == "new pair")
