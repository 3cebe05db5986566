"""Sampling and scoring with vLLM, in this process.

vLLM keeps memory and global settings until its process ends: a program that does other work as well runs the
evaluation in a process of its own.
"""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_offgrpo.errors import ConfigError, GenerationError
from megatron_offgrpo.evaluation.generation import (
    BackendName,
    Completion,
    Precision,
    Request,
    SamplingSettings,
)

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",  # the model is a folder; vLLM would still ask the hub about it
}
"""Set before vLLM is imported, which reads them then; a value that is set already stays."""
CPU_OPTIONS: dict[str, Any] = {
    "enforce_eager": True,
    # Without a size vLLM takes a share of the machine's memory, and refuses to start where that is in use.
    "kv_cache_memory_bytes": 512 << 20,
    # vLLM 0.32 rewinds a request's random generator after a part of a prompt, which CPU generators cannot do.
    "enable_chunked_prefill": False,
}


def import_vllm() -> Any:
    """The module vllm, imported with `ENVIRONMENT` and without its remarks about Triton and deprecations."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("torch._library.triton", "vllm.triton_utils.importing"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
    import vllm

    return vllm


class VllmBackend:
    """vLLM's engine: fp32 and eager on a CPU, bf16 on GPUs."""

    name: BackendName = "vllm"
    batch_size: int | None = None

    def __init__(self, model: Path, precision: Precision, tensor_parallel: int) -> None:
        self._vllm = import_vllm()
        on_gpu = torch.cuda.is_available()
        if precision == "auto":
            precision = "bf16" if on_gpu else "fp32"
        options: dict[str, Any] = {} if on_gpu else CPU_OPTIONS
        try:
            self._llm = self._vllm.LLM(
                str(model),
                dtype={"fp32": "float32", "bf16": "bfloat16"}[precision],
                tensor_parallel_size=tensor_parallel,
                generation_config="vllm",  # no sampling settings of the model's own
                use_tqdm_on_load=False,
                **options,
            )
        except (ValueError, RuntimeError) as cause:
            line = str(cause).strip().splitlines()[-1]
            raise ConfigError(f"vLLM does not start ({line})", where=str(model), remedy="try --backend hf") from cause

    def __enter__(self) -> "VllmBackend":
        return self

    def __exit__(self, *_: object) -> None:
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm

    def generate(self, requests: Sequence[Request], settings: SamplingSettings) -> Iterator[tuple[int, Completion]]:
        """(index of the request, its completion), as they finish."""
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        engine = self._llm.llm_engine
        try:
            for index, request in enumerate(requests):
                parameters = self._parameters(request, settings)
                engine.add_request(str(index), {"prompt_token_ids": list(request.prompt_ids)}, parameters)
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        yield int(output.request_id), _completion(output.outputs[0], settings)
        except (EngineDeadError, EngineGenerateError) as cause:
            raise GenerationError(f"vLLM's engine failed ({cause})") from cause
        except ValueError as cause:
            raise GenerationError(f"vLLM refuses a request ({str(cause).strip().splitlines()[0]})") from cause

    def _parameters(self, request: Request, settings: SamplingSettings) -> Any:
        return self._vllm.SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            **asdict(settings.shaping),
            max_tokens=settings.max_tokens,
            stop_token_ids=list(settings.stop_token_ids),
            seed=request.seed,
            logprobs=0 if settings.logprobs else None,  # of the sampled token alone
            detokenize=False,
        )

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """log p(token | tokens before) of every token but the first; raw, before temperature and top-p."""
        prompts = [{"prompt_token_ids": list(ids)} for ids in sequences]
        parameters = self._vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
        return [
            [entry[token].logprob for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
            for ids, output in zip(sequences, outputs, strict=True)
        ]


def _completion(done: Any, settings: SamplingSettings) -> Completion:
    ids = tuple(done.token_ids)
    logprobs = None
    if settings.logprobs:
        logprobs = tuple(entry[token].logprob for token, entry in zip(ids, done.logprobs, strict=True))
    return Completion(ids, "stop" if done.finish_reason == "stop" else "length", logprobs)
