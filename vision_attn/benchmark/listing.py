"""What is registered and what is usable here, as rows for a table or JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

import vision_attn as va


def operator_rows() -> list[dict[str, Any]]:
    """One row per registered operator: name, how to write it, its fields, and its docstring's first sentence."""
    rows = []
    for name, cls in va.operators().items():
        fields = [field for field in dataclasses.fields(cls) if field.init]
        written = [
            field.name if field.default is dataclasses.MISSING else f"{field.name}={field.default!r}"
            for field in fields
        ]
        rows.append(
            {
                "name": name,
                "form": f"{name}({', '.join(written)})" if written else name,
                "fields": [field.name for field in fields],
                "summary": _first_sentence(cls.__doc__),
            }
        )
    return rows


def backend_rows() -> list[dict[str, Any]]:
    """One row per backend: name, whether it can be used here, and why not."""
    return [
        {"name": name, "available": answer == "yes", "reason": "" if answer == "yes" else answer}
        for name, answer in va.backends().items()
    ]


def _first_sentence(docstring: str | None) -> str:
    return " ".join((docstring or "").strip().split("\n\n")[0].split())
