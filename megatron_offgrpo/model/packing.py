"""What a model needs to know of a packed batch: where its segments lie and which position each token has."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """A run of this rank's tokens within one segment: queries [query_start, query_end) of the rank's own tokens, which
    see keys [key_start, key_end) of the whole pack; the last query sees all of them, the one before one less."""

    query_start: int
    query_end: int
    key_start: int
    key_end: int


@dataclass
class PackedSegments(PackedSeqParams):
    """Segments laid end to end in one row of T tokens; a token sees earlier tokens of its own segment only.

    Under context parallelism a rank holds two of 2 cp equal pieces of the row, one from each end (so that causal
    attention costs all ranks about the same), and gathers the keys and values of the others.

    `qkv_format` stays other than "thd", so that Megatron applies the rotary embedding token by token from the table
    it is given (explicit positions) and hands [T / cp, 1, heads, d] tensors to the core attention.
    """

    parts: tuple[Part, ...] = ()
    gathered_order_T: Tensor | None = None
    """[T] int64: where each token of the row stands when the ranks' tokens are laid in a row; None without cp."""
    qkv_format: str = "packed"

    @staticmethod
    def of(bounds: tuple[int, ...], device: torch.device, *, cp: int = 1, cp_rank: int = 0) -> "PackedSegments":
        """Segments [bounds[s], bounds[s+1]); also fills the offsets that variable-length kernels read."""
        parts = _parts(bounds, own_pieces(bounds[-1], cp, cp_rank))
        queries = [part.query_end - part.query_start for part in parts]
        keys = [part.key_end - part.key_start for part in parts]
        order = None
        if cp > 1:
            laid = np.concatenate([own_tokens(bounds[-1], cp, rank) for rank in range(cp)])
            order = torch.from_numpy(np.argsort(laid)).to(device)
        return PackedSegments(
            parts=parts,
            gathered_order_T=order,
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


def _parts(bounds: tuple[int, ...], pieces: list[tuple[int, int]]) -> tuple[Part, ...]:
    parts, held = [], 0
    for piece_start, piece_end in pieces:
        for start, end in pairwise(bounds):
            first, last = max(start, piece_start), min(end, piece_end)
            if first < last:
                parts.append(Part(held + first - piece_start, held + last - piece_start, start, last))
        held += piece_end - piece_start
    return tuple(parts)


def _offsets(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)


@dataclass(frozen=True)
class ModelInput:
    """One pack, or a context-parallel rank's share of it, as the model sees it.

    Attributes:
        ids_1T: [1, T] int64 token ids.
        positions_T: [T] int64 position of each token in its segment.
        segments: where the segments lie.
        rows_R: [R] int64, the places whose next token is a response token; only they reach the head.
        targets_R: [R] int64, that next token.
    """

    ids_1T: Tensor
    positions_T: Tensor
    segments: PackedSegments
    rows_R: Tensor
    targets_R: Tensor
