"""Options of multiple choice in files of any origin, and which letter is right."""

import json

import pytest

from megatron_offgrpo.data.rejects import RecordError
from megatron_offgrpo.errors import DataError
from megatron_offgrpo.evaluation.benchmarks import Question, load_benchmark
from megatron_offgrpo.evaluation.grade_file import grade_file
from megatron_offgrpo.evaluation.options import read_options, right_letter
from tests.unit.data.tiny import write_lines

THREE = ("12 cm", "13 cm", "14 cm")


@pytest.mark.parametrize(
    "value",
    [
        [*THREE],
        {"A": "12 cm", "B": "13 cm", "C": "14 cm"},
        {"c": "14 cm", "a": "12 cm", "b": "13 cm", "d": None},
        {"text": [*THREE], "label": ["A", "B", "C"]},
        ["A. 12 cm", "B. 13 cm", "C. 14 cm"],
        ["(A) 12 cm", "(B)13 cm", "(C)  14 cm "],
        json.dumps(THREE),
        json.dumps(dict(zip("ABC", THREE, strict=True))),
    ],
)
def test_options(value):
    assert read_options(value, "options") == THREE


@pytest.mark.parametrize(
    ("value", "reason", "field"),
    [
        (["one"], "no options", "options"),
        (["x"] * 27, "no options", "options"),
        (3, "no options", "options"),
        ("A|B|C", "wrong type", "options"),
        (["x", None], "wrong type", "options[1].option"),
        (["x", " "], "empty field", "options[1].option"),
        ({"1": "x", "2": "y"}, "unknown labels of options", "options"),
        ({"A": "x", "C": "y"}, "unknown labels of options", "options"),
        ({"text": ["x", "y"], "label": ["B", "A"]}, "unknown labels of options", "options"),
    ],
)
def test_options_that_cannot_be_shown(value, reason, field):
    with pytest.raises(RecordError) as caught:
        read_options(value, "options")
    assert (caught.value.reason, caught.value.field) == (reason, field)


@pytest.mark.parametrize("answer", ["B", "b", "(B)", "B.", "B)", " B ", "13 cm", "B. 13 cm", "(B) 13 cm"])
def test_the_right_letter(answer):
    assert right_letter(answer, THREE, "answer") == "B"


@pytest.mark.parametrize(
    ("answer", "options", "reason"),
    [
        ("D", THREE, "the answer is none of the options"),
        ("2", THREE, "the answer is none of the options"),
        ("15 cm", THREE, "the answer is none of the options"),
        ("B. 14 cm", THREE, "the answer is none of the options"),
        ("B, not C", THREE, "the answer is none of the options"),
        ("A", ("B", "A"), "the answer is several of the options"),
        ("x", ("x", "x", "y"), "the answer is several of the options"),
    ],
)
def test_an_answer_that_names_no_option_or_two(answer, options, reason):
    with pytest.raises(RecordError) as caught:
        right_letter(answer, options, "answer")
    assert (caught.value.reason, caught.value.field) == (reason, "answer")


@pytest.mark.parametrize("name", ["options", "choices"])
@pytest.mark.parametrize("answer", ["B", "13 cm"])
def test_a_benchmark_shows_its_options(tmp_path, name, answer):
    path = write_lines(
        tmp_path / "b.jsonl",
        [{"problem": "How long?", name: THREE, "answer": answer}, {"problem": "1+1?", name: [], "answer": "2"}],
    )
    text = "How long?\n\nA. 12 cm\nB. 13 cm\nC. 14 cm\n\nAnswer with the letter of the right option in \\boxed{}."
    assert load_benchmark(path) == [Question("0", text, "B", 3), Question("1", "1+1?", "2")]


def test_options_in_the_cells_of_a_table(tmp_path):
    (tmp_path / "b.csv").write_text('problem,options,answer\nHow long?,"[""12"", ""13""]",13\n')
    ((question),) = load_benchmark(tmp_path / "b.csv")
    assert (question.answer, question.choices) == ("B", 2)
    assert "\nA. 12\nB. 13\n" in question.problem


@pytest.mark.parametrize("columns", ["ABC", "ABCDE"])
def test_options_in_a_column_each(tmp_path, columns):
    cells = dict.fromkeys(columns) | dict(zip("ABC", THREE, strict=True))
    path = write_lines(tmp_path / "b.jsonl", [{"question": "How long?", **cells, "answer": "C"}])
    ((question),) = load_benchmark(path)
    assert (question.answer, question.choices) == ("C", 3)
    assert question.problem.startswith("How long?\n\nA. 12 cm\nB. 13 cm\nC. 14 cm\n\n")
    gap = {"question": "How long?", "A": "x", "B": "y", "D": "z", "answer": "B"}
    with pytest.raises(DataError, match="unknown labels of options: A; expected A, B, C"):
        load_benchmark(write_lines(tmp_path / "gap.jsonl", [gap]))


def test_a_benchmark_whose_answer_is_no_option_is_refused(tmp_path):
    path = write_lines(tmp_path / "b.jsonl", [{"problem": "How long?", "options": THREE, "answer": 1}])
    with pytest.raises(DataError, match=r"b\.jsonl:1: the answer is none of the options: answer; expected one of the"):
        load_benchmark(path)


def test_graded_samples_with_options_are_graded_by_letter(tmp_path):
    base = {"group_id": "g", "sample_id": 1, "problem": "p", "answer": "13 cm", "options": THREE}
    records = [
        base | {"text": "\\boxed{B}"},
        base | {"text": "\\boxed{C}", "choices": 3},
        base | {"text": "", "choices": 4},
    ]
    counts = grade_file(write_lines(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl", processes=1)
    assert (counts.graded, counts.lenient, counts.rejected) == (2, 1, 1)
    (reject,) = map(json.loads, (tmp_path / "out.jsonl.rejects.jsonl").read_text().splitlines())
    assert (reject["where"], reject["field"]) == (f"{tmp_path / 'in.jsonl'}:3", "choices")
