from transformer_engine.pytorch import distributed, fp8, ops, optimizers, router, tensor
from transformer_engine.pytorch.fp8 import fp8_autocast
from transformer_engine.pytorch.linear import LayerNormLinear, Linear, RMSNorm
from transformer_engine.pytorch.ops import DotProductAttention, GroupedLinear, LayerNorm

__all__ = [
    "DotProductAttention",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "distributed",
    "fp8",
    "fp8_autocast",
    "ops",
    "optimizers",
    "router",
    "tensor",
]
