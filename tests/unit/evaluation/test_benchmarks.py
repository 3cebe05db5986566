"""Benchmark files in every accepted form, and what is said of wrong ones."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_offgrpo.errors import ConfigError, DataError
from megatron_offgrpo.evaluation.benchmarks import Question, find_benchmark, load_benchmark

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
        {"problem": "s", "answer": 1e-7},
    ]
    assert load_benchmark(write(tmp_path / "b.jsonl", records)) == [
        Question("0", "q", "27"),
        Question("1", "p", "4.5"),
        Question("set/7", "r", "7"),
        Question("3", "s", "0.0000001"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"problem": "p", "answer": "1"}\n{"problem": "p"', r"b\.jsonl:2: malformed JSON"),
        ('{"problem": "p", "answer": "1"}\n[1]', r"b\.jsonl:2: wrong type; expected an object; got \[1\]"),
        ('{"problem": "p"}', r"b\.jsonl:1: missing field: answer.*got fields problem"),
        ('{"answer": "1"}', r"b\.jsonl:1: missing field: problem"),
        ('{"problem": "p", "answer": ["1", "2"]}', r"wrong type: answer; expected a text; got \['1', '2'\]"),
        ('{"problem": " ", "answer": "1"}', r"empty field: problem"),
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
    ("changes", "message"),
    [
        ({"answer": float("nan")}, "wrong type: answer; expected a text; got nan"),
        ({"answer": float("inf")}, "wrong type: answer; expected a text; got inf"),
        ({"answer": None}, "missing field: answer"),
        ({"answer": "nan"}, "empty field: answer"),
        ({"answer": "so it is\n####"}, "empty field: answer"),
        ({"answer": True}, "wrong type: answer"),
        ({"problem": 5}, "wrong type: problem"),
        ({"problem": float("nan")}, "wrong type: problem"),
        ({"id": float("nan")}, "wrong type: id"),
        ({"system": "Think."}, "field without a use: system"),
        ({"problem": [{"role": "system", "content": "S"}, {"role": "user", "content": "q"}]}, "with --system"),
        ({"images": ["a.png"]}, "field without a use: images"),
    ],
)
@pytest.mark.parametrize("name", ["b.jsonl", "b.json", "b.parquet"])
def test_what_cannot_be_asked_or_answered_is_refused(tmp_path, name, changes, message):
    record = {"id": 1, "problem": "p", "answer": 1.5} | changes
    with pytest.raises(DataError, match=message):
        load_benchmark(write(tmp_path / name, [record]))


def test_a_missing_number_of_a_table_is_refused(tmp_path):
    # One missing cell makes a whole column of pandas one of floats.
    table = pyarrow.table({"problem": ["p", "q"], "answer": [4.0, float("nan")]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet:2: wrong type: answer; expected a text; got nan"):
        load_benchmark(tmp_path / "b.parquet")
    for cell in ("", "nan", "NaN"):
        (tmp_path / "b.csv").write_text(f"problem,answer\np,4.0\nq,{cell}\n")
        with pytest.raises(DataError, match=r"b\.csv:3: (missing|empty) field: answer"):
            load_benchmark(tmp_path / "b.csv")


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("minerva", {"question": "q", "answer": float("nan")}),
        ("minerva", {"question": float("nan"), "answer": "1"}),
        ("olympiadbench", {"question": "q", "final_answer": ["1", None]}),
        ("gsm8k", {"question": "q", "answer": None}),
        ("mmlu-pro", {"question": "q", "options": ["1", "2"], "answer": None}),
        ("gpqa-diamond", {"Question": "q", "Correct Answer": "a", "Incorrect Answer 1": None,
                          "Incorrect Answer 2": "c", "Incorrect Answer 3": "d"}),
    ],
)  # fmt: skip
def test_nothing_missing_becomes_a_text_in_a_named_benchmark(tmp_path, name, record):
    write(tmp_path / f"{name}.jsonl", [record])
    with pytest.raises(DataError, match=r"jsonl:1: wrong type"):
        find_benchmark(name, tmp_path)


def test_fields_that_are_not_used_are_counted_and_said(tmp_path, capsys):
    records = [one | {"url": "u", "solution": None} for one in RECORDS] + [{"problem": "r", "answer": "1", "year": 24}]
    load_benchmark(write(tmp_path / "b.jsonl", records))
    assert "b.jsonl: fields that are not used: url 2, year 1" in capsys.readouterr().err


def test_a_context_stands_before_its_question(tmp_path):
    records = [
        {"context": "Let x = 2.", "problem": "x?", "answer": "2"},
        {"context": None, "problem": "1?", "answer": "1"},
    ]
    assert [one.problem for one in load_benchmark(write(tmp_path / "b.jsonl", records))] == ["Let x = 2.\n\nx?", "1?"]


def test_a_question_as_messages(tmp_path):
    asked = [{"role": "user", "content": "1+1?"}]
    records = [{"prompt": asked, "answer": "2"}, {"prompt": json.dumps(asked), "answer": "2"}]
    assert [one.problem for one in load_benchmark(write(tmp_path / "b.jsonl", records))] == ["1+1?"] * 2


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("b.jsonl.gz", b"no gzip", "b.jsonl.gz:1: damaged gzip file"),
        ("b.jsonl.gz", gzip.compress(b"x" * 99)[:-9], "b.jsonl.gz:1: damaged gzip file"),
        ("b.jsonl", b"\xff", "b.jsonl:1: not UTF-8"),
        ("b.parquet", b"x", "b.parquet: damaged Parquet file"),
    ],
)
def test_unreadable_file(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        load_benchmark(tmp_path / name)


def test_absent_file(tmp_path):
    with pytest.raises(DataError, match=r"absent.jsonl: cannot read the input file \(No such file"):
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


@pytest.mark.skipif(not BENCH.is_dir(), reason="the shared benchmark files are not beside this checkout")
@pytest.mark.parametrize(
    ("name", "count", "first", "answer", "identifier"),
    [
        ("aime24", 30, "Every morning Aya", "204", "60"),
        ("aime25", 30, "Find the sum of all integer bases", "70", "0"),
        ("aime25-1", 15, "Find the sum of all integer bases", "70", "0"),
        ("aime25-2", 15, "Six points", "468", "0"),
        ("amc23", 40, "Cities $A$ and $B$", "27.0", "0"),
        ("math500", 500, "Convert the point", r"\left( 3, \frac{\pi}{2} \right)", "test/precalculus/807.json"),
        ("olympiadbench", 675, "Xenia and Sergey", "2", "1606"),
        ("gsm8k", 1319, "Janet", "18", "0"),
    ],
)
def test_named_benchmarks_from_a_data_folder(name, count, first, answer, identifier, capsys):
    questions = find_benchmark(name, BENCH)
    one = questions[0]
    assert (len(questions), one.answer, one.problem_id, one.choices) == (count, answer, identifier, 0)
    assert one.problem.startswith(first)
    # The shared copy of OlympiadBench has one problem more than the published one, and that is said.
    assert ("as published" in capsys.readouterr().err) == (name == "olympiadbench")


def write_choices(folder):
    mmlu = {
        "question_id": 70,
        "question": "Which?",
        "options": ["x", "y", "z", "N/A"],
        "answer": "C",
        "answer_index": 2,
    }
    arc = [
        {"id": "m1", "question": "Why?", "choices": {"text": ["p", "q"], "label": ["A", "B"]}, "answerKey": "B"},
        {"id": "m2", "question": "How?", "choices": {"text": ["p", "q"], "label": ["1", "2"]}, "answerKey": "1"},
    ]
    incorrect = {f"Incorrect Answer {number}": f"wrong {number}" for number in (1, 2, 3)}
    gpqa = [
        {"Record ID": f"r{n}", "Question": f"What {n}?", "Correct Answer": "right\n", **incorrect} for n in range(24)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([mmlu]), folder / "mmlu-pro.parquet")
    write(folder / "arc-challenge.test.jsonl", arc)
    with (folder / "gpqa-diamond.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, gpqa[0])
        writer.writeheader()
        writer.writerows(gpqa)


def test_multiple_choice_benchmarks(tmp_path):
    write_choices(tmp_path)
    assert find_benchmark("mmlu-pro", tmp_path) == [
        Question("70", "Which?\n\nA. x\nB. y\nC. z\n\nAnswer with the letter of the right option in \\boxed{}.", "C", 3)
    ]
    arc = find_benchmark("arc-challenge", tmp_path)
    assert [(one.problem_id, one.answer, one.choices) for one in arc] == [("m1", "B", 2), ("m2", "A", 2)]
    gpqa = find_benchmark("gpqa-diamond", tmp_path)
    assert gpqa == find_benchmark("gpqa-diamond", tmp_path)  # shuffled by the question alone
    letters = [one.answer for one in gpqa]
    assert set(letters) == set("ABCD")
    assert all(f"\n{one.answer}. right\n" in one.problem for one in gpqa)
    assert all(f"wrong {number}\n" in gpqa[0].problem for number in (1, 2, 3))


def test_a_copy_of_a_hub_dataset_in_a_folder(tmp_path):
    (tmp_path / "minerva").mkdir()
    records = [{"question": "1+1?", "answer": "2"}, {"question": "2+2?", "answer": "4"}]
    write(tmp_path / "minerva" / "test.jsonl", records)
    assert find_benchmark("minerva", tmp_path) == [Question("0", "1+1?", "2"), Question("1", "2+2?", "4")]


def test_without_a_data_folder_the_hub_is_asked(monkeypatch):
    import datasets

    asked = []

    def load(path, config, split):
        asked.append((path, config, split))
        return [{"question": f"{config} {number}", "answer": str(number)} for number in range(15)]

    monkeypatch.setattr(datasets, "load_dataset", load)
    questions = find_benchmark("aime25")
    assert asked == [("opencompass/AIME2025", f"AIME2025-{part}", "test") for part in ("I", "II")]
    assert [one.problem_id for one in questions] == [str(number) for number in range(30)]

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach the hub\nfor long")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"cannot load the dataset \(Couldn't reach the hub\); remedy: .*--data-dir"):
        find_benchmark("aime25")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "q"}, r"not a record of ARC-Challenge.*got fields question"),
        ({"question": "q", "choices": {"text": ["p"], "label": ["A"]}, "answerKey": "B"}, "not a record of ARC"),
        ({"question": " ", "choices": {"text": ["p"], "label": ["A"]}, "answerKey": "A"}, "empty field: question"),
    ],
)
def test_wrong_records_of_a_named_benchmark(tmp_path, record, message):
    write(tmp_path / "arc-challenge.jsonl", [record])
    with pytest.raises(DataError, match=message):
        find_benchmark("arc-challenge", tmp_path)


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises(ConfigError, match=r"neither a benchmark's name nor a file.*did you mean aime24\?"):
        find_benchmark("aime2024", tmp_path)
    with pytest.raises(DataError, match=r"no such benchmark in the data folder.*gsm8k\.\*"):
        find_benchmark("gsm8k", tmp_path)
    write(tmp_path / "gsm8k.jsonl", [{"question": "q", "answer": "#### 1"}])
    write(tmp_path / "gsm8k.json", [{"question": "q", "answer": "#### 1"}])
    with pytest.raises(DataError, match="several files"):
        find_benchmark("gsm8k", tmp_path)
