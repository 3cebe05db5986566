"""What a model needs to know of a packed batch: where its segments lie and which position each token has."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass
class PackedSegments(PackedSeqParams):
    """Segments laid end to end in one row of T tokens; a token sees earlier tokens of its own segment only.

    `qkv_format` stays other than "thd", so that Megatron applies the rotary embedding token by token from the table
    it is given (explicit positions) and hands [T, 1, heads, d] tensors to the core attention.
    """

    bounds: tuple[int, ...] = ()
    """S + 1 offsets: segment s is tokens bounds[s]:bounds[s+1]."""
    qkv_format: str = "packed"

    @staticmethod
    def of(bounds: tuple[int, ...], device: torch.device) -> "PackedSegments":
        """Also fills the offsets as a tensor, for variable-length kernels."""
        offsets = torch.tensor(bounds, dtype=torch.int32, device=device)
        longest = max(end - start for start, end in pairwise(bounds))
        return PackedSegments(
            bounds=bounds, cu_seqlens_q=offsets, cu_seqlens_kv=offsets, max_seqlen_q=longest, max_seqlen_kv=longest
        )


@dataclass(frozen=True)
class ModelInput:
    """One pack as the model sees it.

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
