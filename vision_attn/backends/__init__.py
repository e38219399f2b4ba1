"""How a windowed attention is computed, and which way serves a call.

`windowed` joins a window over the grid with keys that every query sees; `full` is attention over all keys. Both return
the log-sum-exp, so that everything else is an exact merge.
"""

from vision_attn.backends.choose import BACKENDS, Backends, backends, resolve
from vision_attn.backends.serve import agent, block_sparse, full, merge, windowed
from vision_attn.backends.triton import triton_windowed

__all__ = [
    "BACKENDS",
    "Backends",
    "agent",
    "backends",
    "block_sparse",
    "full",
    "merge",
    "resolve",
    "triton_windowed",
    "windowed",
]
