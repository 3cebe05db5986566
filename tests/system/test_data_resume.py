"""Parts: the store does not depend on workers, shards, or how often the command was killed."""

import json
import os
import random
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_offgrpo.data import readers
from megatron_offgrpo.data.part_files import PartFolder
from megatron_offgrpo.data.part_worker import PartWorker
from megatron_offgrpo.data.prepare import prepare, prepare_shard
from megatron_offgrpo.data_config import FilterConfig, PrepareConfig
from megatron_offgrpo.errors import ConfigError, DataError, OffgrpoError
from tests.system.cli import command, environment
from tests.unit.data.tiny import group, save_tokenizer, write_lines

NUM_GROUPS = 1500
"""Six parts: more than are done in one process."""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    save_tokenizer(folder / "tokenizer")
    generator = random.Random(0)
    records = []
    for index in range(NUM_GROUPS):
        problem = " ".join(generator.choices([f"word{number}" for number in range(500)], k=25))
        if index % 40 == 7:
            problem = records[index - 5]["problem"] + (" once more" if index % 80 == 7 else "")
        texts = [f"{generator.random()} \\boxed{{{generator.choice('12')}}}" for _ in range(2)]
        rewards = [{"text": text, "reward": int("{2}" in text)} for text in texts]
        records.append(group(f"g{index if index != 600 else 3}", problem) | {"trajectories": rewards})
    records[100] = "{"
    return PrepareConfig(
        inputs=(str(write_lines(folder / "in.jsonl.gz", records)),),
        tokenizer=str(folder / "tokenizer"),
        output=str(folder / "store"),
        labels=("given",),
        workers=1,
        validation_share=0.1,
        filters=FilterConfig(duplicate_problems=True, near_duplicates=0.8),
    )


@pytest.fixture(scope="module")
def undisturbed(config):
    return prepare(config)


def lists(store):
    return [(store.path / name).read_text() for name in ("rejected.jsonl", "removed.jsonl", "disagreements.jsonl")]


def same(store, other):
    assert store.manifest.fingerprint == other.manifest.fingerprint
    assert store.manifest.counts == other.manifest.counts
    assert store.table.equals(other.table)
    assert lists(store) == lists(other)


def test_what_the_undisturbed_run_left_out(undisturbed):
    counts = undisturbed.manifest.counts
    assert counts["rejected"] == {"duplicated group id": 1, "malformed JSON": 1}
    # 38 indices are 7 modulo 40; every second of them is an exact copy, the others two words longer.
    assert counts["removed"] == {"duplicate problem": 19, "near-duplicate problem": 19}
    assert counts["groups"]["total"] == NUM_GROUPS - 40
    assert counts["validation_groups"] == round(0.1 * (NUM_GROUPS - 40)) == undisturbed.validation_groups.sum()
    stages = {one["stage"]: one["groups"] for one in counts["stages"]}
    assert stages == {
        "read": 1499, "decontaminated": 1499, "labelled": 1499, "trajectories_filtered": 1499, "groups_filtered": 1499,
        "selected": 1499, "tokenised": 1499, "unique_ids": 1498, "unique_problems": 1479, "no_near_duplicates": 1460,
        "all_positive_limited": 1460,
    }  # fmt: skip
    assert not Path(f"{undisturbed.path}.parts").exists()


def test_workers_and_shards_change_nothing(config, undisturbed, tmp_path):
    same(prepare(replace(config, output=str(tmp_path / "workers"), workers=2)), undisturbed)
    cut = replace(config, output=str(tmp_path / "cut"))
    assert prepare_shard(cut, (2, 4)).startswith("shard 2/4: 1 new parts, 6 in all")
    assert prepare_shard(cut, (2, 4)).startswith("shard 2/4: 0 new parts, 6 in all")
    assert prepare_shard(cut, (1, 4)).startswith("shard 1/4: 2 new parts")
    assert not (tmp_path / "cut").exists()
    same(prepare(cut), undisturbed)
    assert "is finished" in prepare_shard(cut, (0, 4))
    with pytest.raises(ConfigError, match="no such shard"):
        prepare_shard(cut, (4, 4))


def test_parts_serve_another_split_and_not_another_input(config, tmp_path, monkeypatch):
    cut = replace(config, output=str(tmp_path / "store"))
    for shard in range(2):
        prepare_shard(cut, (shard, 2))
    done = []
    monkeypatch.setattr(PartWorker, "work", lambda self, part: done.append(part))
    prepare(replace(cut, validation_share=0.2, filters=FilterConfig(near_duplicates=0.7)))
    assert done == []


def kill_when(config: PrepareConfig, num_parts: int, workers: int) -> int:
    """Starts `offgrpo prepare`, kills it as soon as so many parts are finished; how many were at the end."""
    arguments = ["--input", config.inputs[0], "--tokenizer", config.tokenizer, "--output", config.output]
    options = ["--label", "given", "--validation-share", "0.1", "--near-duplicates", "0.8", "--drop-duplicate-problems"]
    process = subprocess.Popen(
        command("prepare", *arguments, *options, "--workers", str(workers)),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    parts = Path(f"{config.output}.parts")
    while process.poll() is None and len(list(parts.glob("*/part-*.json"))) < num_parts:
        time.sleep(0.02)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while _group_alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _group_alive(process.pid), "a worker outlived the command"
    return len(list(parts.glob("*/part-*.json")))


def _group_alive(group_id: int) -> bool:
    try:
        os.killpg(group_id, 0)
    except ProcessLookupError:
        return False
    return True


def test_killed_again_and_again_it_ends_with_the_same_store(config, undisturbed, tmp_path):
    cut = replace(config, output=str(tmp_path / "store"))
    parts = Path(f"{cut.output}.parts")
    first, second = kill_when(cut, 1, workers=2), kill_when(cut, 4, workers=1)
    assert 1 <= first <= 3
    assert 4 <= second <= 6
    # Whatever was left half-written is of no consequence.
    (folder,) = parts.glob("*")
    (folder / "part-000001.123.tmp").write_bytes(b"torn")
    for number in range(6):
        if not (folder / f"part-{number:06d}.json").exists():
            (folder / f"part-{number:06d}.arrow").write_bytes(b"torn, and without its notes")
    same(prepare(cut), undisturbed)
    assert not parts.exists()


def test_a_stop_while_merging_is_made_good(config, undisturbed, tmp_path, monkeypatch):
    from megatron_offgrpo.data import prepare as stage

    cut = replace(config, output=str(tmp_path / "store"))

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stage.os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(cut)
    assert not (tmp_path / "store").exists()
    same(prepare(cut), undisturbed)


def test_a_worker_that_dies_is_one_clear_error_and_its_parts_stay(config, tmp_path, monkeypatch):
    from megatron_offgrpo.data import part_runner

    cut = replace(config, output=str(tmp_path / "store"), workers=2)
    monkeypatch.setattr(part_runner, "_serve", die_at_the_second_part)
    with pytest.raises(OffgrpoError, match=r"a worker process ended by itself.*-9.*fewer --workers"):
        prepare(cut)


def die_at_the_second_part(connection, config, folder):
    connection.recv()
    connection.send(None)
    connection.recv()
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_error_in_a_worker_is_the_one_it_met(config, tmp_path, monkeypatch):
    from megatron_offgrpo.data import part_runner

    monkeypatch.setattr(part_runner, "_serve", fail_in_the_worker)
    with pytest.raises(DataError, match=r"^bench.jsonl:1: wrong; expected a; got b; remedy: c$"):
        prepare(replace(config, output=str(tmp_path / "store"), workers=2))


def test_a_full_disk_is_one_clear_error_and_finished_parts_stay(config, undisturbed, tmp_path, monkeypatch):
    cut = replace(config, output=str(tmp_path / "store"))
    write = PartFolder.write

    def full_at_the_third(self, part, result, **options):
        if part == 2:
            raise OSError(28, "No space left on device")
        write(self, part, result, **options)

    with monkeypatch.context() as patched:
        patched.setattr(PartFolder, "write", full_at_the_third)
        with pytest.raises(OffgrpoError, match=r"the file system refuses.*No space left.*finished parts are kept"):
            prepare(cut)
    assert len(list(Path(f"{cut.output}.parts").glob("*/part-*.json"))) == 2
    same(prepare(cut), undisturbed)


def fail_in_the_worker(connection, config, folder):
    from megatron_offgrpo.data import part_runner

    part_runner._say(connection, DataError("wrong", where="bench.jsonl:1", expected="a", got="b", remedy="c"))


def test_an_unusable_benchmark_is_said_before_any_work(config, tmp_path):
    (tmp_path / "bench.jsonl").write_text(json.dumps({"x": 1}) + "\n")
    filters = FilterConfig(decontaminate=(str(tmp_path / "bench.jsonl"),))
    with pytest.raises(DataError, match=r"bench.jsonl:1: a benchmark record without a problem"):
        prepare(replace(config, output=str(tmp_path / "store"), workers=2, filters=filters))
    assert not Path(f"{tmp_path / 'store'}.parts").exists()


def test_a_line_over_the_limit_is_a_reject(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 5000)
    path = write_lines(tmp_path / "a.jsonl", [group("a"), group("b", problem="long " * 2000), group("c")])
    records = [record for part in readers.read_parts(path) for _, record in part.records()]
    assert [record["group_id"] for record in (records[0], records[2])] == ["a", "c"]
    assert (records[1].reason, records[1].expected) == ("line too long", "at most 5000 bytes a line")
