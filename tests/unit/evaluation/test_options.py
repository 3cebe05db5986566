"""Options of multiple choice in files of any origin, and which letter is right."""

import json
from collections import Counter

import pytest

from megatron_offgrpo.data.importers import parse_record
from megatron_offgrpo.data.rejects import RecordError
from megatron_offgrpo.errors import DataError
from megatron_offgrpo.evaluation.benchmarks import Question, load_benchmark
from megatron_offgrpo.evaluation.grade_file import grade_file
from megatron_offgrpo.evaluation.options import read_options, right_letter
from tests.unit.data.tiny import group, write_lines

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


@pytest.mark.parametrize(
    "names",
    [
        ["option_a", "option_b", "option_c"],
        ["optionA", "optionB", "optionC"],
        ["Option A", "Option B", "Option C"],
        ["options.A", "options.B", "options.C"],
        ["choice_a", "choice_b", "choice_c"],
        ["choiceC", "choiceB", "choiceA"],
        ["opa", "opb", "opc"],
        ["answerA", "answerB", "answerC"],
        ["option1", "option2", "option3"],
        ["choice_0", "choice_1", "choice_2"],
        ["Opt-1", "Opt-2", "Opt-3"],
    ],
)
def test_columns_of_options_by_any_name(tmp_path, names):
    cells = dict(zip(names, THREE if names == sorted(names) else THREE[::-1], strict=True))
    record = {"question": "How long?", **cells, "answer": "13 cm"}
    spellings = ["B", "13 cm", names[1]]
    questions = load_benchmark(write_lines(tmp_path / "b.jsonl", [record | {"answer": one} for one in spellings]))
    assert [(one.answer, one.choices) for one in questions] == [("B", 3)] * 3
    assert questions[0].problem.startswith("How long?\n\nA. 12 cm\nB. 13 cm\nC. 14 cm\n\n")
    sample = {**record, "group_id": "g", "sample_id": 1, "problem": "p", "text": "\\boxed{B}"}
    assert grade_file(write_lines(tmp_path / "in.jsonl", [sample]), tmp_path / "out.jsonl", processes=1).strict == 1
    with pytest.raises(RecordError, match="field without a use") as caught:
        parse_record(group() | cells, Counter())
    assert caught.value.field == names[0]


@pytest.mark.parametrize(
    "names",
    [["a", "b"], ["A"], ["answer1", "answer2"], ["option_a"], ["B", "C"], ["opt", "ops"], ["option2", "option3"]],
)
def test_columns_that_are_no_options(names):
    cells = dict.fromkeys(names, "x")
    ignored = Counter()
    parse_record(group() | cells, ignored)
    assert ignored == dict.fromkeys(names, 1)


def test_a_number_beside_columns_is_no_place_but_may_be_two_things(tmp_path):
    for names in ("AB", ("opa", "opb")):
        for texts, answer, found in ((("0", "1"), 1, "B"), (("1", "2"), 1, "several"), (("x", "y"), 1, "none")):
            record = {"problem": "p", **dict(zip(names, texts, strict=True)), "answer": answer}
            path = write_lines(tmp_path / "b.jsonl", [record])
            if found == "B":
                assert load_benchmark(path)[0].answer == found
            else:
                with pytest.raises(DataError, match=f"the answer is {found} of the options: answer"):
                    load_benchmark(path)


def test_the_label_of_a_numbered_column_is_an_answer(tmp_path):
    cells = {f"option{number}": str(10 + number) for number in range(1, 12)}
    for answer, letter in ((2, "B"), ("10", "J"), (12, "B")):
        path = write_lines(tmp_path / "b.jsonl", [{"problem": "p", **cells, "answer": answer}])
        assert load_benchmark(path)[0].answer == letter
    path = write_lines(tmp_path / "b.jsonl", [{"problem": "p", **cells, "answer": 11}])  # label of K, text of A
    with pytest.raises(DataError, match="the answer is several of the options: answer"):
        load_benchmark(path)


def test_options_that_stand_twice_are_the_same(tmp_path):
    record = {"problem": "p", "options": ["x", "y"], "A": "x", "B": "y", "answer": "B"}
    assert load_benchmark(write_lines(tmp_path / "b.jsonl", [record]))[0].answer == "B"
    with pytest.raises(DataError, match="two lists of options: A; expected those of options"):
        load_benchmark(write_lines(tmp_path / "b.jsonl", [record | {"B": "z"}]))
    with pytest.raises(DataError, match="field without a use: option_a"):
        load_benchmark(write_lines(tmp_path / "b.jsonl", [record | {"option_a": "x", "option_b": "z"}]))


@pytest.mark.parametrize(
    ("options", "answer", "letter"),
    [
        (THREE, 1, "B"),
        (THREE, 0, "A"),
        (THREE, [2], "C"),
        (json.dumps(THREE), 1, "B"),
        (["5", "7"], 1, "B"),
        (["5", "7"], 7, "B"),
        ([5, 7], 5, "A"),
        (["0", "1"], 1, "B"),
        ([0, 1, 2], 2, "C"),
        (json.dumps(["3", "1", "2"]), 2, "C"),
        (["1", "2"], "1", "A"),
    ],
)
def test_a_number_is_the_place_of_an_option_or_its_text(tmp_path, options, answer, letter):
    path = write_lines(tmp_path / "b.jsonl", [{"problem": "p", "choices": options, "answer": answer}])
    assert load_benchmark(path)[0].answer == letter


@pytest.mark.parametrize(
    ("options", "answer", "reason"),
    [
        (["1", "2"], 1, "several"),
        ([1, 2], 1, "several"),
        (["$1$", "\\(2\\)"], 1, "several"),
        (["x", "2", "1.0"], 1, "several"),
        (["1.0", "2.0"], 1.0, "several"),
        (["3", "2", "1"], 2, "several"),
        (THREE, 3, "none"),
        (THREE, -1, "none"),
        (THREE, 1.5, "none"),
        ({"A": "x", "B": "y"}, 1, "none"),
        ({"A": "1", "B": "2"}, 1, "several"),
        ({"text": ["1", "2"], "label": ["A", "B"]}, 1, "several"),
    ],
)
def test_a_number_that_may_mean_two_options_or_none_is_refused(tmp_path, options, answer, reason):
    path = write_lines(tmp_path / "b.jsonl", [{"problem": "p", "choices": options, "answer": answer}])
    with pytest.raises(DataError, match=rf"b\.jsonl:1: the answer is {reason} of the options: answer"):
        load_benchmark(path)


def test_a_benchmark_whose_answer_is_no_option_is_refused(tmp_path):
    path = write_lines(tmp_path / "b.jsonl", [{"problem": "How long?", "options": THREE, "answer": 3}])
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
