"""What stands between a Transformers model's logits and its greedy choice: penalties and sampling, as in vLLM."""

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from megatron_offgrpo.evaluation.generation import Request, SamplingSettings, Shaping


def processors_of(settings: SamplingSettings, requests: Sequence[Request], width: int) -> LogitsProcessorList:
    """Penalties where there are any, then sampling above temperature 0, in vLLM's order.

    Args:
        width: length of the padded prompts.
    """
    processors = LogitsProcessorList()
    shaping = settings.shaping
    if (shaping.repetition_penalty, shaping.presence_penalty, shaping.frequency_penalty) != (1.0, 0.0, 0.0):
        processors.append(Penalties(shaping, [request.prompt_ids for request in requests], width))
    if settings.temperature > 0:
        processors.append(SeededSampling(settings, [request.seed for request in requests]))
    return processors


class Penalties(LogitsProcessor):
    """Repetition over prompt and response, presence and frequency over the response alone.

    Transformers' own repetition penalty also counts the padding before a short prompt, whose token is an end token.
    """

    def __init__(self, shaping: Shaping, prompts: Sequence[Sequence[int]], width: int) -> None:
        self.shaping, self.prompts, self.width = shaping, prompts, width

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Penalised scores, float32 [rows, vocabulary]."""
        scores_RV, drawn_RT = scores.float(), input_ids[:, self.width :]
        counts_RV = torch.zeros_like(scores_RV).scatter_add_(1, drawn_RT, torch.ones_like(drawn_RT, dtype=torch.float))
        seen_RV = counts_RV > 0
        for row, prompt in enumerate(self.prompts):
            seen_RV[row, list(prompt)] = True
        penalty = self.shaping.repetition_penalty
        divided_RV = torch.where(scores_RV > 0, scores_RV / penalty, scores_RV * penalty)
        scores_RV = torch.where(seen_RV, divided_RV, scores_RV)
        scores_RV -= self.shaping.frequency_penalty * counts_RV + self.shaping.presence_penalty * (counts_RV > 0)
        return scores_RV


class SeededSampling(LogitsProcessor):
    """Draws each row's token with the row's own generator, so that a sample does not depend on its batch.

    Temperature, min-p, top-k, then top-p (the smallest set of tokens whose probability reaches p), then argmax(logit +
    Gumbel noise), which is a draw from the softmax (Gumbel 1954); HF's greedy search takes the argmax.
    """

    def __init__(self, settings: SamplingSettings, seeds: Sequence[int]) -> None:
        self.settings = settings
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Perturbed scores, float32 [rows, vocabulary]."""
        scores_RV = self._kept(scores.float() / self.settings.temperature)
        uniform_RV = torch.stack([torch.rand(scores.shape[-1], generator=each) for each in self.generators])
        tiny = torch.finfo(torch.float32).tiny  # log(0) would be infinite
        exponential_RV = (-uniform_RV.clamp(min=tiny).log()).clamp(min=tiny)
        gumbel_RV = -exponential_RV.log()
        return scores_RV + gumbel_RV.to(scores_RV.device)

    def _kept(self, scores_RV: torch.Tensor) -> torch.Tensor:
        """The scores with -inf for tokens that are not to be drawn."""
        settings, shaping = self.settings, self.settings.shaping
        if shaping.min_p > 0:
            probability_RV = scores_RV.softmax(dim=-1)
            least_R1 = shaping.min_p * probability_RV.amax(dim=-1, keepdim=True)
            scores_RV = scores_RV.masked_fill(probability_RV < least_R1, -torch.inf)
        if 0 < shaping.top_k < scores_RV.shape[-1]:
            least_R1 = scores_RV.topk(shaping.top_k, dim=-1).values[:, -1:]
            scores_RV = scores_RV.masked_fill(scores_RV < least_R1, -torch.inf)
        if settings.top_p < 1:
            sorted_RV, order_RV = scores_RV.sort(dim=-1, descending=True)
            probability_RV = sorted_RV.softmax(dim=-1)
            outside_RV = probability_RV.cumsum(dim=-1) - probability_RV >= settings.top_p
            outside_RV = torch.zeros_like(outside_RV).scatter(-1, order_RV, outside_RV)
            scores_RV = scores_RV.masked_fill(outside_RV, -torch.inf)
        return scores_RV
