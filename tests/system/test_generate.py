"""Generated groups go through `offgrpo prepare` into a store whose log-probs are those of its own token ids."""

import json

import numpy as np
import pytest

from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.evaluation.generate import GenerateConfig, generate
from megatron_offgrpo.evaluation.generation import BackendConfig, open_backend
from megatron_offgrpo.evaluation.sample_log import Shard
from tests.system.cli import offgrpo
from tools.base_student import SHIPPED
from tools.word_problems import make_benchmark, write_jsonl

NUM_PROBLEMS, SAMPLES = 12, 4


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    write_jsonl(path, make_benchmark(NUM_PROBLEMS, "benchmark", 7))
    return path


def config(problems, output, **values):
    backend = BackendConfig(SHIPPED, "hf", "fp32")
    return GenerateConfig(SHIPPED, problems, output, samples=SAMPLES, max_tokens=44, backend=backend, **values)


@pytest.fixture(scope="module")
def groups(problems, tmp_path_factory):
    output = tmp_path_factory.mktemp("groups") / "groups"
    counts = generate(config(problems, output, source="teacher", on_policy=True))
    return output, counts


def test_groups_in_our_form(groups):
    output, counts = groups
    lines = [json.loads(line) for line in (output / "groups.jsonl").read_text().splitlines()]
    assert len(lines) == counts["groups"] == NUM_PROBLEMS
    assert counts["samples"] == NUM_PROBLEMS * SAMPLES
    first = lines[0]["trajectories"][0]
    assert (first["source"], first["on_policy"], first["sample_id"]) == ("teacher", True, f"{lines[0]['group_id']}#0")
    solutions = [one for group in lines for one in group["trajectories"]]
    assert len({one["seed"] for one in solutions}) == len(solutions)
    assert counts["truncated"] == sum(one["finish_reason"] == "length" for one in solutions) > 0
    assert sum(counts["logprobs_dropped"].values()) == sum(one["logprobs"] is None for one in solutions)
    manifest = json.loads((output / "manifest.json").read_text())
    assert (manifest["kind"], manifest["counts"]) == ("groups", counts)


def test_shards_and_the_rest_write_the_same_file(groups, problems, tmp_path):
    output = tmp_path / "groups"
    same = config(problems, output, source="teacher", on_policy=True)
    assert generate(same, Shard(0, 2)) == {"samples": NUM_PROBLEMS * SAMPLES}  # one batch of the hf back end
    assert not output.exists()
    assert generate(same) == groups[1]
    assert (output / "groups.jsonl").read_bytes() == (groups[0] / "groups.jsonl").read_bytes()
    before = (output / "groups.jsonl").stat().st_mtime_ns
    assert generate(same) == groups[1]
    assert (output / "groups.jsonl").stat().st_mtime_ns == before


def test_the_store_takes_them_with_the_logprobs_of_its_own_ids(groups, tmp_path):
    source, store_dir = groups[0] / "groups.jsonl", tmp_path / "store"
    offgrpo(
        "prepare", "--input", source, "--tokenizer", SHIPPED, "--output", store_dir,
        "--trajectories-per-group", SAMPLES, cwd=tmp_path,
    )  # fmt: skip
    store = TrajectoryStore.open(store_dir)
    lines = {one["group_id"]: one for one in map(json.loads, source.read_text().splitlines())}
    rows = [(group, store.row(group)) for group in range(store.num_groups)]
    checked = 0
    with open_backend(BackendConfig(SHIPPED, "hf", "fp32")) as backend:
        for _, row in rows:
            given = {one["sample_id"]: one for one in lines[row.group_id]["trajectories"]}
            scored = backend.logprobs([[*row.prompt_ids, *ids] for ids in row.response_ids])
            for name, ids, mu, logprobs in zip(
                row.sample_ids, row.response_ids, row.behaviour_logprobs, scored, strict=True
            ):
                sampled = given[name]
                assert (mu is None) == (sampled["logprobs"] is None)
                if mu is None:
                    continue
                # Every token has been sampled: a cut response gets no EOS.
                assert len(mu) == len(ids) == len(sampled["logprobs"])
                np.testing.assert_allclose(mu, logprobs[len(row.prompt_ids) - 1 :], atol=1e-4)
                checked += 1
    assert checked > NUM_PROBLEMS
