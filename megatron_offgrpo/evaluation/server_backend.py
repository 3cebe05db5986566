"""Sampling and scoring with an OpenAI-compatible server, such as `vllm serve`, through its `/v1/completions`."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from itertools import islice
from typing import Any, TypeVar

from megatron_offgrpo.evaluation.generation import BackendConfig, BackendName, Completion, Request, SamplingSettings
from megatron_offgrpo.openai_server import OpenAiServer

Result = TypeVar("Result")


class ServerBackend:
    """A server that holds the model; a few requests are under way at a time, each with its own seed."""

    name: BackendName = "server"
    batch_size: int | None = None

    def __init__(self, config: BackendConfig) -> None:
        assert config.server_url is not None
        self._concurrency = config.concurrency
        self._server = OpenAiServer(config.server_url, config.timeout_seconds)
        self._client, self._ask, self._odd = self._server.client, self._server.ask, self._server.odd
        self.model = config.server_model or self._server.only_model("--server-model")

    def __enter__(self) -> "ServerBackend":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def generate(self, requests: Sequence[Request], settings: SamplingSettings) -> Iterator[tuple[int, Completion]]:
        """(index of the request, its completion), as they finish."""
        yield from self._in_parallel(lambda request: self._complete(request, settings), requests)

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """log p(token | tokens before) of every token but the first; raw, before temperature and top-p."""
        return [values for _, values in sorted(self._in_parallel(self._score, sequences))]

    def _in_parallel(self, work: Callable[[Any], Result], tasks: Sequence[Any]) -> Iterator[tuple[int, Result]]:
        """Results as they come. After a failure no new task is begun; what was under way is handed out first."""
        waiting = iter(enumerate(tasks))
        failure: BaseException | None = None
        with ThreadPoolExecutor(self._concurrency) as pool:
            running: dict[Future[Result], int] = {
                pool.submit(work, task): index for index, task in islice(waiting, self._concurrency)
            }
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    index = running.pop(future)
                    error = future.exception()
                    if error is None:
                        yield index, future.result()
                    failure = failure or error
                    if failure is None:
                        running |= {pool.submit(work, task): index for index, task in islice(waiting, 1)}
        if failure is not None:
            raise failure

    def _complete(self, request: Request, settings: SamplingSettings) -> Completion:
        answer = self._ask(
            lambda: self._client.completions.create(
                model=self.model,
                prompt=list(request.prompt_ids),
                max_tokens=settings.max_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=request.seed,
                logprobs=0 if settings.logprobs else None,
                extra_body=_extra(settings),
            )
        )
        if not answer.choices:
            raise self._odd("a completion without a choice")
        choice: Any = answer.choices[0]
        stopped = choice.finish_reason == "stop"
        ids = getattr(choice, "token_ids", None)
        if ids is None:
            if settings.logprobs:
                raise self._odd("no token ids, which log-probs need")
            reported = answer.usage.completion_tokens if answer.usage else 0
            # A lone surrogate in the server's JSON would not fit into a UTF-8 file.
            text = (choice.text or "").encode("utf-8", "replace").decode()
            return Completion((), "stop" if stopped else "length", None, text, reported)
        logprobs = None
        if settings.logprobs:
            logprobs = tuple(choice.logprobs.token_logprobs) if choice.logprobs else ()
            if len(logprobs) != len(ids) or None in logprobs:
                raise self._odd(f"{len(logprobs)} log-probs for {len(ids)} tokens")
        return Completion(tuple(ids), "stop" if stopped else "length", logprobs)

    def _score(self, ids: Sequence[int]) -> list[float]:
        answer = self._ask(
            lambda: self._client.completions.create(
                model=self.model, prompt=list(ids), max_tokens=1, extra_body={"prompt_logprobs": 0}
            )
        )
        entries = getattr(answer.choices[0], "prompt_logprobs", None) if answer.choices else None
        if entries is None or len(entries) != len(ids):
            raise self._odd("no log-probs of the prompt")
        return [float(entry[str(token)]["logprob"]) for token, entry in zip(ids[1:], entries[1:], strict=True)]


def _extra(settings: SamplingSettings) -> dict[str, Any]:
    """What else a request holds. All of it is sent: for what is not, a server takes the model's own settings."""
    return {
        **asdict(settings.shaping),
        "top_k": settings.shaping.top_k or -1,  # 0 is not known to every server
        "stop_token_ids": list(settings.stop_token_ids),
        "return_token_ids": True,
        "skip_special_tokens": False,  # thoughts may stand between some
    }
