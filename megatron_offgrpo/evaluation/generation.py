"""What every generation back end offers, and how one is chosen."""

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from annotated_types import Ge, Gt, Le

from megatron_offgrpo.data.chat import chat_format
from megatron_offgrpo.errors import ConfigError, DataError
from megatron_offgrpo.ranges import Count, Natural, Positive, Ranged, Share

BackendName = Literal["vllm", "hf", "server"]
Precision = Literal["auto", "fp32", "bf16"]
HF_BATCH = 64
"""Requests that the hf back end computes together."""
LEAST_TEMPERATURE = 0.01
"""vLLM's limit, kept for every back end: it takes a smaller one for 0.01."""


@dataclass(frozen=True)
class Shaping(Ranged):
    """What else changes the probabilities before a token is drawn, as vLLM does it; by default nothing."""

    top_k: Natural = 0
    """Draw from the k most probable tokens; 0 from all."""
    min_p: Share = 0.0
    """Draw from tokens with at least this share of the greatest probability, at the temperature."""
    repetition_penalty: Annotated[float, Gt(0), Le(2)] = 1.0
    """Divides positive logits of tokens of prompt and response, multiplies negative ones; 1 is none."""
    presence_penalty: Annotated[float, Ge(-2), Le(2)] = 0.0
    """Taken from the logits of tokens of the response."""
    frequency_penalty: Annotated[float, Ge(-2), Le(2)] = 0.0
    """Taken from the logits of tokens of the response once for each time."""


@dataclass(frozen=True)
class SamplingSettings(Ranged):
    """How tokens are drawn; the same meaning in every back end."""

    temperature: Annotated[float, Ge(0), Le(2)] = 0.6
    """0 takes the most probable token."""
    top_p: Annotated[float, Gt(0), Le(1)] = 0.95
    max_tokens: Count = 32768
    """Response tokens, end token included; a response that reaches it without an end token is truncated."""
    stop_token_ids: tuple[int, ...] = ()
    """A response ends after any of these."""
    logprobs: bool = False
    """Keep the log-prob of every sampled token."""
    shaping: Shaping = field(default_factory=Shaping)

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.temperature < LEAST_TEMPERATURE:
            expected = f"0, or {LEAST_TEMPERATURE} to 2"
            raise ConfigError("out of range", where="temperature", expected=expected, got=self.temperature)


@dataclass(frozen=True)
class Request:
    """One sample to draw."""

    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Completion:
    """One sample."""

    token_ids: tuple[int, ...]
    """Without the prompt, with the end token where there is one; empty where a server gives no ids."""
    finish_reason: Literal["stop", "length"]
    logprobs: tuple[float, ...] | None = None
    """log p(token | tokens before), natural log, before temperature and top-p; one per token id."""
    text: str | None = None
    """Set only where a server gives no token ids."""
    reported_tokens: int | None = None
    """What a server without token ids says of the length."""

    def without_end(self, stop_token_ids: Sequence[int]) -> tuple[int, ...]:
        """The token ids without the end token that was sampled."""
        ended = self.finish_reason == "stop" and self.token_ids and self.token_ids[-1] in stop_token_ids
        return self.token_ids[:-1] if ended else self.token_ids

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) if self.reported_tokens is None else self.reported_tokens


class Backend(Protocol):
    """A loaded model that samples and scores; a context manager that frees the model."""

    name: BackendName
    batch_size: int | None
    """Requests computed together in one tensor, in the order given; None where each is scheduled on its own."""

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


def choose_backend(wanted: Literal["auto", "vllm", "hf", "server"]) -> BackendName:
    """`auto` is vLLM where it is installed, else Hugging Face's generate.

    Raises:
        ConfigError: unknown name, or vLLM is asked for and not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if wanted == "auto":
        return "vllm" if installed else "hf"
    if wanted == "vllm" and not installed:
        raise ConfigError("vLLM is not installed", where="backend", remedy="pass --backend hf, or run `make install`")
    if wanted not in ("vllm", "hf", "server"):
        raise ConfigError("unknown back end", where="backend", expected="auto, vllm, hf or server", got=wanted)
    return wanted


@dataclass(frozen=True)
class BackendConfig(Ranged):
    """Where and how the model runs."""

    model: Path
    """Hugging Face folder; the `server` back end reads tokenizer and end tokens from it, the server has the weights."""
    backend: Literal["auto", "vllm", "hf", "server"] = "auto"
    precision: Precision = "auto"
    """auto: fp32 without a GPU, bf16 on one. A server has its own."""
    tensor_parallel: Count = 1
    server_url: str | None = None
    """`http://HOST:PORT/v1` of an OpenAI-compatible server."""
    server_model: str | None = None
    """The model's name on the server; None takes the only one it serves."""
    concurrency: Count = 64
    """Requests that a server is sent at a time."""
    timeout_seconds: Positive = 3600.0
    """Longest wait for one completion of a server."""


def open_backend(config: BackendConfig) -> Backend:
    """Loads the model, or connects to the server.

    Raises:
        ConfigError: a setting that the back end does not have, or a server that is missing or does not answer.
    """
    name = choose_backend(config.backend)
    if (name == "server") != (config.server_url is not None):
        raise ConfigError(
            "the server back end and a server's address go together",
            where="server_url",
            expected="--backend server --server-url http://HOST:PORT/v1",
            got=f"--backend {config.backend}, server url {config.server_url}",
        )
    if name == "vllm":
        from megatron_offgrpo.evaluation.vllm_backend import VllmBackend

        return VllmBackend(config.model, config.precision, config.tensor_parallel)
    if config.tensor_parallel != 1:
        raise ConfigError(
            f"the {name} back end has no such setting", where="tensor_parallel", got=config.tensor_parallel
        )
    if name == "server":
        from megatron_offgrpo.evaluation.server_backend import ServerBackend

        return ServerBackend(config)
    from megatron_offgrpo.evaluation.hf_backend import HfBackend

    return HfBackend(config.model, config.precision)


def stop_token_ids(model: Path, tokenizer: Any) -> tuple[int, ...]:
    """End tokens of a model: those named by config.json and generation_config.json, the tokenizer's, the template's.

    Raises:
        DataError: one of the files is damaged.
    """
    ids = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        ids.add(chat_format(tokenizer).end)
    for name in ("config.json", "generation_config.json"):
        if (model / name).is_file():
            ids.update(_named_ends(model / name))
    return tuple(sorted(ids))


def _named_ends(path: Path) -> list[int]:
    try:
        values = json.loads(path.read_text("utf-8"))
        holders = [values, values.get("text_config") or {}]  # models that see keep their language model's there
        named = [holder.get("eos_token_id") for holder in holders]
    except (ValueError, AttributeError):
        raise DataError("damaged", where=str(path), expected="a JSON object") from None
    ids = [one for entry in named for one in (entry if isinstance(entry, list) else [entry]) if one is not None]
    if any(type(one) is not int or one < 0 for one in ids):
        raise DataError("no token ids", where=f"{path}: eos_token_id", expected="a number or a list of them", got=named)
    return ids
