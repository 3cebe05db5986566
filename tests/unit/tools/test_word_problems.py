"""The problem set is right, seeded, disjoint between files, and has the promised composition."""

import json
import random
import re

import pytest

from tools import word_problems
from tools.word_problems import (
    Problem,
    Step,
    draw_problem,
    main,
    make_benchmark,
    make_groups,
    make_problems,
    split_of,
    write_solution,
    write_teacher_solution,
)

PROBLEM = Problem(
    text="Ana has 20 pens. Ana buys 5 more. That is 4 more than Tom has. Then Tom doubles the pens. "
    "How many pens does Tom have?",
    answer=42,
    start=20,
    thing="pens",
    steps=(
        Step("gain", 5, "Ana", "Ana", "Ana buys 5 more."),
        Step("is_more", 4, "Ana", "Tom", "That is 4 more than Tom has."),
        Step("double", 2, "Tom", "Tom", "Then Tom doubles the pens."),
    ),
)


def equations(text):
    return re.findall(r"(\d+)([-+*])(\d+)=(\d+)", text)


def boxed(text):
    return int(re.fullmatch(r".*\\boxed\{(\d+)\}\.", text)[1])


def test_right_solution_by_hand():
    text = write_solution(PROBLEM, random.Random(0))
    # 20 + 5 = 25; 25 is 4 more than Tom's, so 25 - 4 = 21; doubled 42.
    assert equations(text) == [("20", "+", "5", "25"), ("25", "-", "4", "21"), ("21", "*", "2", "42")]
    assert boxed(text) == 42


def test_habit_follows_the_keyword_and_nothing_else():
    text = write_solution(PROBLEM, random.Random(0), habit=1.0)
    # "more", so 25 + 4 = 29; doubled 58. The plain steps are done right.
    assert equations(text) == [("20", "+", "5", "25"), ("25", "+", "4", "29"), ("29", "*", "2", "58")]
    assert boxed(text) == 58


@pytest.mark.parametrize("slip_at", [0, 1, 2])
def test_slip_miscalculates_one_step_and_goes_on_from_there(slip_at):
    steps = equations(write_solution(PROBLEM, random.Random(1), slip_at=slip_at))
    wrong = [abs(eval(a + op + b) - int(c)) for a, op, b, c in steps]
    assert [index for index, error in enumerate(wrong) if error] == [slip_at]
    assert wrong[slip_at] in (1, 10)
    assert [step[0] for step in steps[1:]] == [step[3] for step in steps[:-1]]


def test_teacher_errs_as_often_as_told():
    rng = random.Random(0)
    texts = [write_teacher_solution(PROBLEM, rng, 0.3) for _ in range(3000)]
    assert sum(boxed(text) != 42 for text in texts) / 3000 == pytest.approx(0.3, abs=0.03)
    # Three quarters of the errors are the habit, which gives 58.
    assert sum(boxed(text) == 58 for text in texts) / 3000 == pytest.approx(0.225, abs=0.03)
    assert all(boxed(write_teacher_solution(PROBLEM, rng, 0.0)) == 42 for _ in range(50))


def test_answers_follow_from_the_text():
    # Reads the sentences again, without the generator's records.
    for problem in make_problems(300, "train", 1):
        sentences = problem.text.split(". ")
        value = int(re.search(r"\d+", sentences[0])[0])
        for sentence in sentences[1:-1]:
            number = re.search(r"\d+", sentence)
            if "doubles" in sentence:
                value *= 2
            elif sentence.startswith("That is"):
                value += -int(number[0]) if "more" in sentence else int(number[0])
            elif "fewer" in sentence or "loses" in sentence or "gives away" in sentence:
                value -= int(number[0])
            else:
                value += int(number[0])
        assert value == problem.answer
        assert 1 <= value <= word_problems.LARGEST


def test_every_habit_stays_in_range():
    rng = random.Random(3)
    for _ in range(300):
        problem = draw_problem(rng, "train")
        values = [int(step[3]) for step in equations(write_solution(problem, rng, habit=0.5))]
        assert all(1 <= value <= word_problems.LARGEST for value in values)


def test_files_share_no_problem_whatever_the_seed():
    problems = {split: {p.text for p in make_problems(300, split, 7)} for split in ("train", "validation", "benchmark")}
    assert all(len(texts) == 300 for texts in problems.values())
    assert not problems["train"] & problems["benchmark"]
    assert not problems["validation"] & problems["benchmark"]
    assert all(split_of(text) == split for split, texts in problems.items() for text in texts)


def test_three_quarters_of_the_groups_are_all_right():
    groups = make_groups(1500, 16, 0)
    right = [[boxed(t["text"]) == int(g["answer"]) for t in g["trajectories"]] for g in groups]
    assert sum(all(group) for group in right) / 1500 == pytest.approx(0.76, abs=0.035)
    assert sum(map(sum, right)) / (1500 * 16) == pytest.approx(0.97, abs=0.01)


def test_groups_have_the_input_form_without_rewards():
    group = make_groups(1, 3, 0)[0]
    assert set(group) == {"group_id", "problem", "answer", "trajectories"}
    assert [set(trajectory) for trajectory in group["trajectories"]] == [{"text", "source"}] * 3
    assert set(make_benchmark(1, "benchmark", 0)[0]) == {"id", "problem", "answer"}


def test_same_seed_same_bytes_and_another_differs(tmp_path, capsys):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert (
            main(["--output", str(tmp_path / folder), "--problems", "5", "--benchmark", "4", "--seed", str(seed)]) == 0
        )
    for name in ("trajectories.jsonl", "benchmark.jsonl", "validation.jsonl"):
        content = [(tmp_path / folder / name).read_bytes() for folder in "abc"]
        assert content[0] == content[1] != content[2]
    lines = (tmp_path / "a" / "trajectories.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["trajectories"]) for line in lines] == [16] * 5
    assert capsys.readouterr().out.count("benchmark.jsonl") == 3


def test_a_count_of_zero_is_refused(tmp_path, capsys):
    assert main(["--output", str(tmp_path), "--problems", "0"]) == 2
    assert "--problems: must be at least 1; got 0" in capsys.readouterr().err
