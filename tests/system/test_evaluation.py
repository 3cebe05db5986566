"""vLLM, in process and as a server, and Hugging Face on the shipped base student: the same tokens and log-probs."""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from megatron_offgrpo import openai_server
from megatron_offgrpo.data.tokenisation import load_tokenizer
from megatron_offgrpo.errors import GenerationError
from megatron_offgrpo.evaluation.benchmarks import load_benchmark
from megatron_offgrpo.evaluation.generation import (
    BackendConfig,
    Request,
    SamplingSettings,
    open_backend,
    seed_of,
    stop_token_ids,
)
from megatron_offgrpo.evaluation.prompts import encode_prompt
from tests.system.backend_probe import MAX_TOKENS
from tools.base_student import SHIPPED
from tools.word_problems import make_benchmark, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
NUM_PROBLEMS = 32
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def probe(name, folder):
    """The back end's answers, and what it wrote to standard error."""
    benchmark = folder / "benchmark.jsonl"
    write_jsonl(benchmark, make_benchmark(NUM_PROBLEMS, "benchmark", 5))
    command = [sys.executable, "-m", "tests.system.backend_probe", name, SHIPPED, benchmark, folder / name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return probe("hf", tmp_path_factory.mktemp("hf"))[0]


@pytest.fixture(scope="module")
def vllm_run(tmp_path_factory):
    return probe("vllm", tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="module")
def vllm(vllm_run):
    return vllm_run[0]


def check_one_backend(found):
    assert found["reasons"] == ["stop"] * NUM_PROBLEMS
    assert found["cut"] == [[5, "length"]] * 4
    # At temperature 2 the responses are half noise, and yet no id beyond the tokenizer is drawn.
    drawn = [token for ids in found["seeded"] for token in ids]
    assert max(drawn) < found["vocabulary"]
    assert len(set(drawn)) > 60
    # The seed alone decides, not what else is in the batch or its order.
    assert found["backwards"] == found["seeded"][::-1][:7]
    assert found["metrics"]["problems"] == NUM_PROBLEMS
    assert found["metrics"]["truncated_share"] == 0
    low, high = found["metrics"]["ci95"]
    assert low <= found["metrics"]["accuracy"] <= high
    # The base student is right about half of the time: 0.5 and four standard errors of 64 samples.
    assert 0.25 < found["metrics"]["accuracy"] < 0.75


def test_hf(hf):
    check_one_backend(hf)
    assert hf["metrics"]["backend"] == "hf"


@needs_vllm
def test_vllm(vllm_run):
    found, done = vllm_run
    check_one_backend(found)
    assert found["metrics"]["backend"] == "vllm"
    for noise in ("INFO", "WARNING", "FutureWarning", "Triton", "Loading"):
        assert noise not in done.stderr + done.stdout


@needs_vllm
def test_greedy_tokens_are_equal(hf, vllm):
    assert vllm["greedy"] == hf["greedy"]


@needs_vllm
def test_logprobs_are_equal(hf, vllm):
    for ours, theirs, ids in zip(vllm["logprobs"], hf["logprobs"], hf["greedy"], strict=True):
        assert len(ours) == len(theirs)
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
        # A greedy token is the most probable one of its position.
        assert min(ours[-len(ids) :]) > np.log(1 / 421)


@needs_vllm
def test_both_measure_the_same_accuracy(hf, vllm):
    # Different random numbers, 64 samples each: within four standard errors of a difference at p = 1/2.
    assert abs(hf["metrics"]["accuracy"] - vllm["metrics"]["accuracy"]) < 4 * (2 * 0.25 / (2 * NUM_PROBLEMS)) ** 0.5


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """`vllm serve` on the CPU, as (process, address)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The `vllm` command wants a distribution of that name; this module is what it runs.
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", SHIPPED, "--dtype", "float32",
        "--enforce-eager", "--kv-cache-memory-bytes", 128 << 20, "--no-enable-chunked-prefill", "--port", port,
        "--host", "127.0.0.1", "--max-model-len", 512,
    ]  # fmt: skip
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            list(map(str, command)),
            env={**os.environ, **settings},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}/health", log)
        yield process, f"http://127.0.0.1:{port}/v1"
    finally:
        # The engine is a process of its own, and outlives a server that is killed.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)


def wait_until_ready(process, address, log, seconds=280):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"the server is not ready after {seconds} s\n{log.read_text()[-3000:]}")


def completions(address, questions, settings, **values):
    requests = [
        Request(encode_prompt(load_tokenizer(SHIPPED), one.problem, None), seed_of(0, one.problem_id, 0))
        for one in questions
    ]
    with open_backend(BackendConfig(SHIPPED, "server", server_url=address, **values)) as backend:
        return requests, dict(backend.generate(requests, settings))


@needs_vllm
def test_server_draws_what_the_engine_in_process_draws(server, hf, vllm, tmp_path, monkeypatch):
    process, address = server
    write_jsonl(tmp_path / "b.jsonl", make_benchmark(NUM_PROBLEMS, "benchmark", 5))
    questions = load_benchmark(tmp_path / "b.jsonl")
    stop = stop_token_ids(SHIPPED, load_tokenizer(SHIPPED))
    requests, greedy = completions(address, questions, SamplingSettings(0.0, 1.0, MAX_TOKENS, stop))
    assert [list(greedy[index].token_ids) for index in range(NUM_PROBLEMS)] == hf["greedy"]
    _, seeded = completions(address, questions, SamplingSettings(2.0, 1.0, MAX_TOKENS, stop, logprobs=True))
    assert [list(seeded[index].token_ids) for index in range(NUM_PROBLEMS)] == vllm["seeded"]
    with open_backend(BackendConfig(SHIPPED, "server", server_url=address)) as backend:
        whole = [[*requests[index].prompt_ids, *seeded[index].token_ids] for index in range(3)]
        for index, scored in enumerate(backend.logprobs(whole)):
            # Log-probs of the sampled tokens are those of the model itself, not of temperature 2.
            np.testing.assert_allclose(scored[-len(seeded[index].token_ids) :], seeded[index].logprobs, atol=1e-4)
    monkeypatch.setattr(openai_server, "RETRIES", 0)
    with open_backend(BackendConfig(SHIPPED, "server", server_url=address, concurrency=2)) as backend:
        drawing = backend.generate(requests, SamplingSettings(2.0, 1.0, MAX_TOKENS, stop))
        next(drawing)
        process.send_signal(signal.SIGKILL)
        with pytest.raises(GenerationError, match=r"does not answer|refuses"):
            list(drawing)
