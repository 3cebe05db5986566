"""The sampling core: what is drawn, in which pieces, and what a failure leaves."""

from pathlib import Path

import pytest

from megatron_offgrpo.errors import ConfigError, GenerationError
from megatron_offgrpo.evaluation import sampling
from megatron_offgrpo.evaluation.generation import BackendConfig, Completion, SamplingSettings, seed_of
from megatron_offgrpo.evaluation.sample_log import LogWriter, SampleLogs, Shard
from megatron_offgrpo.evaluation.sampling import LazyBackend, SamplingRun, draw_samples

PROMPTS = {"a": (1, 2, 3), "b": (4,), "c": (5, 6), "d": (7,), "e": (8, 8)}


class Echo:
    """Answers with the seed; remembers what it was asked, and in which batches where it has them."""

    def __init__(self, batch_size=None, fail_after=None):
        self.batch_size, self.fail_after, self.asked, self.closed = batch_size, fail_after, [], 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed += 1

    def generate(self, requests, settings):
        self.asked.append([request.seed for request in requests])
        for index, request in enumerate(requests):
            if index == self.fail_after:
                raise GenerationError("the server does not answer", remedy="start it")
            yield index, Completion((request.seed, len(request.prompt_ids)), "stop")


@pytest.fixture
def lazy(monkeypatch):
    def make(**values):
        echo = Echo(**values)
        monkeypatch.setattr(sampling, "open_backend", lambda _: echo)
        return LazyBackend(BackendConfig(Path("m"))), echo

    return make


def run(folder, batch_size=None, samples=3):
    return SamplingRun(PROMPTS, samples, 0, SamplingSettings(), batch_size, folder)


def describe(key, done):
    return {"ids": list(done.token_ids)}


def contents(run_, logs):
    return [logs.read(key) for key in run_.all_keys()]


def test_every_sample_has_its_seed_whatever_the_back_end(tmp_path, lazy):
    backend, echo = lazy()
    one = run(tmp_path)
    logs = draw_samples(one, backend, describe)
    assert [(r["problem_id"], r["sample_id"], r["seed"]) for r in contents(one, logs)] == [
        (name, k, seed_of(0, name, k)) for name in PROMPTS for k in range(3)
    ]
    assert contents(one, logs)[0]["ids"] == [seed_of(0, "a", 0), 3]
    assert len(echo.asked) == 1


def test_only_what_is_missing_is_drawn(tmp_path, lazy):
    with LogWriter(tmp_path, None) as writer:
        writer.add({"problem_id": "b", "sample_id": 1, "seed": -1})
    backend, echo = lazy()
    draw_samples(run(tmp_path), backend, describe)
    assert len(echo.asked[0]) == 14
    assert seed_of(0, "b", 1) not in echo.asked[0]
    assert SampleLogs(tmp_path).read(("b", 1))["seed"] == -1


def test_nothing_missing_opens_no_back_end(tmp_path, lazy):
    draw_samples(run(tmp_path), lazy()[0], describe)
    backend, echo = lazy()
    draw_samples(run(tmp_path), backend, describe)
    assert echo.asked == []


@pytest.mark.parametrize("batch_size", [None, 4])
def test_shards_and_the_rest_give_what_one_process_gives(tmp_path, lazy, batch_size):
    whole = run(tmp_path / "whole", batch_size)
    expected = contents(whole, draw_samples(whole, lazy(batch_size=batch_size)[0], describe))
    cut = run(tmp_path / "cut", batch_size)
    for index in (2, 0):
        draw_samples(cut, lazy(batch_size=batch_size)[0], describe, Shard(index, 3))
    assert {path.name for path in cut.parts.iterdir()} == {"shard-0-of-3.jsonl", "shard-2-of-3.jsonl"}
    backend, echo = lazy(batch_size=batch_size)
    assert contents(cut, draw_samples(cut, backend, describe)) == expected
    assert len(echo.asked[0]) == (6 if batch_size is None else 4)


def test_a_shard_takes_every_nth_problem(tmp_path, lazy):
    logs = draw_samples(run(tmp_path), lazy()[0], describe, Shard(1, 2))
    assert [name for name in PROMPTS if (name, 0) in logs] == ["b", "d"]


def test_batches_are_the_same_for_every_cut_and_resume(tmp_path, lazy):
    # 15 requests sorted by the length of the prompt: b, d (1 token), c, e (2 tokens), a (3 tokens), in fours.
    one = run(tmp_path, batch_size=4)
    units = [[wanted.key for wanted in unit] for unit in one.units()]
    order = [(name, k) for name in "bdcea" for k in range(3)]
    assert units == [order[0:4], order[4:8], order[8:12], order[12:15]]
    # One sample of the second batch is there: the whole batch is computed again, and its other three are logged.
    with LogWriter(tmp_path, None) as writer:
        for key in [*units[0], units[1][2]]:
            writer.add({"problem_id": key[0], "sample_id": key[1], "seed": -1})
    backend, echo = lazy(batch_size=4)
    logs = draw_samples(one, backend, describe)
    assert echo.asked[0] == [seed_of(0, *key) for unit in units[1:] for key in unit]
    assert logs.read(units[1][2])["seed"] == -1
    assert len((tmp_path / "rest.jsonl").read_text().splitlines()) == 15


def test_a_failure_keeps_what_came_before_and_says_how_to_go_on(tmp_path, lazy):
    backend, _ = lazy(fail_after=4)
    with pytest.raises(
        GenerationError, match=r"after 4 of 15 samples: the server does not answer; remedy: start it;.*goes"
    ):
        draw_samples(run(tmp_path), backend, describe)
    assert len(SampleLogs(tmp_path)) == 4


def test_the_rest_waits_for_a_running_shard(tmp_path, lazy):
    with LogWriter(tmp_path, Shard(0, 2)), pytest.raises(ConfigError, match="another process"):
        draw_samples(run(tmp_path), lazy()[0], describe)


def test_a_shared_back_end_is_opened_and_closed_once(tmp_path, lazy):
    backend, echo = lazy()
    with backend:
        draw_samples(run(tmp_path / "one"), backend, describe)
        draw_samples(run(tmp_path / "two"), backend, describe)
    assert (len(echo.asked), echo.closed) == (2, 1)
