"""Attention operators: functions on tensors, and the same as objects configured once."""

from vision_attn.operators.agent import Agent, agent_attention
from vision_attn.operators.agent_sd import AgentSD
from vision_attn.operators.bilevel_routing import BiLevelRouting
from vision_attn.operators.block_sparse import block_sparse_attention
from vision_attn.operators.clear import Clear, clear_attention, proportional_scale
from vision_attn.operators.cost import Cost
from vision_attn.operators.dense import Dense
from vision_attn.operators.halo import Halo
from vision_attn.operators.hilo import HiLo
from vision_attn.operators.lsda import LSDA
from vision_attn.operators.merge import merge_attention
from vision_attn.operators.neighborhood import Neighborhood, na1d, na2d, na3d
from vision_attn.operators.registry import operators, parse, register_operator

__all__ = [
    "LSDA",
    "Agent",
    "AgentSD",
    "BiLevelRouting",
    "Clear",
    "Cost",
    "Dense",
    "Halo",
    "HiLo",
    "Neighborhood",
    "agent_attention",
    "block_sparse_attention",
    "clear_attention",
    "merge_attention",
    "na1d",
    "na2d",
    "na3d",
    "operators",
    "parse",
    "proportional_scale",
    "register_operator",
]
