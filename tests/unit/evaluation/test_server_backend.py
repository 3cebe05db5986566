"""The server back end against a small HTTP server that answers, refuses, breaks off or is not there."""

import json
import socket
import threading
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from megatron_offgrpo import openai_server
from megatron_offgrpo.errors import ConfigError, GenerationError
from megatron_offgrpo.evaluation.generation import (
    BackendConfig,
    Completion,
    Request,
    SamplingSettings,
    Shaping,
    open_backend,
)

SETTINGS = SamplingSettings(0.6, 0.95, 32, (2,), logprobs=True)


def choice(request, **values):
    """What vLLM answers: the seed as token, then an end token."""
    given = {"index": 0, "text": "t", "finish_reason": "stop", "token_ids": [request["seed"], 2], **values}
    if request.get("logprobs") is not None:
        given.setdefault("logprobs", {"token_logprobs": [-0.5, -0.25], "tokens": ["a", "b"], "text_offset": [0, 1]})
    return given


def completion(*choices):
    usage = {"prompt_tokens": 1, "completion_tokens": 9, "total_tokens": 10}
    return 200, {"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": choices, "usage": usage}


class ScriptedServer:
    """A server on a free port; `answer(request, number)` makes status and body."""

    def __init__(self):
        self.requests, self.models, self.answer = [], ["m"], lambda request, number: completion(choice(request))
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                """Requests are not logged."""

            def reply(self, status, body):
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self):
                entries = [{"id": name, "object": "model", "created": 1, "owned_by": "x"} for name in scripted.models]
                self.reply(200, {"object": "list", "data": entries})

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                scripted.requests.append(request)
                answered = scripted.answer(request, len(scripted.requests))
                if answered is None:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                else:
                    self.reply(*answered)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(openai_server, "RETRIES", 1)
    scripted = ScriptedServer()
    yield scripted
    scripted.server.shutdown()
    scripted.server.server_close()


def backend(scripted, **values):
    return open_backend(BackendConfig(Path("m"), "server", server_url=scripted.url, **{"concurrency": 2, **values}))


def requests(count):
    return [Request((5, 6), 100 + index) for index in range(count)]


def collect(server, found):
    for index, done in server.generate(requests(50), SETTINGS):
        found[index] = done


def test_settings_seeds_and_stop_tokens_reach_the_server(scripted):
    with backend(scripted) as server:
        found = dict(server.generate(requests(5), SETTINGS))
    assert found == {index: Completion((100 + index, 2), "stop", (-0.5, -0.25)) for index in range(5)}
    sent = scripted.requests[0]
    assert {name: sent[name] for name in ("model", "prompt", "max_tokens", "temperature", "top_p", "logprobs")} == {
        "model": "m",
        "prompt": [5, 6],
        "max_tokens": 32,
        "temperature": 0.6,
        "top_p": 0.95,
        "logprobs": 0,
    }
    assert (sent["stop_token_ids"], sent["return_token_ids"], sent["skip_special_tokens"]) == ([2], True, False)
    # What is not sent would be the model's own: neutral values are said as well.
    neutral = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert {name: sent[name] for name in neutral} == neutral
    assert {request["seed"] for request in scripted.requests} == {100, 101, 102, 103, 104}


def test_whatever_shapes_the_probabilities_reaches_the_server(scripted):
    shaping = Shaping(5, 0.1, 1.2, 0.3, 0.4)
    with backend(scripted) as server:
        list(server.generate(requests(1), replace(SETTINGS, shaping=shaping)))
    assert {name: scripted.requests[0][name] for name in asdict(shaping)} == asdict(shaping)


def test_cut_and_empty_completions(scripted):
    def answer(request, number):
        if request["seed"] == 100:
            return completion(choice(request, finish_reason="length"))
        return completion(choice(request, token_ids=[], text="", logprobs={"token_logprobs": [], "tokens": []}))

    scripted.answer = answer
    with backend(scripted) as server:
        found = dict(server.generate(requests(2), SETTINGS))
    assert (found[0].finish_reason, found[1]) == ("length", Completion((), "stop", ()))


def test_a_server_without_token_ids_serves_evaluation_and_not_logprobs(scripted):
    scripted.answer = lambda request, number: completion(choice(request, token_ids=None, text="so 4 \ud800"))
    with backend(scripted) as server:
        (found,) = dict(server.generate(requests(1), SamplingSettings())).values()
        assert (found.text, found.num_tokens, found.token_ids) == ("so 4 ?", 9, ())
        with pytest.raises(GenerationError, match="no token ids, which log-probs need"):
            dict(server.generate(requests(1), SETTINGS))


def test_passing_trouble_is_tried_again(scripted):
    scripted.answer = lambda request, number: (503, {"error": "busy"}) if number == 1 else completion(choice(request))
    with backend(scripted) as server:
        assert len(dict(server.generate(requests(3), SETTINGS))) == 3
    assert len(scripted.requests) == 4


def test_a_server_that_dies_hands_out_what_was_finished(scripted):
    scripted.answer = lambda request, number: completion(choice(request)) if number <= 3 else None
    found = {}
    with (
        backend(scripted, concurrency=1) as server,
        pytest.raises(GenerationError, match=r"does not answer, 2 tries") as error,
    ):
        collect(server, found)
    assert sorted(found) == [0, 1, 2]
    assert len(scripted.requests) == 5  # three answered, one tried twice, none begun after it
    assert scripted.url in str(error.value)
    assert "start the server again" in str(error.value)


def test_no_server_at_all(monkeypatch):
    monkeypatch.setattr(openai_server, "RETRIES", 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(GenerationError, match=r"does not answer, 1 tries .*refused"):
        open_backend(BackendConfig(Path("m"), "server", server_url=url))


def test_a_hanging_server_is_given_up(scripted):
    released = threading.Event()
    scripted.answer = lambda request, number: released.wait(20) and None
    with backend(scripted, timeout_seconds=0.2) as server, pytest.raises(GenerationError, match="does not answer"):
        dict(server.generate(requests(1), SETTINGS))
    released.set()


@pytest.mark.parametrize(
    ("answered", "message"),
    [
        ((400, {"error": {"message": "prompt is too long"}}), r"refuses a request \(.*too long.*status 400"),
        ((404, {"error": {"message": "no such model"}}), "no such model"),
        (completion(), "a completion without a choice"),
        ((200, b"<html>"), "server sent"),
        (
            completion({"index": 0, "text": "t", "finish_reason": "stop", "token_ids": [1, 2]}),
            "0 log-probs for 2 tokens",
        ),
    ],
)
def test_odd_answers_are_named(scripted, answered, message):
    scripted.answer = lambda request, number: answered
    with backend(scripted) as server, pytest.raises(GenerationError, match=message):
        dict(server.generate(requests(1), SETTINGS))


def test_the_model_must_be_clear(scripted):
    scripted.models = ["m", "n"]
    with pytest.raises(ConfigError, match=r"expected one model; got m, n; remedy: name it with --server-model"):
        backend(scripted)
    with backend(scripted, server_model="n") as server:
        dict(server.generate(requests(1), SETTINGS))
    assert scripted.requests[0]["model"] == "n"


def test_logprobs_of_a_prompt(scripted):
    def answer(request, number):
        entries = [None, *({str(token): {"logprob": -token / 10}} for token in request["prompt"][1:])]
        return completion(choice({"seed": 0}, prompt_logprobs=entries))

    scripted.answer = answer
    with backend(scripted) as server:
        assert server.logprobs([[3, 1, 2], [4, 5]]) == [[-0.1, -0.2], [-0.5]]
    scripted.answer = lambda request, number: completion(choice({"seed": 0}))
    with backend(scripted) as server, pytest.raises(GenerationError, match="no log-probs of the prompt"):
        server.logprobs([[3, 1]])


@pytest.mark.parametrize("values", [{"backend": "server"}, {"backend": "hf", "server_url": "http://x/v1"}])
def test_server_and_address_go_together(values):
    with pytest.raises(ConfigError, match="go together"):
        open_backend(BackendConfig(Path("m"), **values))
