"""Records in: both forms, every kind of bad record with its place, and unusable files."""

import gzip
import json
from collections import Counter
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_offgrpo.data.importers import parse_record
from megatron_offgrpo.data.readers import read_parts
from megatron_offgrpo.data.rejects import RecordError, reject_of
from megatron_offgrpo.errors import DataError
from tests.unit.data.tiny import group, write_lines

SOLUTIONS = {
    "group_id": "s0",
    "benchmark": "b",
    "problem": "P",
    "gold": "27.0",
    "solutions": [{"sample_id": "s0#0", "generator": "m", "text": "T", "label": 1, "n_tokens": 5}],
}


def read(tmp_path, *paths, form="auto", answer_required=True):
    """(valid groups, rejects, ignored fields) of the files."""
    groups, rejected, ignored = [], [], Counter()
    for path in paths:
        for part in read_parts(path):
            for where, record in part.records():
                try:
                    group = parse_record(record, ignored, form=form, answer_required=answer_required)
                    groups.append(replace(group, origin=where))
                except RecordError as error:
                    rejected.append(vars(reject_of(where, None, error)))
    return groups, rejected, ignored


def test_our_form(tmp_path):
    full = group(system="Be brief.")
    full["trajectories"][0] |= {
        "reward": True,
        "logprobs": [-0.5, 0],
        "source": "m",
        "on_policy": True,
        "sample_id": "x",
    }
    full["trajectories"][1] |= {"reward": None}
    ((one,), rejected, ignored) = read(tmp_path, write_lines(tmp_path / "a.jsonl", [full]))
    assert (one.group_id, one.problem, one.answer, one.system) == ("g0", "What is 1 + 1?", "2", "Be brief.")
    first, second = one.trajectories
    assert (first.text, first.reward, first.logprobs) == ("\\boxed{2}", 1.0, (-0.5, 0.0))
    assert (first.source, first.on_policy, first.sample_id) == ("m", True, "x")
    assert (second.reward, second.logprobs, second.on_policy) == (None, None, False)
    assert one.origin == f"{tmp_path / 'a.jsonl'}:1"
    assert (rejected, ignored) == ([], {})


def test_solutions_form_is_detected_and_unknown_fields_are_counted(tmp_path):
    groups, rejected, ignored = read(tmp_path, write_lines(tmp_path / "a.jsonl.gz", [SOLUTIONS, group()]))
    (one,) = groups[0].trajectories
    assert (groups[0].answer, one.text, one.reward, one.source, one.sample_id) == ("27.0", "T", 1.0, "m", "s0#0")
    assert groups[1].group_id == "g0"
    assert rejected == []
    assert ignored == {"benchmark": 1, "solutions[].n_tokens": 1}


def test_numbers_are_taken_as_ids_and_answers(tmp_path):
    ((one,), _, _) = read(tmp_path, write_lines(tmp_path / "a.jsonl", [group(group_id=7, answer=2)]))
    assert (one.group_id, one.answer) == ("7", "2")
    ((one,), _, _) = read(tmp_path, write_lines(tmp_path / "b.jsonl", [group(answer=1e-07)]))
    assert one.answer == "0.0000001"


def test_parquet(tmp_path):
    records = [group("a"), group("b", trajectories=[]), group("c")]
    records[0]["trajectories"][0]["logprobs"] = [-1.0]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    groups, (reject,), _ = read(tmp_path, tmp_path / "a.parquet")
    assert [one.group_id for one in groups] == ["a", "c"]
    assert groups[0].trajectories[0].logprobs == (-1.0,)
    assert groups[0].trajectories[1].logprobs is None
    assert reject["where"] == f"{tmp_path / 'a.parquet'}:2"
    assert reject["reason"] == "empty trajectory list"


def with_trajectory(**changes):
    record = group("bad")
    record["trajectories"][1] |= changes
    return record


def without(field):
    return {name: value for name, value in group("bad").items() if name != field}


BAD_RECORDS = [
    ('{"group_id": "bad", ', "malformed JSON", "record"),
    ("[" * 100_000, "malformed JSON", "record"),
    ('{"group_id": "bad\x00"}', "malformed JSON", "record"),
    (b'{"group_id": "\xff"}', "not UTF-8", "record"),
    ("[1, 2]", "wrong type", "record"),
    ("null", "wrong type", "record"),
    ({"group_id": "bad", "problem": "P"}, "unknown form", "record"),
    (without("group_id"), "missing field", "group_id"),
    (without("problem"), "missing field", "problem"),
    (without("answer"), "missing field", "answer"),
    (group(group_id=True), "wrong type", "group_id"),
    (group(group_id=None), "wrong type", "group_id"),
    (group(group_id=" "), "empty field", "group_id"),
    (group("bad", problem=["P"]), "wrong type", "problem"),
    (group("bad", problem=""), "empty field", "problem"),
    (group("bad", problem="\ud800"), "not UTF-8", "problem"),
    (group("bad", answer=""), "empty field", "answer"),
    (group("bad", answer=[1, 2]), "wrong type", "answer"),
    (group("bad", answer=float("nan")), "wrong type", "answer"),
    (group("bad", system=3), "wrong type", "system"),
    (group("bad", trajectories="text"), "wrong type", "trajectories"),
    (group("bad", trajectories=[]), "empty trajectory list", "trajectories"),
    (group("bad", trajectories=["text"]), "wrong type", "trajectories[0]"),
    (group("bad", trajectories=[{"reward": 1}]), "missing field", "trajectories[0].text"),
    (with_trajectory(text=None), "wrong type", "trajectories[1].text"),
    (with_trajectory(text=3), "wrong type", "trajectories[1].text"),
    (with_trajectory(reward=0.5), "unknown reward", "trajectories[1].reward"),
    (with_trajectory(reward=-1), "unknown reward", "trajectories[1].reward"),
    (with_trajectory(reward=float("nan")), "unknown reward", "trajectories[1].reward"),
    (with_trajectory(reward="1"), "unknown reward", "trajectories[1].reward"),
    (with_trajectory(reward=[1]), "unknown reward", "trajectories[1].reward"),
    (with_trajectory(logprobs=-1.0), "wrong type", "trajectories[1].logprobs"),
    (with_trajectory(logprobs=[-1.0, None]), "wrong type", "trajectories[1].logprobs[1]"),
    (with_trajectory(logprobs=[float("-inf")]), "impossible log-prob", "trajectories[1].logprobs[0]"),
    (with_trajectory(logprobs=[float("nan")]), "impossible log-prob", "trajectories[1].logprobs[0]"),
    (with_trajectory(logprobs=[0.5]), "impossible log-prob", "trajectories[1].logprobs[0]"),
    (with_trajectory(source=1), "wrong type", "trajectories[1].source"),
    (with_trajectory(on_policy=1), "wrong type", "trajectories[1].on_policy"),
    (with_trajectory(sample_id=4), "wrong type", "trajectories[1].sample_id"),
    ({**SOLUTIONS, "solutions": [{"text": "T", "label": 2}]}, "unknown reward", "solutions[0].label"),
    ({**SOLUTIONS, "gold": ""}, "empty field", "gold"),
]


def test_every_bad_record_is_listed_and_no_good_one_is_lost(tmp_path):
    records = [group("first")]
    for index, (bad, _, _) in enumerate(BAD_RECORDS):
        records += [bad, group(f"good{index}")]
    path = write_lines(tmp_path / "a.jsonl", records)
    groups, rejected, _ = read(tmp_path, path)
    assert [one.group_id for one in groups] == ["first", *(f"good{index}" for index in range(len(BAD_RECORDS)))]
    assert len(rejected) == len(BAD_RECORDS)
    for index, ((bad, reason, field), reject) in enumerate(zip(BAD_RECORDS, rejected, strict=True)):
        got = (reject["where"], reject["reason"], reject["field"])
        assert got == (f"{path}:{2 * index + 2}", reason, field), bad
        assert reject["expected"]
        assert reject["got"]


def test_an_answer_is_optional_where_labels_do_not_need_it(tmp_path):
    records = [without("answer"), group("g1", answer="")]
    groups, rejected, _ = read(tmp_path, write_lines(tmp_path / "a.jsonl", records), answer_required=False)
    assert ([one.answer for one in groups], rejected) == (["", ""], [])


def test_byte_order_mark_blank_lines_and_windows_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(group(name)).encode() for name in "ab"))
    groups, rejected, _ = read(tmp_path, path)
    assert ([one.group_id for one in groups], rejected) == (["a", "b"], [])
    assert groups[1].origin == f"{path}:3"


def test_shares_of_a_file_grow_to_one(tmp_path):
    lines = write_lines(tmp_path / "a.jsonl", [group(str(index)) for index in range(600)])
    pq.write_table(pa.Table.from_pylist([group(str(index)) for index in range(600)]), tmp_path / "b.parquet")
    for path in (lines, tmp_path / "b.parquet"):
        shares = [part.share for part in read_parts(path)]
        assert shares == sorted(shares)
        assert len(shares) == 3
        assert shares[-1] == 1.0


def truncated_gzip(path):
    whole = gzip.compress("".join(json.dumps(group(str(index))) + "\n" for index in range(1000)).encode())
    path.write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("absent.jsonl", lambda path: None, "cannot read the input file"),
        ("folder.jsonl", lambda path: path.mkdir(), "cannot read the input file"),
        ("groups.txt", lambda path: write_lines(path, [group()]), r"unknown kind of input file; expected \.jsonl"),
        ("plain.jsonl.gz", lambda path: path.write_text("{}"), r"plain.jsonl.gz:1: damaged gzip file"),
        ("cut.jsonl.gz", truncated_gzip, r"cut.jsonl.gz:\d+: damaged gzip file"),
        ("bad.parquet", lambda path: path.write_text("{}"), "damaged Parquet file"),
    ],
)
def test_unusable_files(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
