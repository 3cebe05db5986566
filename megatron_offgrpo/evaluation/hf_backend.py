"""Sampling and scoring with Hugging Face Transformers, where vLLM is not installed."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList
from transformers.utils.logging import disable_progress_bar

from megatron_offgrpo.errors import DataError
from megatron_offgrpo.evaluation.generation import (
    HF_BATCH,
    BackendName,
    Completion,
    Precision,
    Request,
    SamplingSettings,
)


class SeededSampling(LogitsProcessor):
    """Draws each row's token with the row's own generator, so that a sample does not depend on its batch.

    Temperature, then top-p (the smallest set of tokens whose probability reaches p), then argmax(logit + Gumbel noise),
    which is a draw from the softmax (Gumbel 1954); HF's greedy search takes the argmax.
    """

    def __init__(self, settings: SamplingSettings, seeds: Sequence[int]) -> None:
        self.settings = settings
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Perturbed scores, float32 [rows, vocabulary]."""
        scores_RV = scores.float() / self.settings.temperature
        if self.settings.top_p < 1:
            sorted_RV, order_RV = scores_RV.sort(dim=-1, descending=True)
            probability_RV = sorted_RV.softmax(dim=-1)
            outside_RV = probability_RV.cumsum(dim=-1) - probability_RV >= self.settings.top_p
            outside_RV = torch.zeros_like(outside_RV).scatter(-1, order_RV, outside_RV)
            scores_RV = scores_RV.masked_fill(outside_RV, -torch.inf)
        uniform_RV = torch.stack([torch.rand(scores.shape[-1], generator=each) for each in self.generators])
        tiny = torch.finfo(torch.float32).tiny  # log(0) would be infinite
        exponential_RV = (-uniform_RV.clamp(min=tiny).log()).clamp(min=tiny)
        gumbel_RV = -exponential_RV.log()
        return scores_RV + gumbel_RV.to(scores_RV.device)


class HfBackend:
    """Transformers' generate, batch by batch."""

    name: BackendName = "hf"
    batch_size: int | None = HF_BATCH

    def __init__(self, model: Path, precision: Precision) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if precision == "auto":
            precision = "bf16" if self.device.type == "cuda" else "fp32"
        disable_progress_bar()  # one for loading each weight
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        try:
            self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(self.device).eval()
        except (OSError, ValueError) as cause:
            raise DataError(f"unreadable model ({str(cause).splitlines()[0]})", where=str(model)) from None

    def __enter__(self) -> "HfBackend":
        return self

    def __exit__(self, *_: object) -> None:
        del self.model

    def generate(self, requests: Sequence[Request], settings: SamplingSettings) -> Iterator[tuple[int, Completion]]:
        """(index of the request, its completion), batch by batch."""
        for start in range(0, len(requests), HF_BATCH):
            batch = requests[start : start + HF_BATCH]
            completions = self._generate_batch(batch, settings)
            if settings.logprobs:
                completions = self._with_logprobs(batch, completions)
            yield from enumerate(completions, start)

    @torch.inference_mode()
    def _generate_batch(self, requests: Sequence[Request], settings: SamplingSettings) -> list[Completion]:
        longest = max(len(request.prompt_ids) for request in requests)
        pad = settings.stop_token_ids[0]
        ids_RT = torch.full((len(requests), longest), pad)
        mask_RT = torch.zeros_like(ids_RT)
        for row, request in enumerate(requests):
            ids_RT[row, longest - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask_RT[row, longest - len(request.prompt_ids) :] = 1
        processors = LogitsProcessorList()
        if settings.temperature > 0:
            processors.append(SeededSampling(settings, [request.seed for request in requests]))
        output_RT = self.model.generate(
            input_ids=ids_RT.to(self.device),
            attention_mask=mask_RT.to(self.device),
            do_sample=False,
            max_new_tokens=settings.max_tokens,
            eos_token_id=list(settings.stop_token_ids),
            pad_token_id=pad,
            logits_processor=processors,
        )
        return [_completion(row[longest:].tolist(), settings) for row in output_RT.cpu()]

    def _with_logprobs(self, requests: Sequence[Request], completions: list[Completion]) -> list[Completion]:
        # A second pass over each whole sequence: keeping the logits of every step would take [tokens, vocabulary].
        whole = [(*one.prompt_ids, *done.token_ids) for one, done in zip(requests, completions, strict=True)]
        return [
            replace(done, logprobs=tuple(values[len(values) - len(done.token_ids) :]))
            for done, values in zip(completions, self.logprobs(whole), strict=True)
        ]

    @torch.inference_mode()
    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """log p(token | tokens before) of every token but the first."""
        results = []
        for ids in sequences:
            ids_1T = torch.tensor([list(ids)], device=self.device)
            logp_TV = self.model(input_ids=ids_1T).logits[0, :-1].float().log_softmax(dim=-1)
            results.append(logp_TV.gather(-1, ids_1T[0, 1:, None])[:, 0].tolist())
        return results


def _completion(token_ids: list[int], settings: SamplingSettings) -> Completion:
    """Cuts what generate appended after the end token."""
    for position, token in enumerate(token_ids):
        if token in settings.stop_token_ids:
            return Completion(tuple(token_ids[: position + 1]), "stop")
    return Completion(tuple(token_ids), "length")
