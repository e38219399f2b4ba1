"""AgentSD: agent attention for Stable Diffusion without training, its agents found by token merging.

Tokens are merged into `N'`, and further into agents `A`:

    out = softmax(s ** k_scale2 * Q A^T) · softmax(s * A K^T) · V + k_shortcut * V,    s = D ** -0.5

on merged `Q`, `K`, `V`; each token then takes what its group has. Projections are linear, so that means of projected
tokens are the projected means: merging happens here, after the model's own projections.

Source: Agent Attention (arXiv 2312.08874), section 5.3 and its released code; Token Merging (arXiv 2303.17604).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vision_attn.backends import agent, full, resolve
from vision_attn.errors import UnsupportedError
from vision_attn.layout import TokenLayout
from vision_attn.operators.agent import add_shortcut, second_scale
from vision_attn.operators.arguments import joint_inputs, no_autocast, resolve_scale
from vision_attn.operators.cost import Cost, chunks, pairs_cost
from vision_attn.operators.joint import with_text_queries
from vision_attn.operators.registry import register_operator
from vision_attn.operators.token_merging import destinations, group


@register_operator("agent_sd")
@dataclass(frozen=True)
class AgentSD:
    """Agent attention over merged tokens: faster self-attention of Stable Diffusion's UNets, without training.

    Text tokens are merged with none, collected from as keys are, and their queries attend every key.

    `paper_steps` gives the schedule of the paper. Settings that leave less than two merged tokens per agent are refused
    at the call: agents would cost more than they save. `Agent(agents=256, k_scale2=0.3, k_shortcut=0.075)` is the
    simpler form with agents from a raster.

    Args:
        ratio: Share of the tokens that is merged away, from 0 to below 1; at least one per cell stays.
        agent_ratio: The same for the agents, above `ratio`; None for no agents: merged tokens attend each other.
        sx: Columns of a cell; each cell has one token that others are merged into.
        sy: Rows of a cell.
        k_scale2: Exponent of the second scale.
        k_shortcut: Factor on the values that are added to the output.
        max_downsample: Coarsest maps of a UNet that are served, by their side: 1 serves the finest maps that the model
            attends, 2 also those of half the rows and columns, and so on; None serves all.
        use_rand: Take a random token of each cell, from torch's generator, as the released code does, not the first
            one; the same for the whole batch. Odd batches take the first: else a prompt and its negative would be
            merged differently.

    Raises:
        ValueError, TypeError: a value out of range.
        UnsupportedError: at the call, a grid smaller than a cell, less than two merged tokens per agent, nothing to
            merge.

    Source: arXiv 2312.08874; names are those of the released `apply_patch`, whose default settings never have agents.

    Example:
        >>> import torch
        >>> from vision_attn.layout import TokenLayout
        >>> x = torch.randn(1, 256, 2, 8)
        >>> AgentSD()(x, x, x, TokenLayout((16, 16))).shape
        torch.Size([1, 256, 2, 8])
    """

    ratio: float = 0.4
    agent_ratio: float | None = 0.95
    sx: int = 4
    sy: int = 4
    k_scale2: float = 0.3
    k_shortcut: float = 0.075
    max_downsample: int | None = 1
    use_rand: bool = False

    # What enters the block tells similar tokens, as in the released code: `patch` passes it.
    wants_block_input = True

    def __post_init__(self) -> None:
        _check_share("ratio", self.ratio, 0, "")
        if self.agent_ratio is not None:
            _check_share("agent_ratio", self.agent_ratio, self.ratio, f" (ratio={self.ratio})")
        elif self.ratio == 0:
            raise ValueError(
                "AgentSD: ratio must be above 0 with agent_ratio=None, got 0: nothing is merged, use va.Dense()"
            )
        for name in ("sx", "sy", "max_downsample"):
            size = getattr(self, name)
            if name == "max_downsample" and size is None:
                continue
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"AgentSD: {name} must be an integer, got {size!r}")
            if size < 1:
                raise ValueError(f"AgentSD: {name} must be at least 1, got {size}")
        for name in ("k_scale2", "k_shortcut"):
            resolve_scale("AgentSD", getattr(self, name), 1, name)
        if not isinstance(self.use_rand, bool):
            raise TypeError(f"AgentSD: use_rand must be True or False, got {self.use_rand!r}")

    @staticmethod
    def paper_steps(num_inference_steps: int = 50, ratio: float = 0.4, **settings: Any) -> dict[range, AgentSD]:
        """The schedule of the paper as `steps` of `patch`: agents in the first 40 % of the steps, then merging alone.

        Args:
            num_inference_steps: Steps of the run, at least 2.
            ratio: Share of the tokens that is merged away; 0.1 to 0.5 in the paper.
            settings: Further settings of both stages, such as `use_rand=True`.

        Raises:
            ValueError, TypeError: a value out of range.

        Example:
            >>> {str(steps): op.agent_ratio for steps, op in AgentSD.paper_steps(50).items()}
            {'range(0, 20)': 0.95, 'range(20, 50)': None}
        """
        steps = num_inference_steps
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise TypeError(f"AgentSD.paper_steps: num_inference_steps must be an integer, got {steps!r}")
        if steps < 2:
            raise ValueError(f"AgentSD.paper_steps: num_inference_steps must be at least 2, got {steps}")
        own = {"agent_ratio", "sx", "sy"} & settings.keys()
        if own:
            raise TypeError(f"AgentSD.paper_steps: {min(own)} must be left out, the schedule sets it")
        if isinstance(ratio, (int, float)) and ratio >= 0.95:
            raise ValueError(f"AgentSD.paper_steps: ratio must be below 0.95, that of the agents, got {ratio}")
        change = max(1, round(0.4 * steps))
        with_agents = AgentSD(ratio, 0.95, sx=4, sy=4, **settings)
        return {range(change): with_agents, range(change, steps): AgentSD(ratio, None, sx=2, sy=2, **settings)}

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
        scale: float | None = None,
        *,
        block_input: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Attention on `[B, S, H, D]` with `S = layout.tokens`; `block_input` `[B, S, C]`, None for the keys."""
        query, key, value = joint_inputs("AgentSD", query, key, value, layout)
        factor, chosen = resolve_scale("AgentSD", scale, query.shape[-1]), resolve(backend, "AgentSD", query, value)
        query_factor, numbers = second_scale("AgentSD", factor, self.k_scale2), self._numbers(layout)
        similarity = key.flatten(2) if block_input is None else block_input
        if similarity.ndim != 3 or similarity.shape[:2] != query.shape[:2]:
            expected = f"[{query.shape[0]}, {query.shape[1]}, C]"
            raise ValueError(f"AgentSD: block_input must have shape {expected}, got {list(similarity.shape)}")
        image, random = layout.image_slice, self.use_rand and query.shape[0] % 2 == 0
        with no_autocast(query):
            destination = destinations(layout.grid, (self.sy, self.sx), random, query.device)
            tokens, *agents = group(similarity[:, image], destination, numbers)
            q, *kv = (tokens.merge(x[:, image]) for x in (query, key, value))
            k, v = (_with_text(x, whole, layout) for x, whole in zip(kv, (key, value), strict=True))
            if agents:
                a = agents[0].merge(query[:, image])
                output = agent(q, k, v, a, None, None, factor, query_factor, backend=chosen)
                output = add_shortcut(output, kv[1], self.k_shortcut)
            else:
                output = full(q, k, v, None, factor, backend=chosen)[0]
            return with_text_queries(tokens.unmerge(output), query, key, value, layout, None, factor, chosen)

    def cost(self, layout: TokenLayout, heads: int, head_dim: int) -> Cost:
        """Counted cost of one call, one batch item, with similarities of as many channels as all heads have."""
        image, text, cells = layout.image_tokens, layout.text_tokens, self._cells(layout)
        merged, *agents = (image - number for number in self._numbers(layout))
        if agents:
            pairs = agents[0] * (2 * merged + text)
            tiles = chunks(agents[0]) * (chunks(merged) + chunks(merged + text))
        else:
            pairs, tiles = merged * (merged + text), chunks(merged) * chunks(merged + text)
        pairs, tiles = pairs + text * layout.tokens, tiles + chunks(text) * chunks(layout.tokens)
        counted = pairs_cost(pairs, layout.tokens, heads, head_dim, tiles)
        return replace(counted, flops=counted.flops + 2 * cells * (image - cells) * heads * head_dim)

    def _cells(self, layout: TokenLayout) -> int:
        frames, rows, columns = (1, 1, *layout.grid)[-3:]
        count = frames * (rows // self.sy) * (columns // self.sx)
        if count == 0:
            raise UnsupportedError(
                f"AgentSD: the grid must hold a cell of sy={self.sy} rows and sx={self.sx} columns, got "
                f"{layout.grid}: use smaller cells, or leave the layer out with layers="
            )
        return count

    def _numbers(self, layout: TokenLayout) -> tuple[int, ...]:
        """Tokens to merge: of the tokens, of the agents if there are any."""
        tokens, spare = layout.image_tokens, layout.image_tokens - self._cells(layout)
        merged = min(int(tokens * self.ratio), spare)
        if self.agent_ratio is None:
            if merged == 0:
                raise UnsupportedError(
                    f"AgentSD: ratio must merge at least one token of the grid {layout.grid}, got ratio={self.ratio} "
                    f"with sx={self.sx}, sy={self.sy}: use larger ones, or va.Dense()"
                )
            return (merged,)
        agents = min(int(tokens * self.agent_ratio), spare)
        if 2 * (tokens - agents) >= tokens - merged:
            raise UnsupportedError(
                f"AgentSD: agents must be less than half of the {tokens - merged} merged tokens on the grid "
                f"{layout.grid}, got {tokens - agents} with agent_ratio={self.agent_ratio}, sx={self.sx}, "
                f"sy={self.sy}: use larger ones, or agent_ratio=None for merging alone"
            )
        return merged, agents


def _with_text(merged: Tensor, whole: Tensor, layout: TokenLayout) -> Tensor:
    """Merged tokens in the place of the grid's."""
    if not layout.text_tokens:
        return merged
    return torch.cat([whole[:, : layout.text_before], merged, whole[:, layout.image_slice.stop :]], 1)


def _check_share(name: str, share: Any, least: float, because: str) -> None:
    if isinstance(share, bool) or not isinstance(share, (int, float)):
        raise TypeError(f"AgentSD: {name} must be a number, got {share!r}")
    if not least <= share < 1:
        raise ValueError(f"AgentSD: {name} must be from {least}{because} to below 1, got {share!r}")
