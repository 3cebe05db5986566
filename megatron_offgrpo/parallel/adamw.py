"""AdamW that keeps its step count in the parameter group, as Apex's and Transformer Engine's FusedAdam do.

Megatron-Core's checkpoints load into that form only: it looks for the step of torch's own AdamW in the parameters'
states, and a fresh optimizer, into which a checkpoint is loaded, has none.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, Algorithm 2), fp32 state, `step` in each parameter group.

    Args:
        params: parameter groups of fp32 (master) parameters.
        lr, betas, eps, weight_decay: the usual ones.
        adam_w_mode, capturable: must be True and False; the arguments are FusedAdam's.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        assert adam_w_mode and not capturable, "only decoupled weight decay, and no CUDA graphs"  # noqa: PT018
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parameters = [p for p in group["params"] if p.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                    self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
            adamw(
                parameters,
                [p.grad for p in parameters],
                [self.state[p]["exp_avg"] for p in parameters],
                [self.state[p]["exp_avg_sq"] for p in parameters],
                [],
                # adamw counts the step itself, on tensors of its own.
                [torch.tensor(group["step"] - 1.0, device=p.device) for p in parameters],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def install() -> None:
    """Makes Megatron use `GroupStepAdamW` where neither Transformer Engine nor Apex gives it a FusedAdam."""
    import megatron.core.optimizer as optimizer
    from megatron.core.optimizer import distrib_optimizer

    if optimizer.USING_PYTORCH_OPTIMIZER:
        optimizer.Adam = GroupStepAdamW
        optimizer.USING_PYTORCH_OPTIMIZER = False
        # It has FusedAdam's form, and these switches are about the form alone.
        distrib_optimizer.Adam = GroupStepAdamW
        distrib_optimizer.HAVE_APEX_OR_TE = True
        distrib_optimizer.USING_APEX_OPTIMIZER = True
