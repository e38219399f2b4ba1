"""Finding and loading a stock diffusers pipeline by name, folder or Hub id."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import vision_attn

# Names that need no download: folders of the package's assets.
EMBEDDED_MODELS = ("shapes-flux",)
# What a model's folder may say about how it wants to be run, beside its stock files.
DEFAULTS_FILE = "vision_attn.json"


def find_model(model: str) -> Path | str:
    """Tell where a model is: an embedded name or a folder gives a Path, anything else is taken as a Hub id.

    Args:
        model: `"shapes-flux"`, a folder with a `model_index.json`, or a Hub id such as `"owner/name"`.

    Raises:
        FileNotFoundError: an embedded model that this installation lacks, a folder that is no pipeline, a path that
            does not exist.
    """
    if model in EMBEDDED_MODELS:
        folder = Path(vision_attn.__path__[0]) / "assets" / model
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(
                f"find_model: model {model!r} is not part of this installation ({folder}): install the package anew, "
                "or give a folder or Hub id"
            )
        return folder
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(
                f"find_model: model must be a pipeline's folder, got {model!r}, which holds no model_index.json: "
                "give the folder that save_pretrained wrote"
            )
        return folder
    if model.count("/") != 1 or model.startswith((".", "/", "~")) or model.endswith("/"):
        raise FileNotFoundError(
            f"find_model: model must be one of {', '.join(EMBEDDED_MODELS)}, an existing folder or a Hub id "
            f"'owner/name', got {model!r}"
        )
    return model


def load_pipeline(model: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Load a stock pipeline.

    Args:
        model: See `find_model`.
        device: Where it runs.
        dtype: Of all its parts.

    Returns:
        The `DiffusionPipeline`, its own progress bar off.

    Raises:
        FileNotFoundError: as `find_model`, or a Hub id that cannot be had.
        ImportError: diffusers is not installed.
    """
    place = find_model(model)
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise ImportError("load_pipeline: diffusers is not installed: pip install 'vision-attn[diffusers]'") from error
    with _quiet(diffusers.utils.logging), _quiet(transformers.utils.logging):
        try:
            pipe = diffusers.DiffusionPipeline.from_pretrained(place, dtype=dtype)
        except OSError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise FileNotFoundError(f"load_pipeline: model {model!r} could not be loaded: {reason}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


@contextlib.contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Errors only, and no bar per file: what a library says while loading a small folder is noise."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def run_defaults(model: str) -> Mapping[str, Any]:
    """What the model's folder says about how to run it: `__call__` arguments such as `height` and `prompt`.

    Args:
        model: See `find_model`.

    Returns:
        The content of its `vision_attn.json`; empty for a folder without one and for Hub ids.
    """
    place = find_model(model)
    file = Path(place) / DEFAULTS_FILE
    return json.loads(file.read_text()) if isinstance(place, Path) and file.is_file() else {}
