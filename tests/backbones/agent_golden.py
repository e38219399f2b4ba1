"""Outputs of the released code of Agent Attention."""

import json
from pathlib import Path

import numpy
import torch

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name):
    """State dict, input and output of a case."""
    arrays = numpy.load(GOLDEN / "agent.npz")
    start = f"{name}.w."
    weights = {key.removeprefix(start): torch.from_numpy(arrays[key]) for key in arrays if key.startswith(start)}
    return weights, *(torch.from_numpy(arrays[f"{name}.{end}"]) for end in ("in", "out"))


def errors_of_wrong_variants(name):
    """How far known mistakes are from the output of a case."""
    cases = json.loads((GOLDEN / "agent.json").read_text())["module_cases"]
    return next(case["max_abs_error_of_wrong_variants"] for case in cases if case["name"] == name)
