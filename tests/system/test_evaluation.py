"""vLLM, in process and as a server, and Hugging Face on the shipped base student: the same tokens and log-probs."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
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
    Shaping,
    open_backend,
    seed_of,
    stop_token_ids,
)
from megatron_offgrpo.evaluation.prompts import encode_prompt
from tests.system.backend_probe import MAX_TOKENS, SHAPED, ids_of
from tests.system.cli import offgrpo
from tools.base_student import SHIPPED
from tools.word_problems import make_benchmark, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
NUM_PROBLEMS = 32
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


MEDDLING = {
    "eos_token_id": 1,
    "do_sample": True,
    "temperature": 0.1,
    "top_k": 1,
    "top_p": 0.1,
    "min_p": 0.9,
    "repetition_penalty": 3.0,
    "num_beams": 3,
    "min_new_tokens": 90,
    "suppress_tokens": [16, 17, 18, 19, 20],
    "no_repeat_ngram_size": 2,
    "max_new_tokens": 7,
    "max_time": 0.001,
    "stop_strings": ["So"],
    "num_return_sequences": 2,
}
"""A generation_config.json of which nothing but the end token may count."""


def meddled(folder, generation=MEDDLING, **config):
    """The base student with another generation_config.json, and with values for config.json."""
    shutil.copytree(SHIPPED, folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))
    return folder


def probe(name, folder, model=SHIPPED):
    """The back end's answers, and what it wrote to standard error."""
    benchmark = folder / "benchmark.jsonl"
    write_jsonl(benchmark, make_benchmark(NUM_PROBLEMS, "benchmark", 5))
    command = [sys.executable, "-m", "tests.system.backend_probe", name, model, benchmark, folder / name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return probe("hf", tmp_path_factory.mktemp("hf"))[0]


@pytest.fixture(scope="module")
def vllm_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    return probe("vllm", folder, meddled(folder / "model"))


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


def check_shaped(found, greedy):
    assert found["top_k"] == found["min_p"] == greedy
    for name in ("repetition", "presence", "frequency", "all"):
        assert found[name] != greedy


def test_what_shapes_the_probabilities(hf):
    check_shaped(hf["shaped"], hf["greedy"])


@needs_vllm
def test_penalties_mean_the_same(hf, vllm):
    assert vllm["shaped"] == hf["shaped"]


def completions_of(model, settings, problems):
    tokenizer = load_tokenizer(model)
    requests = [Request(encode_prompt(tokenizer, one["problem"], None), 0) for one in problems]
    with open_backend(BackendConfig(model, "hf", "fp32")) as backend:
        found = dict(backend.generate(requests, replace(settings, stop_token_ids=stop_token_ids(model, tokenizer))))
    return [(list(found[index].token_ids), found[index].finish_reason) for index in range(len(found))]


@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(0.0, 1.0, MAX_TOKENS),
        SamplingSettings(1.0, 0.9, MAX_TOKENS, shaping=Shaping(top_k=20, repetition_penalty=1.1)),
    ],
)
def test_nothing_of_the_models_own_settings_counts_with_hf(hf, tmp_path, settings):
    problems = make_benchmark(4, "benchmark", 5)
    plain = completions_of(SHIPPED, settings, problems)
    assert completions_of(meddled(tmp_path / "all"), settings, problems) == plain
    # Settings that older models keep in config.json.
    old = meddled(tmp_path / "old", None, repetition_penalty=3.0, top_k=1, num_beams=3, do_sample=True)
    assert completions_of(old, settings, problems) == plain


def test_end_tokens_that_only_config_json_names(hf, tmp_path):
    """The student's ordinary end is no end token of the tokenizer's here; without config.json it would go on."""
    problems = make_benchmark(4, "benchmark", 5)
    model = meddled(tmp_path / "model", None, eos_token_id=[0, 2])
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|endoftext|>"}))
    template = load_tokenizer(model).chat_template.replace("<|im_end|>", "")
    (model / "chat_template.jinja").write_text(template)
    assert stop_token_ids(model, load_tokenizer(model)) == (0, 2)
    found = completions_of(model, SamplingSettings(0.0, 1.0, MAX_TOKENS), problems)
    assert [reason for _, reason in found] == ["stop"] * 4
    (model / "config.json").write_text((model / "config.json").read_text().replace("[0, 2]", "0"))
    assert stop_token_ids(model, load_tokenizer(model)) == (0,)
    found = completions_of(model, SamplingSettings(0.0, 1.0, MAX_TOKENS), problems)
    assert all(reason == "length" for _, reason in found)


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
    """`vllm serve` on the CPU, of a model with settings of its own, as (process, address)."""
    model = meddled(tmp_path_factory.mktemp("served") / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The `vllm` command wants a distribution of that name; this module is what it runs.
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--dtype", "float32",
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
    for name, (temperature, shaping) in SHAPED.items():
        settings = SamplingSettings(temperature, 1.0, MAX_TOKENS, stop, shaping=shaping)
        assert ids_of(completions(address, questions, settings)[1].items()) == hf["shaped"][name], name
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


@needs_vllm
def test_nothing_of_vllm_reaches_the_terminal(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", make_benchmark(2, "benchmark", 0))
    settings = ["--samples", 1, "--max-tokens", 8, "--backend", "vllm", "--output", tmp_path / "out"]
    said = offgrpo("eval", "--model", SHIPPED, "--benchmark", tmp_path / "b.jsonl", *settings, cwd=tmp_path).stderr
    lines = said.splitlines()
    assert lines[0].startswith("evaluating ")
    assert [line for line in lines if not line.startswith(("evaluating ", "sampling: ", "grading: "))] == []
