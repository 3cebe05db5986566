"""Benchmark files in every accepted form, and what is said of wrong ones."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_offgrpo.errors import DataError
from megatron_offgrpo.evaluation.benchmarks import Question, load_benchmark

RECORDS = [{"id": "a", "problem": "1+1?", "answer": "2"}, {"id": "b", "problem": "2+2?", "answer": "4"}]
EXPECTED = [Question("a", "1+1?", "2"), Question("b", "2+2?", "4")]
BENCH = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "bench"


def write(path, records):
    name, lines = path.name, "\n".join(json.dumps(record) for record in records) + "\n\n"
    text = json.dumps(records, indent=1) if ".json" in name and ".jsonl" not in name else lines
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize("name", ["b.jsonl", "b.jsonl.gz", "b.json", "b.json.gz", "b.parquet"])
def test_every_form_gives_the_same_questions(tmp_path, name):
    assert load_benchmark(write(tmp_path / name, RECORDS)) == EXPECTED


def test_other_field_names_numbers_and_gsm8k_answers(tmp_path):
    records = [
        {"question": "q", "answer": "3*9=<<3*9=27>>27 in all.\n#### 27"},
        {"prompt": "p", "gold": 4.5},
        {"problem": "r", "final_answer": 7, "unique_id": "set/7"},
    ]
    assert load_benchmark(write(tmp_path / "b.jsonl", records)) == [
        Question("0", "q", "27"),
        Question("1", "p", "4.5"),
        Question("set/7", "r", "7"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"problem": "p", "answer": "1"}\n{"problem": "p"', r"b\.jsonl:2: not JSON"),
        ('{"problem": "p", "answer": "1"}\n[1]', r"b\.jsonl:2: not a record"),
        ('{"problem": "p"}', r"b\.jsonl:1: no `answer`.*got fields problem"),
        ('{"answer": "1"}', r"b\.jsonl:1: no `problem`"),
        ('{"problem": "p", "answer": ["1", "2"]}', r"field `answer` is not a text.*got list"),
        ('{"problem": " ", "answer": "1"}', r"field `problem` is not a text.*empty"),
        ('{"id": 1, "problem": "p", "answer": "1"}\n{"id": 1, "problem": "q", "answer": "2"}', r"id '1' stands twice"),
        ("\n", "an empty benchmark"),
    ],
)
def test_wrong_content_is_named(tmp_path, content, message):
    path = tmp_path / "b.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_benchmark(path)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("b.jsonl.gz", b"no gzip"),
        ("b.jsonl.gz", gzip.compress(b"x" * 99)[:-9]),
        ("b.jsonl", b"\xff"),
        ("b.parquet", b"x"),
    ],
)
def test_unreadable_file(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match="unreadable benchmark"):
        load_benchmark(tmp_path / name)


def test_absent_file(tmp_path):
    with pytest.raises(DataError, match="unreadable benchmark"):
        load_benchmark(tmp_path / "absent.jsonl")


@pytest.mark.skipif(not BENCH.is_dir(), reason="the shared benchmark files are not beside this checkout")
@pytest.mark.parametrize(
    ("name", "count", "answer"),
    [("gsm8k.test.jsonl.gz", 1319, "18"), ("math500.test.jsonl.gz", 500, r"\left( 3, \frac{\pi}{2} \right)"),
     ("aime25.test.json.gz", 30, "70"), ("amc23.test.jsonl.gz", 40, "27.0")],
)  # fmt: skip
def test_published_benchmarks(name, count, answer):
    questions = load_benchmark(BENCH / name)
    assert (len(questions), questions[0].answer) == (count, answer)
