"""Overlap of a benchmark with training problems: thirteen words in a row, or the whole text."""

from megatron_offgrpo.evaluation.benchmarks import Question
from megatron_offgrpo.evaluation.contamination import overlapping

WORDS = [f"w{number}" for number in range(20)]


def questions(*problems):
    return [Question(str(number), problem, "1") for number, problem in enumerate(problems)]


def test_thirteen_words_in_a_row_are_an_overlap_and_twelve_are_not():
    asked = questions(" ".join(WORDS))
    assert overlapping(asked, ["Before, " + " ".join(WORDS[3:16]).upper() + "!"]) == ["0"]
    assert overlapping(asked, ["Before " + " ".join(WORDS[3:15]) + " and then " + " ".join(WORDS[15:20])]) == []


def test_a_short_problem_counts_whole():
    asked = questions("What is $1+1$?", "What is 2+2?")
    assert overlapping(asked, ["what is 1 + 1?", "What is 3+3?"]) == ["0"]
    assert overlapping(asked, ["so: what is 1+1?"]) == []


def test_every_question_that_overlaps_is_named_in_order():
    shared = " ".join(WORDS)
    asked = questions("other", f"first {shared}", f"{shared} second")
    assert overlapping(asked, [shared]) == ["1", "2"]
