"""A connection to an OpenAI-compatible server, with errors that say what to do."""

import os
from collections.abc import Callable
from typing import TypeVar

from megatron_offgrpo.errors import ConfigError, GenerationError

RETRIES = 5
"""A request is sent again so often if it meets a refused connection, a time-out, 408, 409, 429 or a 5xx status.

Waits grow up to 8 s.
"""
Result = TypeVar("Result")


class ServerGone(GenerationError):
    """The server does not answer at all."""


class OpenAiServer:
    """The client of the openai package for one address.

    Args:
        url: `http://HOST:PORT/v1`.
        timeout_seconds: longest wait for one answer.
    """

    def __init__(self, url: str, timeout_seconds: float) -> None:
        import openai

        self._openai = openai
        self.url = url
        self.client = openai.OpenAI(
            base_url=url,
            api_key=os.environ.get("OPENAI_API_KEY", "none"),  # a server without keys takes any
            max_retries=RETRIES,
            timeout=openai.Timeout(timeout_seconds, connect=10.0),
        )

    def only_model(self, option: str) -> str:
        """The name of the one model that it serves.

        Args:
            option: which names one.

        Raises:
            ConfigError: there are several, or none.
            GenerationError: as for `ask`.
        """
        served = [one.id for one in self.ask(lambda: self.client.models.list().data)]
        if len(served) != 1:
            raise ConfigError(
                "cannot choose the server's model",
                where=self.url,
                expected="one model",
                got=", ".join(served) or "none",
                remedy=f"name it with {option}",
            )
        return served[0]

    def ask(self, call: Callable[[], Result]) -> Result:
        """What `call` gets from the client.

        Raises:
            ServerGone: no connection, or no answer in time, after the retries.
            GenerationError: the server refuses, or its answer has another form.
        """
        try:
            return call()
        except self._openai.APIStatusError as cause:
            raise GenerationError(
                f"the server refuses a request ({_short(cause.message)})",
                where=self.url,
                got=f"status {cause.status_code}",
                remedy="see the server's log",
            ) from None
        except self._openai.APIConnectionError as cause:  # time-outs are of this kind
            reason = _short(str(cause.__cause__ or cause))
            raise ServerGone(
                f"the server does not answer, {RETRIES + 1} tries ({reason})",
                where=self.url,
                remedy="start the server again (for example `vllm serve MODEL`)",
            ) from None
        except (self._openai.APIError, ValueError) as cause:
            raise self.odd(f"an answer that is no completion ({_short(str(cause))})") from None

    def odd(self, what: str) -> GenerationError:
        """The error for an answer of another form."""
        return GenerationError(
            f"the server sent {what}", where=self.url, expected="an OpenAI-compatible server such as `vllm serve`"
        )


def _short(text: str) -> str:
    return " ".join(text.split())[:200]
