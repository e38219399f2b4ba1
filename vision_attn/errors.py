"""The exceptions of this package that are not plain ValueError, TypeError, ImportError or RuntimeError."""

from __future__ import annotations


class PatchError(RuntimeError):
    """Attention could not be swapped: nothing to route, a layer already patched, a model that cannot be served."""


class UnsupportedError(ValueError):
    """An operator cannot honour this mask, layout or call.

    Raised by operators, caught by the patching code: the call is then computed densely and listed, or, with
    `strict=True`, raised as a `PatchError`.
    """
