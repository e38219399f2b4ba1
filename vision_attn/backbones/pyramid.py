"""What backbones of several stages share of timm's interface: classifier, features, checkpointing, registration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, checkpoint, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn


class Pyramid(nn.Module):
    """A backbone of stages, each of which makes a smaller map of more channels; subclasses write `stage`.

    Args:
        dims: Channels per stage; the first map has a quarter of the image's rows and columns, each further one half.
        num_classes: Classes; 0 for none.
        global_pool: `"avg"`, or `""` for the map itself, without classes.
        drop_rate: Dropout before the classifier.

    Raises:
        ValueError: another pooling.
    """

    def __init__(self, dims: Sequence[int], num_classes: int, global_pool: str, drop_rate: float) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.num_classes, self.global_pool = num_classes, self._checked(global_pool, num_classes)
        self.num_stages, self.num_features, self.head_hidden_size = len(dims), dims[-1], dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**index, "module": f"stage{index + 1}"} for index, dim in enumerate(dims)
        ]
        self.head_drop = nn.Dropout(drop_rate)
        self.head = _classifier(self.num_features, num_classes)

    def stage(self, index: int, x: Tensor) -> Tensor:
        """One stage, `[B, channels, Y, X]` to the same kind of map."""
        raise NotImplementedError

    def finish(self, x: Tensor) -> Tensor:
        """What follows the last stage."""
        return x

    def drop_stages(self, kept: int) -> None:
        """Delete the parameters of the stages after so many."""
        raise NotImplementedError

    def call_block(self, block: nn.Module, *arguments: Any) -> Tensor:
        """A block's output; with checkpointing, computed again in the backward pass."""
        output: Tensor = checkpoint(block, *arguments) if self.grad_checkpointing else block(*arguments)
        return output

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks are computed again in the backward pass."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, beside biases and norms."""
        return set()

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another classifier, freshly initialised."""
        self.global_pool = self._checked(self.global_pool if global_pool is None else global_pool, num_classes)
        self.num_classes = num_classes
        self.head = _classifier(self.num_features, num_classes).to(next(self.parameters()))
        self.head.apply(initialise)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's map `[B, C, Y, X]`."""
        for index in range(self.num_stages):
            x = self.stage(index, x)
        return self.finish(x)

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, norm: bool = False, stop_early: bool = False,
        output_fmt: str = "NCHW", intermediates_only: bool = False,
    ) -> Any:  # fmt: skip
        """Maps of some stages, and the last one; as timm's models.

        Raises:
            ValueError: a format other than NCHW.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"forward_intermediates: output_fmt must be 'NCHW', got {output_fmt!r}")
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        maps = []
        for index in range(last + 1 if stop_early else self.num_stages):
            x = self.stage(index, x)
            if index in wanted:
                maps.append(x)
        return maps if intermediates_only else (self.finish(x), maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the stages of `indices` do not need."""
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        self.num_stages = last + 1
        self.drop_stages(last + 1)
        if prune_head:
            self.reset_classifier(0, "")
        return list(wanted)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classes of the last stage's map."""
        x = self.head_drop(x.mean((2, 3)) if self.global_pool == "avg" else x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, in_chans, rows, columns]` to logits `[B, num_classes]`."""
        return self.forward_head(self.forward_features(x))

    def _checked(self, global_pool: str, num_classes: int) -> str:
        if global_pool not in ("", "avg"):
            raise ValueError(f"{type(self).__name__}: global_pool must be 'avg' or '', got {global_pool!r}")
        if num_classes > 0 and global_pool == "":
            raise ValueError(
                f"{type(self).__name__}: global_pool must be 'avg' with num_classes={num_classes}, got '': only "
                "num_classes=0 leaves the map unpooled"
            )
        return global_pool


class Level(nn.Module):
    """The blocks of one stage, and what leads to the next."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class LevelPyramid(Pyramid):
    """A pyramid whose maps are `[B, Y, X, C]` inside.

    Subclasses make `patch_embed`, which takes an image, a list of `Level` under the name `level_list`, and `norm`.
    """

    level_list = "levels"
    patch_embed: nn.Module
    norm: nn.Module

    def stage(self, index: int, x: Tensor) -> Tensor:
        """One stage, `[B, channels, Y, X]` to the same kind of map."""
        x = self.patch_embed(x) if index == 0 else self._level(index - 1).downsample(x.permute(0, 2, 3, 1))
        for block in self._level(index).blocks:
            x = self.call_block(block, x)
        return x.permute(0, 3, 1, 2)

    def finish(self, x: Tensor) -> Tensor:
        """The last map with a norm."""
        normed: Tensor = self.norm(x.permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)

    def drop_stages(self, kept: int) -> None:
        """Delete the parameters of the stages after so many."""
        levels: Any = getattr(self, self.level_list)
        if kept < len(levels):
            setattr(self, self.level_list, levels[:kept])
            self._level(-1).downsample = None
            self.norm = nn.Identity()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters from the image to the classifier."""
        level = rf"^{self.level_list}\.(\d+)"
        fine = [(rf"{level}\.blocks\.(\d+)", None), (rf"{level}\.downsample", (99,)), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": [(level, None)] if coarse else fine}

    def _level(self, index: int) -> Any:
        return getattr(self, self.level_list)[index]


def _classifier(features: int, classes: int) -> nn.Module:
    return nn.Linear(features, classes) if classes > 0 else nn.Identity()


def initialise(module: nn.Module) -> None:
    """Initial weights of linear layers."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def drop_path_rates(last: float, depths: Sequence[int]) -> list[list[float]]:
    """Rates of stochastic depth per stage and block, rising from 0 to `last`."""
    rates = iter(torch.linspace(0, last, sum(depths), device="cpu").tolist())
    return [[next(rates) for _ in range(depth)] for depth in depths]


def default_cfg(**changes: Any) -> dict[str, Any]:
    """A pretrained configuration for ImageNet at 224 px; without an address where authors give no direct links."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head",
        **changes,
    }


def register(
    model_class: type[Pyramid], name: str, summary: str, defaults: Mapping[str, Any],
    filter_fn: Callable[..., Mapping[str, Tensor]] | None = None,
) -> Callable[..., Any]:  # fmt: skip
    """Register a size of a model with timm.

    Args:
        model_class: Its class; the `default_cfgs` of that module hold the configuration.
        name: For `timm.create_model`.
        summary: Docstring.
        defaults: Arguments of the class that make the size; those of the call win.
        filter_fn: Turns a released file into a state dict; None for `released_weights`.

    Returns:
        The function that timm calls, `create(pretrained=False, **arguments)`.
    """

    def create(pretrained: bool = False, **arguments: Any) -> Any:
        out_indices = arguments.pop("out_indices", (0, 1, 2, 3))
        return build_model_with_cfg(
            model_class, name, pretrained, pretrained_filter_fn=filter_fn or released_weights,
            feature_cfg={"out_indices": out_indices, "feature_cls": "getter"}, **{**defaults, **arguments},
        )  # fmt: skip

    create.__name__ = create.__qualname__ = name
    create.__doc__, create.__module__ = summary, model_class.__module__
    registered: Callable[..., Any] = register_model(create)
    return registered


def note_input_size(model: nn.Module, img_size: tuple[int, int], **arguments: Any) -> None:
    """Have timm save a resized model under its new size; versions without such notes are told by `model_args`."""
    try:
        from timm.models._input import update_model_input_size
    except ImportError:
        return
    update_model_input_size(model, img_size, **arguments)


def released_weights(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Tensor]:
    """The weights of a released file, which may hold the state of a training beside them."""
    weights: Mapping[str, Tensor] = state_dict.get("model", state_dict)
    return weights
