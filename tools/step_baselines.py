"""Optimizer steps in plain Transformers, to compare a step of this project with.

Both compute the released objective on the same trajectories:
sum_t w (-A exp(logp) + beta k3(logp, ref) - c H), w = 1 / (B L_max), k3 clamped to [-10, 10].
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from megatron_offgrpo.config import OptimizerConfig
from megatron_offgrpo.types import FloatArray

Head = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
CHUNK_LOGITS = 16 * 2**20
"""Logits of a chunk of the head: 64 MiB in fp32, as much as the project's head takes."""


@dataclass(frozen=True)
class Trajectory:
    """One trajectory of the step."""

    ids: Tensor
    """[prompt + response] int64."""
    prompt: int
    advantage: float
    weight: float
    reference: Tensor
    """[response] fp32 cached log-probs."""


@dataclass(frozen=True)
class Result:
    """What both sides must agree on."""

    loss: float
    grad_norm: float


def statistics(hidden_RH: Tensor, weight_VH: Tensor, target_R: Tensor) -> tuple[Tensor, Tensor]:
    """log-probs and entropies [R] from the logits of all rows at once."""
    log_p_RV = functional.linear(hidden_RH, weight_VH).log_softmax(-1)
    return log_p_RV.gather(1, target_R[:, None])[:, 0], -(log_p_RV.exp() * log_p_RV).sum(-1)


def token_losses(logp: Tensor, entropy: Tensor, ref: Tensor, advantage: Tensor, weight: Tensor) -> Tensor:
    """The released objective, summed over the rows."""
    x = ref - logp
    kl = (torch.expm1(x) - x).clamp(-10, 10)
    return (weight * (-advantage * logp.exp() + 0.2 * kl - 0.001 * entropy)).sum()


class PlainLoop:
    """The best loop in plain Transformers.

    Length-sorted micro-batches, padded on the right, so that causal attention needs no mask; the head on response
    rows only, in chunks; cached reference; fused AdamW. `recompute` computes a chunk's logits again in the backward
    pass by torch's checkpoint; without it each chunk's backward pass runs at once, into the hidden states' gradient.
    """

    def __init__(self, model: Any, settings: OptimizerConfig, *, micro_batch_tokens: int, recompute: bool) -> None:
        self.model, self.micro_batch_tokens, self.recompute = model, micro_batch_tokens, recompute
        self.optimizer = adamw(model, settings)
        self.clip = settings.clip_grad

    def step(self, trajectories: list[Trajectory]) -> Result:
        """One optimizer step."""
        self.optimizer.zero_grad(set_to_none=False)
        loss = 0.0
        for batch in self._micro_batches(trajectories):
            ids, rows = _padded(batch)
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)[rows]
            loss += self._head(hidden, batch)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return Result(loss, float(norm))

    def _head(self, hidden_RH: Tensor, batch: list[Trajectory]) -> float:
        weight = self.model.lm_head.weight
        target, ref, advantage, token_weight = _rows(batch)
        chunk = max(1, CHUNK_LOGITS // weight.shape[0])
        leaf = hidden_RH if self.recompute else hidden_RH.detach().requires_grad_()
        loss = torch.zeros(())
        for start in range(0, len(target), chunk):
            part = slice(start, start + chunk)
            inputs = (leaf[part], weight, target[part])
            if self.recompute:
                logp, entropy = checkpoint(statistics, *inputs, use_reentrant=False)
            else:
                logp, entropy = statistics(*inputs)
            of_chunk = token_losses(logp, entropy, ref[part], advantage[part], token_weight[part])
            if not self.recompute:
                of_chunk.backward()
            loss = loss + (of_chunk if self.recompute else of_chunk.detach())
        if self.recompute:
            loss.backward()
        else:
            hidden_RH.backward(leaf.grad)
        return float(loss.detach())

    def _micro_batches(self, trajectories: list[Trajectory]) -> Iterator[list[Trajectory]]:
        """Neighbours in length, as many as fit into the tokens with padding."""
        batch: list[Trajectory] = []
        for trajectory in sorted(trajectories, key=lambda t: -len(t.ids)):
            if batch and (len(batch) + 1) * len(batch[0].ids) > self.micro_batch_tokens:
                yield batch
                batch = []
            batch.append(trajectory)
        yield batch


class ReleasedProcedure:
    """The released procedure: micro-batches of eight, all padded to the step's longest; fp32 logits of all tokens; a
    forward pass for old log-probs and one of the reference model in each step."""

    MICRO_BATCH = 8

    def __init__(self, model: Any, reference: Any, settings: OptimizerConfig) -> None:
        self.model, self.reference = model, reference
        self.optimizer = adamw(model, settings)
        self.clip = settings.clip_grad

    def step(self, trajectories: list[Trajectory]) -> Result:
        """One optimizer step."""
        longest = max(len(trajectory.ids) for trajectory in trajectories)
        size = self.MICRO_BATCH
        batches = [trajectories[start : start + size] for start in range(0, len(trajectories), size)]
        with torch.no_grad():
            for batch in batches:
                self._logprobs(self.model, batch, longest)
            reference = [self._logprobs(self.reference, batch, longest)[0] for batch in batches]
        self.optimizer.zero_grad(set_to_none=False)
        loss = 0.0
        for batch, ref in zip(batches, reference, strict=True):
            logp, entropy = self._logprobs(self.model, batch, longest)
            _, _, advantage, weight = _rows(batch)
            of_batch = token_losses(logp, entropy, ref, advantage, weight)
            of_batch.backward()
            loss += float(of_batch.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return Result(loss, float(norm))

    def _logprobs(self, model: Any, batch: list[Trajectory], longest: int) -> tuple[Tensor, Tensor]:
        ids, rows = _padded(batch, longest)
        mask = torch.stack([torch.arange(longest) < len(trajectory.ids) for trajectory in batch]).long()
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1).flatten()[rows]
        next_ids = ids.roll(-1, dims=1)
        logp = log_p.gather(2, next_ids[..., None])[..., 0].flatten()[rows]
        return logp, entropy


def adamw(model: Any, settings: OptimizerConfig) -> torch.optim.AdamW:
    """torch's fused AdamW; no weight decay on vectors, as in Megatron."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=True)


def reference_logprobs(model: Any, trajectory_ids: Tensor, prompt: int) -> FloatArray:
    """Of the response's tokens."""
    with torch.no_grad():
        hidden = model.model(input_ids=trajectory_ids[None], use_cache=False).last_hidden_state[0, prompt - 1 : -1]
        return np.asarray(statistics(hidden, model.lm_head.weight, trajectory_ids[prompt:])[0])


def _padded(batch: list[Trajectory], longest: int | None = None) -> tuple[Tensor, Tensor]:
    """ids [B, L] padded on the right, and the places of the rows that predict a response token."""
    length = longest or max(len(trajectory.ids) for trajectory in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.int64)
    rows = []
    for number, trajectory in enumerate(batch):
        ids[number, : len(trajectory.ids)] = trajectory.ids
        rows.append(number * length + torch.arange(trajectory.prompt - 1, len(trajectory.ids) - 1))
    return ids, torch.cat(rows)


def _rows(batch: list[Trajectory]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Target, reference, advantage and weight of each response token."""
    counts = torch.tensor([len(trajectory.reference) for trajectory in batch])
    return (
        torch.cat([trajectory.ids[trajectory.prompt :] for trajectory in batch]),
        torch.cat([trajectory.reference for trajectory in batch]),
        torch.tensor([trajectory.advantage for trajectory in batch]).repeat_interleave(counts),
        torch.tensor([trajectory.weight for trajectory in batch]).repeat_interleave(counts),
    )
