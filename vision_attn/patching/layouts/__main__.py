"""Print the supported models as a Markdown page: `python -m vision_attn.patching.layouts > docs/models.md`."""

from __future__ import annotations

from vision_attn.patching.layouts import FAMILIES, REFUSED
from vision_attn.patching.layouts.family import Family

_HEAD = """# Models

Which diffusers model classes `va.patch` serves, where it finds the image tokens in their attention sequences, and which
attention it leaves as it is. Classes are known by name, so subclasses are served like their parents.

`T` text, `I` the picture that is drawn, `R` reference pictures; tokens that are not on the grid (text, references,
registers, pads) are seen by every query and see everything. A model that is not listed can be patched with
`grid=(Y, X)`, `grid=(T, Y, X)` or a `TokenLayout`.

The diffusion video decoder of LTX-2.5, `LTX2VideoDiffusionDecoderModel`, is made of neighborhood attention:
`va.patch(decoder)` computes each layer's own window in linear memory, `va.patch(decoder, op)` any other.

This page is printed by `python -m vision_attn.patching.layouts`.
"""


def page() -> str:
    """The page, from `FAMILIES` and `REFUSED`."""
    served = sorted((cls, _sequence(family), _left(family)) for family in FAMILIES for cls in family.classes)
    refused = sorted(REFUSED.items())
    lines = [
        _HEAD,
        "## Served",
        "",
        "| class | sequence | left dense |",
        "|---|---|---|",
        *(f"| `{cls}` | {sequence} | {left} |" for cls, sequence, left in served),
        "",
        "## Refused",
        "",
        "| class | reason |",
        "|---|---|",
        *(f"| `{cls}` | {reason} |" for cls, reason in refused),
    ]
    return "\n".join(lines) + "\n"


def _sequence(family: Family) -> str:
    """What the layout function says about itself, in one line."""
    first_line = (family.layout.__doc__ or "").strip().split("\n")[0]
    return first_line.rstrip(".").replace("|", "\\|")


def _left(family: Family) -> str:
    """The modules that are skipped, and why."""
    return "; ".join(f"`{glob}`: {reason}" for glob, reason in family.skip)


if __name__ == "__main__":
    print(page(), end="")
