"""Files of every kind through the one reader: the same records, and one error for each kind of damage."""

import csv
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_offgrpo.data import readers
from megatron_offgrpo.data.decontamination import read_problems
from megatron_offgrpo.data.readers import read_parts, sound_records
from megatron_offgrpo.data.rejects import RecordError
from megatron_offgrpo.errors import DataError
from megatron_offgrpo.evaluation.benchmarks import Question, load_benchmark
from megatron_offgrpo.evaluation.grade_file import grade_file

RECORDS = [
    {"group_id": "g", "sample_id": name, "problem": f'What is {name},\n"2" + 3?', "answer": "5", "text": "\\boxed{5}"}
    for name in ("a", "b", "c")
]
QUESTIONS = [Question(str(number), one["problem"], "5") for number, one in enumerate(RECORDS)]
BOM = b"\xef\xbb\xbf"
NAMES = ("b.jsonl", "array.jsonl", "lines.json", "pretty.json", "b.json", "b.csv")
KINDS = [f"{name}{ending}" for name in NAMES for ending in ("", ".gz")]


def text_of(name, records=RECORDS):
    if "csv" in name:
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, records[0])
        writer.writeheader()
        writer.writerows(records)
        return out.getvalue()
    if "array" in name or name.removesuffix(".gz") == "b.json":
        return json.dumps(records)
    if "pretty" in name:
        return json.dumps(records, indent=2)
    return "\n".join(map(json.dumps, records)) + "\n"


def write(path, data):
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def records_of(path):
    return [record for part in read_parts(path) for _, record in part.records()]


@pytest.mark.parametrize(
    "prefix", [b"", BOM, b"\n\n", BOM + b"\r\n \n"], ids=["plain", "BOM", "blank", "BOM and blank"]
)
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_records(tmp_path, name, newline, prefix):
    text = text_of(name).encode()
    if "csv" not in name:  # in a quoted cell of a table a line break is content
        text = text.replace(b"\n", newline)
    elif b"\n" in prefix.removeprefix(BOM):
        prefix = prefix.replace(b" ", b"")
    path = write(tmp_path / name, prefix + text)
    assert records_of(path) == RECORDS


@pytest.mark.parametrize("name", [*KINDS, "b.parquet"])
def test_all_commands_read_every_kind_of_file_alike(tmp_path, name):
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(RECORDS), path)
    else:
        write(path, BOM + text_of(name).encode())
    assert load_benchmark(path) == QUESTIONS  # `sample_id` and the rest are said to be unused
    assert [problem for _, problem in read_problems(path)] == [one["problem"] for one in RECORDS]
    counts = grade_file(path, tmp_path / "out.jsonl", processes=1)
    assert (counts.graded, counts.lenient, counts.rejected) == (3, 3, 0)
    graded = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{key: one[key] for key in RECORDS[0]} for one in graded] == RECORDS


def test_a_table_has_text_and_nulls_alone(tmp_path):
    path = write(tmp_path / "a.csv", b' problem ,answer,system,\n007,"1,5", ,3\n\nb,,"x\ny",4\nc,NA,,5\n')
    assert records_of(path) == [
        {"problem": "007", "answer": "1,5", "system": None, "column 4": "3"},
        {"problem": "b", "answer": None, "system": "x\ny", "column 4": "4"},
        {"problem": "c", "answer": "NA", "system": None, "column 4": "5"},
    ]
    assert [where.rpartition(":")[2] for where, _ in sound_records(path)] == ["2", "4", "6"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"What is 2, 3 + 5?,7", "wrong number of cells"),
        (b"What is 2", "wrong number of cells"),
        (b"a,b,", "wrong number of cells"),
        (b"a,\xff", "not UTF-8"),
    ],
)
def test_a_bad_row_of_a_table_is_one_error_in_every_command(tmp_path, row, reason):
    path = write(tmp_path / "a.csv", b"problem,answer\n1+1?,2\n" + row + b"\n2+2?,4\n")
    good, bad, other = records_of(path)
    assert (good["answer"], bad.reason, other["answer"]) == ("2", reason, "4")
    for load in (load_benchmark, lambda path: list(read_problems(path))):
        with pytest.raises(DataError, match=rf"a\.csv:3: {reason}"):
            load(path)


@pytest.mark.parametrize("length", [131_072, 131_073, 1_000_000])
@pytest.mark.parametrize("name", ["b.csv", "b.jsonl", "b.json"])
def test_a_long_cell_is_read_whole(tmp_path, name, length):
    record = {"problem": "x" * length, "answer": "2"}
    path = write(tmp_path / name, text_of(name, [record]).encode())
    assert load_benchmark(path) == [Question("0", "x" * length, "2")]


def test_a_cell_over_the_limit_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1000)
    path = write(tmp_path / "a.csv", f"problem,answer\n1+1?,2\n{'x' * 1001},2\n".encode())
    with pytest.raises(DataError, match=r"a\.csv:3: damaged CSV file \(field larger than field limit"):
        load_benchmark(path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b'problem,answer\n"never closed,1\nb,2\n', r"a\.csv:2: damaged CSV file \(unexpected end of data"),
        ("a.csv", b'problem,answer\n"a"b,1\n', r"a\.csv:2: damaged CSV file"),
        ("a.csv", b"answer,problem,answer\n1,b,2\n", r"a\.csv:1: columns of one name; .*got answer"),
        ("a.csv", "problem,answer\na,1\n".encode("utf-16"), r"a\.csv:1: not UTF-8"),
        ("a.json", b'[{"problem": "p"},', r"a\.json: malformed JSON"),
        ("a.json", b'[{"problem": "p"}] x', r"a\.json: malformed JSON"),
        ("a.json", b'{"problem":\n "p"}', r"a\.json:1: malformed JSON; expected one JSON object a line, or an array"),
        ("a.json", b'[{"problem": "\xff"}]', r"a\.json: malformed JSON"),
        ("a.json", b"[" + b'{"a":' * 100_000, r"a\.json: malformed JSON"),
        ("a.json.gz", gzip.compress(b"[" + b"1" * 999)[:-9], r"a\.json\.gz:1: damaged gzip file"),
        ("a.csv.gz", b"problem,answer\n", r"a\.csv\.gz:1: damaged gzip file"),
        ("a.tsv", b"a", r"unknown kind of input file; expected \.jsonl or \.json or \.csv"),
    ],
)
def test_a_damaged_file_is_one_error(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        list(sound_records(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_first_line_that_is_a_list_of_something_else_is_a_bad_record(tmp_path):
    path = write(tmp_path / "a.jsonl", b'[1, 2]\n{"problem": "p"}\n')
    assert records_of(path) == [[1, 2], {"problem": "p"}]


def test_byte_order_marks_of_joined_files(tmp_path):
    lines = BOM + b'{"a": 1}\n' + BOM + b'{"a": 2}\n' + BOM + b"\n"
    assert records_of(write(tmp_path / "a.jsonl", lines)) == [{"a": 1}, {"a": 2}]


def test_parts_are_the_same_pieces_for_every_reader(tmp_path):
    records = [{"problem": f"p{index}", "answer": "1"} for index in range(600)]
    for name in ("b.csv", "b.json", "b.jsonl"):
        path = write(tmp_path / name, text_of(name, records).encode())
        parts = list(read_parts(path))
        assert [len(part.lines) for part in parts] == [256, 256, 88]
        assert parts[-1].share == 1.0
        assert [record for part in parts for _, record in part.records()] == records


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.text(st.characters(codec="utf-8"), min_size=1)), max_size=4))
def test_whatever_text_a_table_holds_comes_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "a.csv"
    filled = [{name: row.get(name) for name in "abc"} for row in rows]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, "abc")
        writer.writeheader()
        writer.writerows(filled)
    found = records_of(path)
    blank = [{name: value if value and value.strip() else None for name, value in row.items()} for row in filled]
    assert found == blank
    assert not any(isinstance(one, RecordError) for one in found)
