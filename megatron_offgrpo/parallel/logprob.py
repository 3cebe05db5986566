"""Vocabulary-parallel log-probs and entropy in row chunks: never a full fp32 [R, V] tensor."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Chunk:
    """Two fp32 [C, V_local] tables that every chunk uses again, and one in the rows' dtype where that is another."""

    def __init__(self, hidden_RH: Tensor, weight_VH: Tensor, chunk_rows: int, dtype: torch.dtype) -> None:
        shape = (min(chunk_rows, hidden_RH.shape[0]), weight_VH.shape[0])
        self.first_CV, self.second_CV = (torch.empty(shape, dtype=dtype, device=hidden_RH.device) for _ in range(2))
        self.narrow_CV = (
            self.first_CV if hidden_RH.dtype == dtype else self.first_CV.new_empty(shape, dtype=hidden_RH.dtype)
        )

    def logits(self, hidden_CH: Tensor, weight_VH: Tensor) -> Tensor:
        """h W^T, in the first table."""
        narrow_CV = torch.mm(hidden_CH, weight_VH.t(), out=self.narrow_CV[: len(hidden_CH)])
        return self._copied(narrow_CV, self.first_CV)

    def exp(self, values_CV: Tensor) -> Tensor:
        """In the second table."""
        return torch.exp(values_CV, out=self.second_CV[: len(values_CV)])

    def narrow(self, values_CV: Tensor) -> Tensor:
        """Values of the first table in the rows' dtype."""
        return self._copied(values_CV, self.narrow_CV)

    @staticmethod
    def _copied(values_CV: Tensor, table_CV: Tensor) -> Tensor:
        return values_CV if values_CV.dtype == table_CV.dtype else table_CV[: len(values_CV)].copy_(values_CV)


class _VocabParallelLogProb(torch.autograd.Function):
    """Keeps hidden, weight, log Z and H; the backward pass computes each chunk's logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RH: Tensor,
        weight_VH: Tensor,
        target_R: Tensor,
        first_column: int,
        chunk_rows: int,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden_RH.dtype, torch.float32)
        num_rows, num_columns = hidden_RH.shape[0], weight_VH.shape[0]
        logp_R, entropy_R, log_z_R = (torch.empty(num_rows, dtype=dtype, device=hidden_RH.device) for _ in range(3))
        chunk = _Chunk(hidden_RH, weight_VH, chunk_rows, dtype)
        for start in range(0, num_rows, chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits_CV = chunk.logits(hidden_RH[rows], weight_VH)
            maximum_C = logits_CV.amax(-1) if num_columns else logits_CV.new_full((logits_CV.shape[0],), float("-inf"))
            _all_reduce(maximum_C, dist.ReduceOp.MAX, group)
            logits_CV.sub_(maximum_C[:, None])
            column_C, mine_C = _local_column(target_R[rows], first_column, num_columns)
            sums_3C = logits_CV.new_zeros(3, logits_CV.shape[0])
            if num_columns:
                sums_3C[0] = logits_CV.gather(1, column_C[:, None])[:, 0] * mine_C
                exp_CV = chunk.exp(logits_CV)
                sums_3C[1] = exp_CV.sum(-1)
                sums_3C[2] = exp_CV.mul_(logits_CV).sum(-1)
            _all_reduce(sums_3C, dist.ReduceOp.SUM, group)
            target_logit_C, sum_exp_C, sum_exp_logit_C = sums_3C
            log_sum_C = sum_exp_C.log()
            logp_R[rows] = target_logit_C - log_sum_C
            entropy_R[rows] = log_sum_C - sum_exp_logit_C / sum_exp_C
            log_z_R[rows] = maximum_C + log_sum_C
        ctx.save_for_backward(hidden_RH, weight_VH, target_R, log_z_R, entropy_R)
        ctx.first_column, ctx.chunk_rows = first_column, chunk_rows
        return logp_R, entropy_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp_R: Tensor, grad_entropy_R: Tensor) -> tuple:
        hidden_RH, weight_VH, target_R, log_z_R, entropy_R = ctx.saved_tensors
        num_columns = weight_VH.shape[0]
        grad_hidden_RH = torch.zeros_like(hidden_RH)
        grad_weight_VH = torch.zeros(weight_VH.shape, dtype=log_z_R.dtype, device=weight_VH.device)
        chunk = _Chunk(hidden_RH, weight_VH, ctx.chunk_rows, log_z_R.dtype)
        for start in range(0, hidden_RH.shape[0] if num_columns else 0, ctx.chunk_rows):
            rows = slice(start, start + ctx.chunk_rows)
            # d logp / d logit_j = [j = target] - p_j ;  d H / d logit_j = -p_j (log p_j + H)
            log_p_CV = chunk.logits(hidden_RH[rows], weight_VH).sub_(log_z_R[rows, None])
            p_CV = chunk.exp(log_p_CV)
            grad_CV = log_p_CV.add_(entropy_R[rows, None]).mul_(grad_entropy_R[rows, None])
            grad_CV.add_(grad_logp_R[rows, None]).mul_(p_CV).neg_()
            column_C, mine_C = _local_column(target_R[rows], ctx.first_column, num_columns)
            grad_CV.scatter_add_(1, column_C[:, None], (grad_logp_R[rows] * mine_C)[:, None])
            grad_CV = chunk.narrow(grad_CV)
            torch.mm(grad_CV, weight_VH, out=grad_hidden_RH[rows])
            if grad_weight_VH.dtype == hidden_RH.dtype:
                grad_weight_VH.addmm_(grad_CV.t(), hidden_RH[rows])
            else:
                grad_weight_VH += grad_CV.t() @ hidden_RH[rows]
        return grad_hidden_RH, grad_weight_VH.to(weight_VH.dtype), None, None, None, None


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
        chunk_rows: rows whose logits are in memory at once; the same on all ranks of the group.
        group: tensor-parallel group; None where the vocabulary is not split.

    Returns:
        logp [R] and entropy [R] in nats; fp32 (float64 for float64 input).
    """
    num_real = min(max(vocab_size - first_column, 0), weight_VH.shape[0])
    return _VocabParallelLogProb.apply(
        hidden_RH, weight_VH[:num_real], target_R, first_column, max(chunk_rows, 1), group
    )


def chunk_rows_for(mebibytes: int, local_vocab_size: int) -> int:
    """Rows of an fp32 [rows, V_local] chunk that takes about `mebibytes`."""
    return max(1, mebibytes * 2**20 // (4 * local_vocab_size))


def _local_column(target_C: Tensor, first_column: int, num_columns: int) -> tuple[Tensor, Tensor]:
    column_C = target_C - first_column
    mine_C = (column_C >= 0) & (column_C < num_columns)
    return column_C.clamp(0, max(num_columns - 1, 0)), mine_C


def _all_reduce(tensor: Tensor, operation: Any, group: dist.ProcessGroup | None) -> None:
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, operation, group=group)
