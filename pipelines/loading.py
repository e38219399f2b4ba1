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
EMBEDDED_MODELS = ("shapes-flux", "shapes-sd")
# What a model's folder may say about how it wants to be run, beside its stock files.
DEFAULTS_FILE = "vision_attn.json"
# What is read of it, each an argument of the pipeline's call; "guidance" holds those of AStarPipeline, by loss.
_DEFAULTS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "prompt": ((str,), "text"),
    "true_cfg_scale": ((int, float), "a number"),
    "guidance_scale": ((int, float), "a number"),
    "guidance": ((dict,), "an object"),
    **dict.fromkeys(
        ("height", "width", "num_inference_steps", "num_frames", "max_sequence_length"), ((int,), "a whole number")
    ),
}


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
        ImportError: diffusers, or a package that the pipeline needs, is not installed.
        ValueError: a folder whose files are no pipeline.
    """
    place = find_model(model)
    if isinstance(place, Path) and "_class_name" not in (index := _read_object(place / "model_index.json")):
        raise ValueError(
            f"load_pipeline: {place / 'model_index.json'} must hold _class_name, got {_shown(index)}: give the folder "
            "that save_pretrained wrote"
        )
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise ImportError("load_pipeline: diffusers is not installed: pip install 'vision-attn[diffusers]'") from error
    with _quiet(diffusers.utils.logging), _quiet(transformers.utils.logging):
        try:
            pipe = diffusers.DiffusionPipeline.from_pretrained(place, dtype=dtype)
        except Exception as error:  # broken files show themselves as anything from KeyError to SafetensorError
            raise _not_loaded(model, error) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _not_loaded(model: str, error: Exception) -> Exception:
    reason = (str(error).strip().splitlines() or [""])[0]
    text = f"load_pipeline: model {model!r} could not be loaded: "
    if isinstance(error, OSError):
        return FileNotFoundError(text + (reason or type(error).__name__))
    kind = ImportError if isinstance(error, ImportError) else ValueError
    return kind(f"{text}{type(error).__name__}: {reason}")


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

    Raises:
        ValueError: the file is no JSON object, or a value in it is of the wrong type.
    """
    place = find_model(model)
    file = Path(place) / DEFAULTS_FILE
    if not isinstance(place, Path) or not file.is_file():
        return {}
    defaults = _read_object(file)
    for name, (kinds, wanted) in _DEFAULTS.items():
        if name in defaults and not isinstance(defaults[name], kinds):
            raise ValueError(f"run_defaults: {name} in {file} must be {wanted}, got {_shown(defaults[name])}")
    return defaults


def _read_object(file: Path) -> dict[str, Any]:
    """A model's JSON file whose content must be an object.

    Raises:
        ValueError: other content, or no JSON at all.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"find_model: {file} must be a JSON file, got {error}: mend it") from error
    if not isinstance(content, dict):
        raise ValueError(f"find_model: {file} must hold a JSON object, {{...}}, got {_shown(content)}: mend it")
    return content


def _shown(content: Any) -> str:
    text = json.dumps(content)
    return text if len(text) <= 60 else f"{text[:57]}..."
