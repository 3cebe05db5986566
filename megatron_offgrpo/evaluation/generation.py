"""What every generation back end offers, and how one is chosen."""

import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from transformers import GenerationConfig

from megatron_offgrpo.errors import ConfigError

BackendName = Literal["vllm", "hf"]
Precision = Literal["auto", "fp32", "bf16"]
MAX_TEMPERATURE = 2.0
"""vLLM's limit, kept for every back end."""


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn; the same meaning in every back end."""

    temperature: float = 0.6
    """0 takes the most probable token."""
    top_p: float = 0.95
    max_tokens: int = 32768
    """Response tokens, end token included; a response that reaches it without an end token is truncated."""
    stop_token_ids: tuple[int, ...] = ()
    """A response ends after any of these."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise ConfigError(
                "out of range", where="temperature", expected=f"0 to {MAX_TEMPERATURE:g}", got=self.temperature
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError("must be above 0 and at most 1", where="top_p", got=self.top_p)
        if self.max_tokens < 1:
            raise ConfigError("must be at least 1", where="max_tokens", got=self.max_tokens)


@dataclass(frozen=True)
class Request:
    """One sample to draw."""

    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Completion:
    """One sample."""

    token_ids: tuple[int, ...]
    """Without the prompt, with the end token where there is one."""
    finish_reason: Literal["stop", "length"]


class Backend(Protocol):
    """A loaded model that samples and scores; a context manager that frees the model."""

    name: BackendName

    def __enter__(self) -> "Backend": ...

    def __exit__(self, *_: object) -> None: ...

    def generate(self, requests: Sequence[Request], settings: SamplingSettings) -> Iterator[tuple[int, Completion]]:
        """(index of the request, its completion), as they finish, in any order."""
        ...

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """log p(token | tokens before), natural log, of every token of each sequence but its first."""
        ...


def seed_of(seed: int, problem_id: str, sample: int) -> int:
    """The seed of one sample, in [0, 2^31); it does not depend on which other samples are drawn beside it."""
    digest = hashlib.sha256(f"{seed}/{problem_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def choose_backend(wanted: Literal["auto", "vllm", "hf"]) -> BackendName:
    """`auto` is vLLM where it is installed, else Hugging Face's generate.

    Raises:
        ConfigError: unknown name, or vLLM is asked for and not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if wanted == "auto":
        return "vllm" if installed else "hf"
    if wanted == "vllm" and not installed:
        raise ConfigError("vLLM is not installed", where="backend", remedy="pass --backend hf, or run `make install`")
    if wanted not in ("vllm", "hf"):
        raise ConfigError("unknown back end", where="backend", expected="auto, vllm or hf", got=wanted)
    return wanted


def open_backend(name: BackendName, model: Path, precision: Precision, tensor_parallel: int) -> Backend:
    """Loads the model; `precision` auto is fp32 without a GPU and bf16 on one.

    Raises:
        ConfigError: tensor parallelism with the `hf` back end.
    """
    if name == "vllm":
        from megatron_offgrpo.evaluation.vllm_backend import VllmBackend

        return VllmBackend(model, precision, tensor_parallel)
    if tensor_parallel != 1:
        raise ConfigError("the hf back end runs on one device", where="tensor_parallel", got=tensor_parallel)
    from megatron_offgrpo.evaluation.hf_backend import HfBackend

    return HfBackend(model, precision)


def stop_token_ids(model: Path, tokenizer: Any) -> tuple[int, ...]:
    """End tokens of a model: those of its generation configuration and the tokenizer's own."""
    ids = {tokenizer.eos_token_id}
    if (model / "generation_config.json").is_file():
        named = GenerationConfig.from_pretrained(model).eos_token_id
        ids.update(named if isinstance(named, list) else [] if named is None else [named])
    return tuple(sorted(ids))


def encode_prompt(tokenizer: Any, problem: str, system: str | None) -> tuple[int, ...]:
    """Token ids of a problem under the tokenizer's chat template, up to where the response begins."""
    messages = [{"role": "user", "content": problem}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tuple(tokenizer.encode(text, add_special_tokens=False))
