"""Real solutions and bad inputs through `prepare`."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_offgrpo.data.grading import GradingPool
from megatron_offgrpo.data.importers import parse_record
from megatron_offgrpo.data.labelling import LabelCounts, label_groups
from megatron_offgrpo.data.prepare import PrepareConfig, prepare, summary_lines
from megatron_offgrpo.data.readers import read_parts
from megatron_offgrpo.errors import DataError
from tests.unit.data.test_importers import BAD_RECORDS
from tests.unit.data.tiny import group, save_tokenizer, write_lines

TRAJECTORIES = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "trajectories"
needs_trajectories = pytest.mark.skipif(
    not TRAJECTORIES.is_dir(), reason="no shared/data/trajectories beside the project"
)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@needs_trajectories
def test_gsm8k_becomes_a_store(tmp_path, tokenizer_dir):
    path = TRAJECTORIES / "gsm8k.jsonl.gz"
    config = PrepareConfig(inputs=(str(path),), tokenizer=str(tokenizer_dir), output=str(tmp_path / "store"))
    store = prepare(config)
    records = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    counts = store.manifest.counts
    # The counts that the data's own README states, by its given labels.
    assert counts["groups"] == {"total": 880, "all_positive": 105, "mixed": 491, "all_negative": 284}
    assert store.num_trajectories == counts["trajectories"] == 3520
    assert store.rewards.sum() == 1331
    agreement = counts["agreement"]["given, math-verify"]
    assert agreement["agree"] == agreement["compared"] == 3520
    assert (counts["rejected"], counts["truncated"]) == ({}, 0)
    assert (store.rewards == store.given_rewards).all()

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    for index in (0, 439, 879):
        solutions = {one["sample_id"]: one for one in records[index]["solutions"]}
        row = store.row(index)
        assert sorted(row.sample_ids) == sorted(solutions)
        for offset, name in enumerate(row.sample_ids):
            trajectory = store.trajectory(int(store.group_offsets[index]) + offset)
            assert trajectory.response_ids[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(trajectory.response_ids[:-1]) == solutions[name]["text"]
            assert records[index]["problem"] in tokenizer.decode(trajectory.prompt_ids)
            assert row.rewards[offset] == solutions[name]["label"]
    assert "given, math-verify: 3520 of 3520 (100.00 %)" in "\n".join(summary_lines(store))


@needs_trajectories
@pytest.mark.parametrize(
    ("name", "step", "least_share"),
    [("math_test100", 1, 0.995), ("amc23", 1, 0.99), ("math500", 3, 0.975), ("olympiadbench", 4, 0.96)],
)
def test_labels_agree_with_given_ones(tmp_path, name, step, least_share):
    # The given labels of these files hold errors in both directions; see the data's README.
    records = [record for part in read_parts(TRAJECTORIES / f"{name}.jsonl.gz") for _, record in part.records()]
    groups, counts = [parse_record(record, Counter()) for record in records][::step], LabelCounts()
    with GradingPool() as pool:
        for labelled in label_groups(groups, ("math-verify",), pool):
            counts.add(labelled)
    agreement = counts.as_counts()["agreement"]["given, math-verify"]
    assert agreement["compared"] == sum(len(group.trajectories) for group in groups)
    assert agreement["agree"] >= least_share * agreement["compared"], counts.as_counts()


def test_bad_records_are_listed_inside_the_store_and_good_ones_stored(tmp_path, tokenizer_dir):
    records = [group("first")]
    for index, (bad, _, _) in enumerate(BAD_RECORDS):
        records += [bad, group(f"good{index}")]
    records.append(group("wrong-logprobs", trajectories=[{"text": "4", "logprobs": [-1.0] * 9}]))
    records.append(group("endless", problem="why " * 300))
    records.append(group("first"))
    path = write_lines(tmp_path / "in.jsonl", records)
    store = prepare(
        PrepareConfig(
            inputs=(str(path),), tokenizer=str(tokenizer_dir), output=str(tmp_path / "store"), max_prompt_tokens=200
        )
    )
    assert store.num_groups == 1 + len(BAD_RECORDS)
    rejected = [json.loads(line) for line in (store.path / "rejected.jsonl").read_text().splitlines()]
    expected = [(f"{path}:{2 * index + 2}", reason, field) for index, (_, reason, field) in enumerate(BAD_RECORDS)]
    expected.append((f"{path}:{len(records) - 2}", "log-probs of another length", "trajectories[0].logprobs"))
    expected.append((f"{path}:{len(records) - 1}", "prompt too long", "problem"))
    expected.append((f"{path}:{len(records)}", "duplicated group id", "group_id"))
    assert [(one["where"], one["reason"], one["field"]) for one in rejected] == expected
    assert store.manifest.counts["rejected"] == Counter(reason for _, reason, _ in expected)
    assert not Path(f"{store.path}.parts").exists()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("in.xlsx", b"a,b", "unknown kind of input file; expected .jsonl or .json or .csv or .parquet"),
        ("in.csv", b"a,b\n", "in.csv: no valid record in this file"),
        ("in.json", b"[{]", "in.json: malformed JSON"),
        ("in.jsonl", b"{\n", "in.jsonl: no valid record in this file"),
        ("in.jsonl.gz", b"plain", "in.jsonl.gz:1: damaged gzip file"),
        ("in.parquet", b"plain", "in.parquet: damaged Parquet file"),
    ],
)
def test_an_unusable_file_is_one_clear_line(tmp_path, tokenizer_dir, name, data, message):
    (tmp_path / name).write_bytes(data)
    config = PrepareConfig((str(tmp_path / name),), tokenizer=str(tokenizer_dir), output=str(tmp_path / "store"))
    with pytest.raises(DataError) as caught:
        prepare(config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "store").exists()
