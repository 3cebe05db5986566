"""What a model needs to know of a packed batch: where its segments lie and which position each token has."""

from megatron_offgrpo.parallel import portable  # noqa: F401  # isort: skip

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

MASK_ROWS = 128
"""Queries of a block whose attention needs a mask."""


@dataclass
class PackedSegments(PackedSeqParams):
    """Segments laid end to end in one row of T tokens; a token sees earlier tokens of its own segment, and before these
    the prompt that the segment continues, where it continues one.

    Under context parallelism a rank holds two of 2 cp equal pieces of the row, one from each end (so that causal
    attention costs all ranks about the same), and gathers the keys and values of the others.

    What a rank holds falls into parts, each a run of its tokens within one segment: the next `query_lengths[i]` tokens
    see the next `key_lengths[i]` keys of [K]; the last of them sees all, the one before one less.

    `qkv_format` stays other than "thd", so that Megatron applies the rotary embedding token by token from the table
    it is given (explicit positions) and hands [T / cp, 1, heads, d] tensors to the core attention.
    """

    query_lengths: tuple[int, ...] = ()
    key_lengths: tuple[int, ...] = ()
    key_places_K: Tensor | None = None
    """[K] int64: where each part's keys stand when the ranks' tokens are laid in a row; None: K is T, in its order."""
    qkv_format: str = "packed"
    _mask: Tensor | None = None

    def mask(self, like: Tensor) -> Tensor:
        """[MASK_ROWS, longest part's keys] of `like`'s type, to add to scores: the last query sees all keys, the one
        before one less. The last r rows and n columns are the mask of r queries with n keys. All layers share it.
        """
        if self._mask is None:
            columns = max(self.max_seqlen_kv, MASK_ROWS)
            hidden = like.new_ones(MASK_ROWS, columns, dtype=torch.bool).triu(1 + columns - MASK_ROWS)
            self._mask = like.new_zeros(MASK_ROWS, columns).masked_fill_(hidden, -torch.inf)
        return self._mask

    @staticmethod
    def of(
        bounds: tuple[int, ...],
        device: torch.device,
        *,
        prompts: Mapping[int, tuple[int, int]] = MappingProxyType({}),
        cp: int = 1,
        cp_rank: int = 0,
    ) -> "PackedSegments":
        """Segments [bounds[s], bounds[s+1]), of which segment s continues what stands at prompts[s] = [start, end).

        Also fills the offsets that variable-length kernels read.
        """
        pieces = own_pieces(bounds[-1], cp, cp_rank)
        parts = [part for piece in pieces for part in _parts(bounds, prompts, piece)]
        queries = tuple(num_queries for num_queries, _ in parts)
        keys = tuple(len(places) for _, places in parts)
        key_places = None
        if cp > 1 or prompts:
            laid = np.concatenate([own_tokens(bounds[-1], cp, rank) for rank in range(cp)])
            key_places = torch.from_numpy(np.argsort(laid)[np.concatenate([places for _, places in parts])]).to(device)
        return PackedSegments(
            query_lengths=queries,
            key_lengths=keys,
            key_places_K=key_places,
            cu_seqlens_q=_offsets(queries, device),
            cu_seqlens_kv=_offsets(keys, device),
            max_seqlen_q=max(queries),
            max_seqlen_kv=max(keys),
        )


def own_pieces(num_tokens: int, cp: int, cp_rank: int) -> list[tuple[int, int]]:
    """The pieces of a row of `num_tokens` that a context-parallel rank holds; `num_tokens` is a multiple of 2 cp."""
    if cp == 1:
        return [(0, num_tokens)]
    assert num_tokens % (2 * cp) == 0, (num_tokens, cp)
    length = num_tokens // (2 * cp)
    return [(piece * length, (piece + 1) * length) for piece in (cp_rank, 2 * cp - 1 - cp_rank)]


def own_tokens(num_tokens: int, cp: int, cp_rank: int) -> npt.NDArray[np.int64]:
    """The places in the row of the tokens that a context-parallel rank holds, in its order."""
    return np.concatenate([np.arange(start, end) for start, end in own_pieces(num_tokens, cp, cp_rank)])


def _parts(
    bounds: tuple[int, ...], prompts: Mapping[int, tuple[int, int]], piece: tuple[int, int]
) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Of each segment in a piece of the row: the number of its tokens there, and the places of the keys they see."""
    for number, (start, end) in enumerate(pairwise(bounds)):
        first, last = max(start, piece[0]), min(end, piece[1])
        if first < last:
            yield last - first, np.concatenate([np.arange(*prompts.get(number, (0, 0))), np.arange(start, last)])


def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)


@dataclass(frozen=True)
class ModelInput:
    """One pack, or a context-parallel rank's share of it, as the model sees it.

    Attributes:
        ids_1T: [1, T] int64 token ids.
        positions_T: [T] int64 position of each token in its trajectory.
        segments: where the segments lie.
        rows_R: [R] int64, the places whose next token is a response token; only they reach the head.
        targets_R: [R] int64, that next token.
    """

    ids_1T: Tensor
    positions_T: Tensor
    segments: PackedSegments
    rows_R: Tensor
    targets_R: Tensor
