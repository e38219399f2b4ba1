"""What pipelines around a stock pipeline share: everything that they do not do themselves is the stock one's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

_DEPRECATED = ("callback", "callback_steps")  # what stock pipelines take out of `**kwargs`


class GuidedPipeline:
    """A stock pipeline with guidance around its call.

    Attributes are the stock pipeline's, to read and to set; methods that return the stock pipeline, such as `to`,
    return this one.

    Args:
        pipe: The stock pipeline.
    """

    pipe: Any

    def __init__(self, pipe: Any) -> None:
        self.__dict__["pipe"] = pipe

    @classmethod
    def from_pipe(cls, pipe: Any, **options: Any) -> Any:
        """The same parts with guidance; `pipe` itself stays as it is. Options are those of the class."""
        return cls(pipe, **options)

    def __getattr__(self, name: str) -> Any:
        if name == "pipe" or name.startswith("__"):  # not there yet: a copy is being made
            raise AttributeError(name)
        value = getattr(self.pipe, name)
        if not callable(value) or getattr(value, "__self__", None) is not self.pipe:
            return value

        @functools.wraps(value)
        def method(*args: Any, **kwargs: Any) -> Any:
            result = value(*args, **kwargs)
            return self if result is self.pipe else result

        return method

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.pipe, name, value)


def require_arguments(where: str, pipe: Any, options: Mapping[str, Any]) -> None:
    """Refuse arguments that a pipeline's call does not have: stock ones of SD 1 and SD 2 take any, and drop them.

    Raises:
        TypeError: such an argument.
    """
    known = {*inspect.signature(type(pipe).__call__).parameters, *_DEPRECATED}
    unknown = [name for name in options if name not in known]
    if unknown and not isinstance(pipe, GuidedPipeline):  # which asks its own stock pipeline
        raise TypeError(
            f"{where}: arguments must be its own or those of {type(pipe).__name__}, got {unknown[0]!r}: check its "
            "spelling"
        )


def text_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of a call's arguments those that the encoding of its text depends on."""
    scale = (options.get("cross_attention_kwargs") or {}).get("scale")
    return {"clip_skip": options.get("clip_skip"), "lora_scale": scale}
