"""`offgrpo grade`: scores added line by line, malformed lines listed, the same output every time."""

import gzip
import json
from pathlib import Path

import pytest

from megatron_offgrpo.errors import ConfigError, DataError
from megatron_offgrpo.evaluation.grade_file import grade_file

TRAJECTORIES = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "trajectories"
EVERY = 12
"""Every twelfth group: the whole sets take most of a minute."""


def record(number, text, answer="7", **more):
    return {"group_id": "g", "sample_id": number, "problem": "3+4?", "answer": answer, "text": text, **more}


def write(path, *lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_adds_four_fields_and_keeps_order_and_the_rest(tmp_path):
    given = [
        record(0, "<think>x</think> \\boxed{7}", model="m"),
        record("1", "it is 7"),
        record(2, "\\boxed{8}", answer=7),
        record(3, "(B)? \\boxed{B}", answer="B", choices=4),
        record(4, "π? \u2028 \\boxed{7}", answer=7.0),
        record(5, "\\boxed{10^{-7}}", answer=1e-7),
        record(7, "\\boxed{7}", answer="N/A"),
    ]
    counts = grade_file(write(tmp_path / "in.jsonl", *given), tmp_path / "out.jsonl", processes=1)
    graded = read(tmp_path / "out.jsonl")
    added = ("strict", "lenient", "extracted", "reason")
    assert [{name: value for name, value in one.items() if name not in added} for one in graded] == given
    assert [[one[name] for name in added] for one in graded] == [
        [1, 1, "7", "equal"],
        [0, 1, "7", "no_box"],
        [0, 0, "8", "different"],
        [1, 1, "B", "equal"],
        [1, 1, "7", "equal"],
        [1, 1, "10^{-7}", "equal"],
        [0, 0, None, "unreadable_gold"],
    ]
    assert (counts.graded, counts.lenient, counts.strict, counts.rejected, counts.rejects) == (7, 5, 4, 0, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_lines_and_the_command_say_that_a_prompt_opened_the_thought(tmp_path):
    text = "I think \\boxed{7}"
    lines = [record(0, text), record(1, text, prompt_opens_thinking=True), record(2, text, prompt_opens_thinking=False)]
    source = write(tmp_path / "in.jsonl", *lines, record(3, "so</think> \\boxed{7}", prompt_opens_thinking=True))
    grade_file(source, tmp_path / "out.jsonl", processes=1)
    assert [(one["lenient"], one["strict"]) for one in read(tmp_path / "out.jsonl")] == [(1, 1), (1, 0), (1, 1), (1, 1)]
    grade_file(source, tmp_path / "out.jsonl", processes=1, prompt_opens_thinking=True)
    assert [one["strict"] for one in read(tmp_path / "out.jsonl")] == [0, 0, 1, 1]


def test_tags_of_the_thought_are_a_setting(tmp_path):
    source = write(tmp_path / "in.jsonl", record(0, "<plan>\\boxed{9}</plan> it is 7"))
    grade_file(source, tmp_path / "out.jsonl", processes=1)
    assert read(tmp_path / "out.jsonl")[0]["extracted"] == "9"
    grade_file(source, tmp_path / "out.jsonl", processes=1, think_tags=("<plan>...</plan>",))
    assert read(tmp_path / "out.jsonl")[0]["extracted"] == "7"


BAD = [
    (b"{nonsense\n", "record", "malformed JSON"),
    (b'{"a": NaN}\n', "group_id", "missing field"),
    (json.dumps(record(0, "t", model=float("nan"))).encode() + b"\n", "record", "not JSON"),
    (b"\xff\xfe\n", "record", "not UTF-8"),
    (b"[1, 2]\n", "record", "wrong type"),
    (b"[" * 100_000 + b"\n", "record", "malformed JSON"),
    (json.dumps({"group_id": "g"}).encode() + b"\n", "sample_id", "missing field"),
    (json.dumps(record(0, 5)).encode() + b"\n", "text", "wrong type"),
    (json.dumps(record(0, "t", answer=["7", "8"])).encode() + b"\n", "answer", "wrong type"),
    (json.dumps(record(0, "t", answer=float("nan"))).encode() + b"\n", "answer", "wrong type"),
    (json.dumps(record(0, "t", answer=None)).encode() + b"\n", "answer", "missing field"),
    (json.dumps(record(0, "t", choices="four")).encode() + b"\n", "choices", "wrong type"),
    (json.dumps(record(0, "\ud800")).encode() + b"\n", "text", "not UTF-8"),
    (json.dumps(record(0, "t", model="\ud800")).encode() + b"\n", "record", "not JSON"),
    (json.dumps(record(0, "t", prompt_opens_thinking="yes")).encode() + b"\n", "prompt_opens_thinking", "wrong type"),
]


def test_malformed_lines_are_listed_with_their_place(tmp_path, capsys):
    good = [record(number, "\\boxed{7}") for number in range(len(BAD))]
    lines = [line for (bad, _, _), one in zip(BAD, good, strict=True) for line in (bad, one, b"\n")]
    source = write(tmp_path / "in.jsonl", *lines)
    counts = grade_file(source, tmp_path / "out.jsonl", processes=1)
    assert (counts.graded, counts.lenient, counts.rejected) == (len(BAD), len(BAD), len(BAD))
    # Each score stands beside the line it belongs to.
    scores = {"strict": 1, "lenient": 1, "extracted": "7", "reason": "equal"}
    assert read(tmp_path / "out.jsonl") == [one | scores for one in good]
    rejects = read(tmp_path / "out.jsonl.rejects.jsonl")
    # Each bad line is followed by a good and a blank one.
    assert [one["where"] for one in rejects] == [f"{source}:{3 * number + 1}" for number in range(len(BAD))]
    assert [(one["field"], one["reason"]) for one in rejects] == [(field, reason) for _, field, reason in BAD]
    assert f"{len(BAD)} record(s) left out, listed in" in capsys.readouterr().err
    write(source, record(0, "\\boxed{7}"))
    grade_file(source, tmp_path / "out.jsonl", processes=1)
    assert not (tmp_path / "out.jsonl.rejects.jsonl").exists()


def test_a_byte_order_mark_costs_no_sample(tmp_path):
    lines = [record(number, "\\boxed{7}") for number in range(2)]
    source = write(tmp_path / "in.jsonl", b"\xef\xbb\xbf", *lines)
    counts = grade_file(source, tmp_path / "out.jsonl", processes=1)
    assert (counts.graded, counts.rejected) == (2, 0)


def test_a_worked_reference_a_thought_and_fields_that_have_no_part(tmp_path, capsys):
    given = [
        record(0, "\\boxed{7}", answer="12 minus 5.\n#### 7", model="m", finish_reason="stop"),
        record(1, "\\boxed{7}", reasoning_content="is it \\boxed{9}?", model="m", system="S"),
        record(2, None, reasoning_content="is it \\boxed{7}?"),
    ]
    counts = grade_file(write(tmp_path / "in.jsonl", *given), tmp_path / "out.jsonl", processes=1)
    graded = read(tmp_path / "out.jsonl")
    assert [(one["lenient"], one["strict"]) for one in graded] == [(1, 1), (1, 1), (1, 0)]
    assert [{name: one[name] for name in had} for had, one in zip(given, graded, strict=True)] == given
    assert counts.unused == {"model": 2, "finish_reason": 1, "system": 1}
    assert "fields that have no part in the grading: model 2, finish_reason 1, system 1" in capsys.readouterr().err


def test_mistakes_are_named_and_leave_nothing(tmp_path):
    source = write(tmp_path / "in.jsonl", b"3\n")
    with pytest.raises(
        DataError, match=r"no record can be graded.*1 rejected, the last one .*in\.jsonl:1: record: wrong type"
    ):
        grade_file(source, tmp_path / "out.jsonl", processes=1)
    with pytest.raises(DataError, match=r"no record can be graded.*got no record"):
        grade_file(write(tmp_path / "empty.jsonl"), tmp_path / "out.jsonl", processes=1)
    with pytest.raises(ConfigError, match="one file"):
        grade_file(source, source)
    with pytest.raises(DataError, match=r"absent\.jsonl: cannot read the input file \(No such file"):
        grade_file(tmp_path / "absent.jsonl", tmp_path / "out.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.jsonl", "in.jsonl"]


@pytest.mark.skipif(not TRAJECTORIES.is_dir(), reason="the shared trajectories are not beside this checkout")
@pytest.mark.parametrize(
    ("name", "percent"),
    [("gsm8k", 100), ("math_test100", 99.5), ("amc23", 99), ("math500", 97.5), ("olympiadbench", 96)],
)
def test_agreement_with_given_labels_and_two_equal_runs(tmp_path, name, percent):
    with gzip.open(TRAJECTORIES / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        groups = [json.loads(line) for number, line in enumerate(file) if number % EVERY == 0]
    source = write(
        tmp_path / "in.jsonl",
        *(
            {"group_id": group["group_id"], "problem": group["problem"], "answer": group["gold"], **solution}
            for group in groups
            for solution in group["solutions"]
        ),
    )
    grade_file(source, tmp_path / "one.jsonl", processes=1)
    graded = read(tmp_path / "one.jsonl")
    agreeing = sum(one["lenient"] == one["label"] for one in graded)
    assert 100 * agreeing / len(graded) >= percent
    if name in ("gsm8k", "math_test100"):
        grade_file(source, tmp_path / "two.jsonl", processes=2)
        assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
