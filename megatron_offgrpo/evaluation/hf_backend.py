"""Sampling and scoring with Hugging Face Transformers, where vLLM is not installed."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
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
from megatron_offgrpo.evaluation.hf_sampling import processors_of


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
            # The model's own would fill in what a request leaves open: penalties, beams, a time limit.
            self.model.generation_config = GenerationConfig()
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
        output_RT = self.model.generate(
            input_ids=ids_RT.to(self.device),
            attention_mask=mask_RT.to(self.device),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=settings.max_tokens,
                eos_token_id=list(settings.stop_token_ids),
                pad_token_id=pad,
            ),
            logits_processor=processors_of(settings, requests, longest),
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
