"""The store: what goes in comes out, counted and fingerprinted by content."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from megatron_offgrpo.data.store import StoreRow, TrajectoryStore, composition, tokenizer_fingerprint, write_store
from megatron_offgrpo.errors import DataError
from tests.evil import Evil


def make_row(group_id, prompt, responses, rewards, logprobs=None, truncated=None):
    size = len(responses)
    return StoreRow(
        group_id=group_id,
        problem=f"problem {group_id}",
        answer="1",
        prompt_ids=prompt,
        response_ids=responses,
        rewards=rewards,
        given_rewards=[None] * size,
        label_statuses=["ok"] * size,
        sources=["teacher"] * size,
        on_policy=[False] * size,
        truncated=truncated or [False] * size,
        behaviour_logprobs=logprobs or [None] * size,
        sample_ids=[None] * size,
        texts=["text"] * size,
    )


ROWS = [
    make_row("a", [1, 2, 3], [[4, 5, 9], [6, 9]], [1.0, 0.0], logprobs=[[-0.5, -1.0, -2.0], None]),
    make_row("b", [7], [[8, 9]], [1.0]),
    make_row("c", [1, 2], [[3], [4, 4, 4, 4], [5, 9]], [0.0, 0.0, 0.0], truncated=[True, True, False]),
]


def write(path, rows=ROWS, **changes):
    arguments = {"tokenizer_fingerprint": "tok", "inputs": {"input": "x"}, "counts": {"rejected": {}}, "config": {}}
    return write_store(path, iter(rows), **{**arguments, **changes})


def test_round_trip(tmp_path):
    write(tmp_path / "store")
    store = TrajectoryStore.open(tmp_path / "store")
    assert (store.num_groups, store.num_trajectories) == (3, 6)
    assert store.group_offsets.tolist() == [0, 2, 3, 6]
    assert store.group_index.tolist() == [0, 0, 1, 2, 2, 2]
    assert store.prompt_lengths.tolist() == [3, 3, 1, 2, 2, 2]
    assert store.response_lengths.tolist() == [3, 2, 2, 1, 4, 2]
    assert store.rewards.tolist() == [1, 0, 1, 0, 0, 0]
    assert store.truncated.tolist() == [False, False, False, True, True, False]
    assert store.on_policy.tolist() == [False] * 6
    assert np.isnan(store.given_rewards).all()
    for array, dtype in [
        (store.group_offsets, np.int64),
        (store.prompt_lengths, np.int64),
        (store.rewards, np.float64),
    ]:
        assert array.dtype == dtype
    assert store.on_policy.dtype == np.bool_
    assert [store.row(index) for index in range(3)] == ROWS


def test_trajectory_is_found_across_groups(tmp_path):
    store = write(tmp_path / "store")
    first, fifth = store.trajectory(0), store.trajectory(4)
    assert first.prompt_ids.tolist() == [1, 2, 3]
    assert first.response_ids.tolist() == [4, 5, 9]
    assert first.behaviour_logprobs.tolist() == [-0.5, -1.0, -2.0]
    assert fifth.prompt_ids.tolist() == [1, 2]
    assert fifth.response_ids.tolist() == [4, 4, 4, 4]
    assert fifth.behaviour_logprobs is None
    assert fifth.response_ids.dtype == np.int32


def test_many_batches(tmp_path):
    rows = [make_row(str(index), [1] * (index % 5 + 1), [[index, 2]] * (index % 3 + 1), [1.0] * (index % 3 + 1))
            for index in range(2100)]  # fmt: skip
    store = write(tmp_path / "store", rows)
    assert len(store.table["response_ids"].chunks) > 1
    assert store.num_trajectories == sum(index % 3 + 1 for index in range(2100))
    last = store.num_trajectories - 1
    assert store.trajectory(last).response_ids.tolist() == [2099, 2]
    assert store.prompt_lengths[last] == 2099 % 5 + 1


def test_counts_and_inputs(tmp_path):
    manifest = write(tmp_path / "store").manifest
    assert manifest.inputs == {"tokenizer": "tok", "input": "x"}
    assert manifest.counts["groups"] == {"total": 3, "all_positive": 1, "mixed": 1, "all_negative": 1}
    assert manifest.counts["trajectories"] == 6
    assert manifest.counts["truncated"] == 2
    assert manifest.counts["prompt_tokens"] == 3 + 1 + 2
    assert manifest.counts["response_tokens"] == 3 + 2 + 2 + 1 + 4 + 2


def test_fingerprint_depends_on_content_only(tmp_path):
    first = write(tmp_path / "one").manifest.fingerprint
    assert write(tmp_path / "two", config={"output": "elsewhere"}).manifest.fingerprint == first
    renamed = [replace(ROWS[0], texts=["other", "texts"], sources=[None, None]), *ROWS[1:]]
    assert write(tmp_path / "three", renamed).manifest.fingerprint == first
    changes = [
        {"group_id": "z"},
        {"prompt_ids": [1, 2, 4]},
        {"response_ids": [[4, 5], [9, 6, 9]]},
        {"rewards": [0.0, 0.0]},
        {"behaviour_logprobs": [[-0.5, -1.0, -2.1], None]},
    ]
    for change in changes:
        changed = [replace(ROWS[0], **change), *ROWS[1:]]
        assert write(tmp_path / "four", changed).manifest.fingerprint != first, change
    apart = write(tmp_path / "apart", [ROWS[0], replace(ROWS[1], validation=True), ROWS[2]])
    assert apart.manifest.fingerprint != first
    assert apart.validation_groups.tolist() == [False, True, False]
    assert apart.manifest.counts["validation_groups"] == 1
    assert write(tmp_path / "five", ROWS[::-1]).manifest.fingerprint != first


def test_no_row_leaves_nothing_behind(tmp_path):
    with pytest.raises(DataError, match="no group is left"):
        write(tmp_path / "store", [])
    assert list(tmp_path.iterdir()) == []


def test_uneven_lists_are_refused(tmp_path):
    with pytest.raises(DataError, match="group b"):
        write(tmp_path / "store", [ROWS[0], replace(ROWS[1], rewards=[1.0, 0.0])])


def test_missing_and_damaged_stores(tmp_path):
    with pytest.raises(DataError, match=r"no finished store here.*offgrpo prepare"):
        TrajectoryStore.open(tmp_path / "absent")
    store = write(tmp_path / "store")
    (arrow,) = (store.path / "groups").glob("*.arrow")
    whole = arrow.read_bytes()
    arrow.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(DataError, match=r"unreadable store|do not fit"):
        TrajectoryStore.open(store.path)
    arrow.unlink()
    with pytest.raises(DataError, match="unreadable store"):
        TrajectoryStore.open(store.path)


def test_a_pickle_in_a_store_is_refused_and_not_read(tmp_path):
    store = write(tmp_path / "store")
    (arrow,) = (store.path / "groups").glob("*.arrow")
    arrow.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(DataError, match="unreadable store") as caught:
        TrajectoryStore.open(store.path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_pickled_type_in_a_store_is_not_read(tmp_path):
    """Old releases of Arrow unpickled the type of a column that named Python as its origin."""
    store = write(tmp_path / "store")
    (arrow,) = (store.path / "groups").glob("*.arrow")
    with pa.ipc.open_stream(arrow.read_bytes()) as reader:
        table = reader.read_all()
    evil = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": Evil(tmp_path / "ran")}
    metadata = {name: value if isinstance(value, str) else pickle.dumps(value) for name, value in evil.items()}
    schema = pa.schema([field.with_metadata(metadata) for field in table.schema])
    with pa.ipc.new_stream(str(arrow), schema) as writer:
        writer.write_table(pa.table(table.columns, schema=schema))
    TrajectoryStore.open(store.path).row(0)
    assert not (tmp_path / "ran").exists()


def test_composition():
    assert composition([1, 1]) == "all_positive"
    assert composition([0, 1]) == "mixed"
    assert composition([0]) == "all_negative"


def write_tokenizer(folder, vocabulary, config):
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_tokenizer_fingerprint(tmp_path):
    config = {"eos_token": "</s>", "chat_template": "{{ messages }}"}
    first = tokenizer_fingerprint(write_tokenizer(tmp_path / "a", {"model": {"a": 0}}, config))
    same = write_tokenizer(tmp_path / "b", {"padding": {"x": 1}, "model": {"a": 0}}, {"eos_token": {"content": "</s>"}})
    (same / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_fingerprint(same) == first
    others = [
        ({"model": {"a": 1}}, config),
        ({"model": {"a": 0}}, {**config, "eos_token": "<eos>"}),
        ({"model": {"a": 0}}, {**config, "chat_template": "{{ other }}"}),
    ]
    for index, (vocabulary, other) in enumerate(others):
        assert tokenizer_fingerprint(write_tokenizer(tmp_path / f"o{index}", vocabulary, other)) != first
    with pytest.raises(DataError, match="no tokenizer here"):
        tokenizer_fingerprint(tmp_path)
