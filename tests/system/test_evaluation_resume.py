"""An evaluation killed in the middle and started again gives the samples and scores of an undisturbed one."""

import json
import subprocess
import time

import pytest

from megatron_offgrpo.evaluation.evaluate import EvaluationConfig, evaluate, sample_shard
from megatron_offgrpo.evaluation.generation import BackendConfig
from megatron_offgrpo.evaluation.sample_log import Shard
from tests.system.cli import REPOSITORY, command, environment
from tools.base_student import SHIPPED
from tools.word_problems import make_benchmark, write_jsonl

NUM_PROBLEMS, SAMPLES, MAX_TOKENS = 30, 6, 96


def config(benchmark, output):
    return EvaluationConfig(
        model=SHIPPED,
        benchmark=benchmark,
        output=output,
        samples=SAMPLES,
        temperature=1.0,
        top_p=1.0,
        max_tokens=MAX_TOKENS,
        backend=BackendConfig(SHIPPED, "hf"),
        grading_processes=1,
    )


@pytest.fixture(scope="module")
def benchmark_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "benchmark.jsonl"
    write_jsonl(path, make_benchmark(NUM_PROBLEMS, "benchmark", 5))
    return path


@pytest.fixture(scope="module")
def undisturbed(benchmark_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    evaluate(config(benchmark_file, output))
    return output


def check_equal(output, undisturbed):
    for name in ("samples.jsonl", "graded.jsonl"):
        assert (output / name).read_bytes() == (undisturbed / name).read_bytes()
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (output, undisturbed)]
    for one in metrics:
        del one["sampling_seconds"], one["grading_seconds"]
    assert metrics[0] == metrics[1]
    assert not output.with_name(output.name + ".parts").exists()


def test_killed_and_resumed(benchmark_file, undisturbed, tmp_path):
    output = tmp_path / "out"
    arguments = [
        "eval", "--model", SHIPPED, "--benchmark", benchmark_file, "--output", output, "--samples", SAMPLES,
        "--temperature", 1.0, "--top-p", 1.0, "--max-tokens", MAX_TOKENS, "--backend", "hf",
    ]  # fmt: skip
    process = subprocess.Popen(
        command(*arguments), cwd=REPOSITORY, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log = None
    for _ in range(1200):
        log = next(tmp_path.glob("out.parts/*/rest.jsonl"), None)
        if log is not None and log.stat().st_size:
            break
        assert process.poll() is None, "the evaluation ended before it could be killed"
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not output.exists()
    done = len(log.read_bytes().splitlines())
    assert 0 < done < NUM_PROBLEMS * SAMPLES
    # As if the kill had also come in the middle of a line, and of a batch.
    log.write_bytes(log.read_bytes()[:-5000])
    evaluate(config(benchmark_file, output))
    check_equal(output, undisturbed)


def test_shards_and_what_they_leave(benchmark_file, undisturbed, tmp_path):
    output = tmp_path / "out"
    for index in (1, 2):
        sample_shard(config(benchmark_file, output), Shard(index, 3))
    assert not output.exists()
    evaluate(config(benchmark_file, output))
    check_equal(output, undisturbed)
