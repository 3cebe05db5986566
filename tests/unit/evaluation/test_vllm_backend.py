"""What becomes of vLLM's failures; its sampling is tested with the real engine in tests/system."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_offgrpo.errors import ConfigError, GenerationError
from megatron_offgrpo.evaluation import vllm_backend
from megatron_offgrpo.evaluation.generation import Completion, Request, SamplingSettings
from megatron_offgrpo.evaluation.vllm_backend import VllmBackend

exceptions = pytest.importorskip("vllm.v1.engine.exceptions", reason="vLLM is not installed")


class Engine:
    """Finishes request 0, then fails."""

    engine_core = SimpleNamespace(shutdown=lambda: None)

    def __init__(self, failure):
        self.failure, self.steps = failure, 0

    def add_request(self, name, prompt, parameters):
        if isinstance(self.failure, ValueError):
            raise self.failure

    def has_unfinished_requests(self):
        return True

    def step(self):
        self.steps += 1
        if self.steps > 1:
            raise self.failure
        entry = {7: SimpleNamespace(logprob=-0.25)}
        done = SimpleNamespace(token_ids=[7], finish_reason="stop", logprobs=[entry])
        return [SimpleNamespace(finished=True, request_id="0", outputs=[done])]


def backend(monkeypatch, failure, start=None):
    def load(*_, **__):
        if start is not None:
            raise start
        return SimpleNamespace(llm_engine=Engine(failure))

    fake = SimpleNamespace(LLM=load, SamplingParams=lambda **values: values)
    monkeypatch.setattr(vllm_backend, "import_vllm", lambda: fake)
    return VllmBackend(Path("m"), "fp32", 1)


def test_an_engine_that_dies_hands_out_what_was_finished(monkeypatch):
    drawing = backend(monkeypatch, exceptions.EngineDeadError()).generate(
        [Request((1,), 0), Request((2,), 1)], SamplingSettings(logprobs=True)
    )
    assert next(drawing) == (0, Completion((7,), "stop", (-0.25,)))
    with pytest.raises(GenerationError, match="vLLM's engine failed"):
        next(drawing)


def test_a_prompt_that_does_not_fit_is_named(monkeypatch):
    failure = ValueError("The decoder prompt (length 600) is longer than the maximum model length of 512.\nmore")
    with pytest.raises(GenerationError, match=r"vLLM refuses a request \(The decoder prompt .* 512\.\)$"):
        next(backend(monkeypatch, failure).generate([Request((1,), 0)], SamplingSettings()))


def test_no_memory_at_the_start(monkeypatch):
    with pytest.raises(ConfigError, match=r"vLLM does not start \(No available memory for the cache blocks\)"):
        backend(monkeypatch, None, RuntimeError("No available memory for the cache blocks"))
