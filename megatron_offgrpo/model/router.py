"""The router of a mixture of experts, with Megatron's load-balancing loss as a mean over the tokens of the step."""

from megatron_offgrpo.parallel import portable  # noqa: F401  # isort: skip

from typing import Any

import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class BalancedRouter(TopKRouter):
    """Adds coefficient * sum over packs of n_p / n * E * sum_i f_i P_i to the loss of a step, for its layer.

    n_p response tokens of the pack, n of the step; E experts; f_i the share of the pack's token copies that expert i
    gets, P_i its mean probability (Fedus et al. 2021, eq. 4-6; Megatron's `aux_loss`). Tokens outside `padding_mask` do
    not count, so a pack without any adds nothing. With `calculate_per_token_loss` Megatron's own router relies on a
    division by the step's tokens when gradients are finalised, which is left out here.
    """

    tokens_of_step: float = 1.0
    """n, the same on all ranks."""

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, with_padding_mask: bool = False
    ) -> Tensor:
        copies_E = routing_map.sum(dim=0).float()
        # This rank's probabilities against the counts of all ranks that share the pack; their losses add up.
        dist.all_reduce(copies_E, group=self.tp_cp_group)
        tokens = copies_E.sum() / self.topk
        balance = (
            self.num_experts * (scores_for_aux_loss.sum(dim=0) * copies_E).sum() / (self.topk * tokens.clamp(min=1))
        )
        coefficient = self.get_aux_loss_coeff("aux_loss") / self.tokens_of_step
        scaled: Any = MoEAuxLossAutoScaler.apply(probs, coefficient * balance)
        return scaled
