"""Learned parameters of operators, such as CLEAR's pooling weights: one set per layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def initial_parameters(operator: Any) -> dict[str, nn.Parameter]:
    """New parameters for one layer, from `operator.initial_parameters()`; empty for an operator that learns nothing.

    Args:
        operator: An operator object. Its `__call__` takes the same names as keyword arguments.
    """
    make = getattr(operator, "initial_parameters", None)
    tensors: dict[str, torch.Tensor] = {} if make is None else make()
    return {name: nn.Parameter(tensor.detach().clone()) for name, tensor in tensors.items()}
