"""Invertible operations between tensors of a Hugging Face model and regions of Megatron tensors.

Each operation names its Hugging Face tensors (the right column of a table), says the shapes on both sides and
computes both directions, so a table can never convert one way only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Dims:
    """Sizes of one model, under the letters that the tables use."""

    layers: int
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    experts: int = 0
    expert_ffn: int = 0

    def shape(self, letters: str) -> Shape:
        """`"V h"` -> (vocab, hidden); h hidden, d one head, q and kv all heads, f MLP, E experts, e an expert's MLP."""
        sizes = {
            "V": self.vocab,
            "h": self.hidden,
            "d": self.head_dim,
            "q": self.heads * self.head_dim,
            "kv": self.kv_heads * self.head_dim,
            "f": self.ffn,
            "E": self.experts,
            "e": self.expert_ffn,
        }
        return tuple(sizes[letter] for letter in letters.split())


class Op(Protocol):
    """Both directions between `names` (Hugging Face) and one region of a Megatron tensor."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def hf_shapes(self, dims: Dims) -> tuple[Shape, ...]: ...

    def megatron_shape(self, dims: Dims) -> Shape: ...

    def to_megatron(self, tensors: Sequence[Tensor], dims: Dims) -> Tensor: ...

    def to_hf(self, tensor: Tensor, dims: Dims) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Same:
    """One tensor, unchanged."""

    name: str
    letters: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def hf_shapes(self, dims: Dims) -> tuple[Shape, ...]:
        return (dims.shape(self.letters),)

    def megatron_shape(self, dims: Dims) -> Shape:
        return dims.shape(self.letters)

    def to_megatron(self, tensors: Sequence[Tensor], dims: Dims) -> Tensor:
        (tensor,) = tensors
        return tensor

    def to_hf(self, tensor: Tensor, dims: Dims) -> tuple[Tensor, ...]:
        return (tensor,)


@dataclass(frozen=True)
class VocabRows(Same):
    """A tensor with a row per token of the vocabulary, which Megatron may hold with padding rows at the end.

    The checkpoint written here holds the real rows only: Megatron loads it with `allow_shape_mismatch` under any
    tensor-parallel size and fills its padding with zeros. On the way back the rows past the vocabulary are left out.
    """


@dataclass(frozen=True)
class Qkv:
    """Query, key and value projections <-> Megatron's one tensor, interleaved by query group.

    Rows of the Megatron tensor, for each key/value head g: the heads/kv_heads queries of group g, key g, value g.
    """

    attention: str
    """Name of the attention module, e.g. `model.layers.{layer}.self_attn`."""
    kind: str
    """`weight` or `bias`."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{self.attention}.{letter}_proj.{self.kind}" for letter in "qkv")

    def hf_shapes(self, dims: Dims) -> tuple[Shape, ...]:
        columns = self._columns(dims)
        return tuple((*dims.shape(rows), *columns) for rows in ("q", "kv", "kv"))

    def megatron_shape(self, dims: Dims) -> Shape:
        return ((dims.heads + 2 * dims.kv_heads) * dims.head_dim, *self._columns(dims))

    def to_megatron(self, tensors: Sequence[Tensor], dims: Dims) -> Tensor:
        groups, columns = dims.kv_heads, self._columns(dims)
        parts = [tensor.reshape(groups, -1, *columns) for tensor in tensors]
        return torch.cat(parts, dim=1).reshape(self.megatron_shape(dims))

    def to_hf(self, tensor: Tensor, dims: Dims) -> tuple[Tensor, ...]:
        groups, columns = dims.kv_heads, self._columns(dims)
        rows = [dims.heads // groups * dims.head_dim, dims.head_dim, dims.head_dim]
        parts = tensor.reshape(groups, -1, *columns).split(rows, dim=1)
        return tuple(part.reshape(-1, *columns) for part in parts)

    def _columns(self, dims: Dims) -> Shape:
        return (dims.hidden,) if self.kind == "weight" else ()
