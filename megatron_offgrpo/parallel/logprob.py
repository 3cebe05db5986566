"""Vocabulary-parallel log-probs and entropy in blocks of logits: a full fp32 [R, V] tensor only where it is small."""

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Tables:
    """Two fp32 [B, B] tables that every block of logits uses again, and one in the rows' dtype where that is another.

    Rows and columns are cut, for then each block adds to B rows of either gradient only. Tables are made at first use.
    """

    def __init__(self, hidden_RH: Tensor, num_columns: int, num_logits: int) -> None:
        side = math.isqrt(num_logits)
        # Matrix kernels like sizes that are multiples of their tiles.
        self.side = side - side % 64 if side > 64 else max(side, 1)
        self.dtype = torch.promote_types(hidden_RH.dtype, torch.float32)
        self._empty = hidden_RH.new_empty(0)
        self._size = min(self.side, hidden_RH.shape[0]) * min(self.side, num_columns)

    @cached_property
    def _first(self) -> Tensor:
        return self._empty.new_empty(self._size, dtype=self.dtype)

    @cached_property
    def _second(self) -> Tensor:
        return self._empty.new_empty(self._size, dtype=self.dtype)

    @cached_property
    def _narrow(self) -> Tensor:
        return self._first if self._empty.dtype == self.dtype else self._empty.new_empty(self._size)

    def blocks(self, size: int) -> Iterator[slice]:
        """[0, size) in steps of B."""
        return (slice(start, min(start + self.side, size)) for start in range(0, size, self.side))

    def logits(self, hidden_BH: Tensor, weight_BH: Tensor, *, keep: bool = False) -> Tensor:
        """h W^T, in the first table; in one of its own if it is to be kept."""
        if keep:
            return torch.mm(hidden_BH, weight_BH.t()).to(self.dtype)
        shape = (hidden_BH.shape[0], weight_BH.shape[0])
        narrow_BB = torch.mm(hidden_BH, weight_BH.t(), out=_view(self._narrow, shape))
        return narrow_BB if self._narrow is self._first else _view(self._first, shape).copy_(narrow_BB)

    def exp(self, values_BB: Tensor) -> Tensor:
        """In the second table."""
        return torch.exp(values_BB, out=_view(self._second, values_BB.shape))

    def narrow(self, values_BB: Tensor) -> Tensor:
        """fp32 values in the rows' dtype."""
        return values_BB if self._empty.dtype == self.dtype else _view(self._narrow, values_BB.shape).copy_(values_BB)


class _VocabParallelLogProb(torch.autograd.Function):
    """Keeps hidden, weight, log Z and H; the backward pass computes each block's logits again, or takes those kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RH: Tensor,
        weight_VH: Tensor,
        target_R: Tensor,
        first_column: int,
        num_columns: int,
        num_logits: int,
        keep: bool,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        tables = _Tables(hidden_RH, num_columns, num_logits)
        ctx.kept = {}
        num_rows = hidden_RH.shape[0]
        # The lowest number that a difference with a logit does not overflow.
        maximum_R = torch.full(
            (num_rows,), torch.finfo(tables.dtype).min / 2, device=hidden_RH.device, dtype=tables.dtype
        )
        # Target's logit, sum of exp(l - max), sum of exp(l - max) (l - max).
        sums_3R = maximum_R.new_zeros(3, num_rows)
        for rows in tables.blocks(num_rows):
            for columns in tables.blocks(num_columns):
                logits_BB = tables.logits(hidden_RH[rows], weight_VH[columns], keep=keep)
                column_B, mine_B = _local_column(target_R[rows], first_column, columns)
                sums_3R[0, rows] += logits_BB.gather(1, column_B[:, None])[:, 0] * mine_B
                highest_B = torch.maximum(maximum_R[rows], logits_BB.amax(-1))
                _refer_to(highest_B, maximum_R[rows], sums_3R[:, rows])
                exp_BB = tables.exp(logits_BB.sub_(highest_B[:, None]))
                sums_3R[1, rows] += exp_BB.sum(-1)
                sums_3R[2, rows] += exp_BB.mul_(logits_BB).sum(-1)
                if keep:
                    ctx.kept[rows.start, columns.start] = logits_BB, highest_B
        highest_R = maximum_R.clone()
        _all_reduce(highest_R, dist.ReduceOp.MAX, group)
        _refer_to(highest_R, maximum_R, sums_3R)
        _all_reduce(sums_3R, dist.ReduceOp.SUM, group)
        log_sum_R = sums_3R[1].log()
        logp_R = (sums_3R[0] - maximum_R) - log_sum_R
        entropy_R = log_sum_R - sums_3R[2] / sums_3R[1]
        ctx.save_for_backward(hidden_RH, weight_VH, target_R, maximum_R + log_sum_R, entropy_R)
        ctx.first_column, ctx.num_columns, ctx.num_logits = first_column, num_columns, num_logits
        return logp_R, entropy_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp_R: Tensor, grad_entropy_R: Tensor) -> tuple:
        hidden_RH, weight_VH, target_R, log_z_R, entropy_R = ctx.saved_tensors
        tables = _Tables(hidden_RH, ctx.num_columns, ctx.num_logits)
        grad_hidden_RH = torch.zeros_like(hidden_RH, dtype=tables.dtype)
        grad_weight_VH = torch.empty_like(weight_VH)
        grad_weight_VH[ctx.num_columns :] = 0
        # Used up: a second backward pass computes the logits again.
        kept, ctx.kept = ctx.kept, {}
        for columns in tables.blocks(ctx.num_columns):
            grad_weight_BH = torch.zeros_like(weight_VH[columns], dtype=tables.dtype)
            for rows in tables.blocks(hidden_RH.shape[0]):
                # d logp / d logit_j = [j = target] - p_j ;  d H / d logit_j = -p_j (log p_j + H)
                place = (rows.start, columns.start)
                if place in kept:
                    logits_BB, highest_B = kept.pop(place)
                    log_p_BB = logits_BB.add_((highest_B - log_z_R[rows])[:, None])
                else:
                    log_p_BB = tables.logits(hidden_RH[rows], weight_VH[columns]).sub_(log_z_R[rows, None])
                p_BB = tables.exp(log_p_BB)
                grad_BB = log_p_BB.add_(entropy_R[rows, None]).mul_(grad_entropy_R[rows, None])
                grad_BB.add_(grad_logp_R[rows, None]).mul_(p_BB).neg_()
                column_B, mine_B = _local_column(target_R[rows], ctx.first_column, columns)
                grad_BB.scatter_add_(1, column_B[:, None], (grad_logp_R[rows] * mine_B)[:, None])
                grad_BB = tables.narrow(grad_BB)
                _add_product(grad_hidden_RH[rows], grad_BB, weight_VH[columns])
                _add_product(grad_weight_BH, grad_BB.t(), hidden_RH[rows])
            grad_weight_VH[columns] = grad_weight_BH
        return grad_hidden_RH.to(hidden_RH.dtype), grad_weight_VH, None, None, None, None, None, None


def vocab_parallel_logprob(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    target_R: Tensor,
    *,
    first_column: int = 0,
    vocab_size: int,
    chunk_rows: int,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """log softmax(h W^T)[target] and the exact entropy of that distribution, for each row.

        logp = l_target - log Z;  H = log Z - sum_j p_j l_j;  Z = sum over the real vocabulary of exp(l_j)

    Columns at or beyond `vocab_size` (padding for tensor parallelism) are left out of Z and H, and their rows of the
    weight get gradient zero. The gradient of `hidden_RH` covers this shard's columns only: the caller reduces it over
    the tensor-parallel group, once.

    Args:
        hidden_RH: [R, H] rows that predict a response token; any float dtype.
        weight_VH: [V_local, H] this rank's shard of the output projection.
        target_R: [R] int64 global token ids.
        first_column: global id of the shard's first row.
        vocab_size: V, real size of the vocabulary.
        chunk_rows: logits in memory at once, as a number of whole rows of the shard; they are held as a square block.
            Where R is not larger, the logits are kept for the backward pass, and not computed twice.
        group: tensor-parallel group; None where the vocabulary is not split.

    Returns:
        logp [R] and entropy [R] in nats; fp32 (float64 for float64 input).
    """
    num_columns = min(max(vocab_size - first_column, 0), weight_VH.shape[0])
    keep = torch.is_grad_enabled() and hidden_RH.shape[0] <= chunk_rows
    return _VocabParallelLogProb.apply(
        hidden_RH, weight_VH, target_R, first_column, num_columns, chunk_rows * num_columns, keep, group
    )


def chunk_rows_for(mebibytes: int, local_vocab_size: int) -> int:
    """Rows of an fp32 [rows, V_local] chunk that takes about `mebibytes`."""
    return max(1, mebibytes * 2**20 // (4 * local_vocab_size))


def _view(table: Tensor, shape: tuple[int, ...]) -> Tensor:
    return table[: math.prod(shape)].view(shape)


def _refer_to(highest_B: Tensor, maximum_B: Tensor, sums_3B: Tensor) -> None:
    """Turns sums that refer to `maximum_B` into sums that refer to `highest_B`, in place; so does the maximum."""
    shift_B = maximum_B - highest_B
    sums_3B[2].add_(shift_B * sums_3B[1])
    sums_3B[1:].mul_(shift_B.exp())
    maximum_B.copy_(highest_B)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _local_column(target_B: Tensor, first_column: int, columns: slice) -> tuple[Tensor, Tensor]:
    """Each target's place in the block, and whether it lies there at all."""
    column_B = target_B - (first_column + columns.start)
    last = columns.stop - columns.start - 1
    return column_B.clamp(0, last), (column_B >= 0) & (column_B <= last)


def _all_reduce(tensor: Tensor, operation: Any, group: dist.ProcessGroup | None) -> None:
    if group is not None and group.size() > 1 and tensor.numel():
        dist.all_reduce(tensor, operation, group=group)
