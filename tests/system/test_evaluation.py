"""vLLM and Hugging Face on the shipped base student: the same greedy tokens, log-probs and accuracy."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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
