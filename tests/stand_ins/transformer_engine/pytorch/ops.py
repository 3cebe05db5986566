"""Classes that Megatron derives from or names; none is built here."""

import torch


class DotProductAttention(torch.nn.Module): ...


class GroupedLinear(torch.nn.Module): ...


class LayerNorm(torch.nn.Module): ...


class Sequential: ...


class FusibleOperation: ...
