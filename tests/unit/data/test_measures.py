"""Measures of texts, filters and decontamination, worked out by hand."""

import math

import numpy as np
import pytest

from megatron_offgrpo.data.decontamination import BenchmarkIndex, read_problems
from megatron_offgrpo.data.filters import group_finding, problem_finding, trajectory_findings
from megatron_offgrpo.data.labelling import LabelledGroup
from megatron_offgrpo.data.near_duplicates import NUM_PERMUTATIONS, bands_and_rows, linked_heads, signatures
from megatron_offgrpo.data.text_measures import (
    compression_ratio,
    foreign_share,
    jaccard,
    normalised,
    shingles,
    words,
)
from megatron_offgrpo.data_config import FilterConfig
from megatron_offgrpo.errors import DataError
from megatron_offgrpo.types import GroupRecord, TrajectoryRecord
from tests.unit.data.tiny import write_lines


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Find $x + 1$.", "find \\( x+1 \\)", True),
        (r"\left( a \right)", "(A)", True),
        ("What is 2?", "What\n is  2?", True),
        ("x + 1", "x - 1", False),
        ("1.5", "15", False),
        ("ﬁnd", "find", True),
    ],
)
def test_normalised(one, other, same):
    assert (normalised(one) == normalised(other)) is same


def test_words_and_shingles():
    assert words("Find $\\frac{1}{2}$ of x_1!") == ["find", "frac", "1", "2", "of", "x", "1"]
    assert shingles("a b c d") == {"a b c", "b c d"}
    assert shingles("a b") == {"a b"}
    # Four words against the same with one more: {abc, bcd} and {abc, bcd, cde}.
    assert jaccard(shingles("a b c d"), shingles("a b c d e")) == 2 / 3


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("plain", 0.0),
        ("αβγ naïve ∑ 𝑥 ℝ", 0.0),
        ("12 + 3", 0.0),
        ("ab 数学", 0.5),
        ("при", 1.0),
        ("abc数", 0.25),
    ],
)
def test_foreign_share(text, share):
    assert foreign_share(text) == share


def test_compression_ratio_tells_loops():
    prose = " ".join(f"{math.sin(index):.6f}" for index in range(600))
    assert compression_ratio(prose) < 3
    assert compression_ratio("Wait, let me check again. " * 300) > 30
    counted = "".join(f"Wait, step {index}: let me check this once more. " for index in range(300))
    assert compression_ratio(counted) > 8
    # Only the end counts.
    assert compression_ratio("loop " * 5000 + prose) == compression_ratio(prose[-4000:])
    assert compression_ratio("") == 0.0


def labelled(texts, rewards, statuses=None):
    group = GroupRecord("g", "p", "2", tuple(TrajectoryRecord(text) for text in texts), origin="in:1")
    return LabelledGroup(group, tuple(rewards), tuple(statuses or ["ok"] * len(texts)))


def test_trajectory_filters_by_hand():
    texts = ["fine", "数学", "loop " * 900, " fine ", "no answer", "long"]
    group = labelled(texts, [1, 1, 0, 1, 0, 0], ["ok", "ok", "ok", "ok", "no_answer", "ok"])
    filters = FilterConfig(
        duplicate_trajectories=True,
        max_foreign_share=0.2,
        max_compression_ratio=12,
        drop_without_answer=True,
        drop_truncated=True,
        min_response_tokens=2,
    )
    found = trajectory_findings(group, filters, [2, 2, 9, 2, 2, 11], 10)
    assert {place: one.reason for place, one in found.items()} == {
        1: "foreign response",
        2: "repetition loop",
        3: "duplicate trajectory",
        4: "no final answer",
        5: "long response",
    }
    assert found[3].partner == "in:1 trajectory 0"
    assert trajectory_findings(group, filters, [1, 1, 1, 1, 1, 1], 10)[0].reason == "short response"
    assert trajectory_findings(group, FilterConfig(), None, 10) == {}


def test_group_filters_by_hand():
    filters = FilterConfig(min_pass_rate=0.25, max_pass_rate=0.75, min_trajectories=2)
    assert group_finding([1, 0, 0, 0], 4, filters) is None
    assert group_finding([1, 1, 1, 0], 4, filters) is None
    assert group_finding([0, 0, 0, 0], 4, filters).reason == "pass rate"
    assert group_finding([1, 1, 1, 1], 4, filters).detail == "1.000, asked for 0.25 to 0.75"
    assert group_finding([1, 0], 1, filters).reason == "too few trajectories"
    assert group_finding([1, 0], 0, FilterConfig()).reason == "too few trajectories"
    assert problem_finding("数学 a", FilterConfig(max_foreign_share=0.5)).reason == "foreign problem"
    assert problem_finding("数学 a", FilterConfig()) is None


def test_decontamination(tmp_path):
    bench = write_lines(
        tmp_path / "bench.jsonl",
        [{"question": "one two three four five six"}, {"problem": "Short one"}, {"prompt": "a b c d e f g"}],
    )
    array = tmp_path / "more.json"
    array.write_text('[{"prompt": "p q r s t"}]')
    index = BenchmarkIndex([str(bench), str(array)], 4)
    found = index.find("So: two, three FOUR five!")
    assert (found.partner, found.overlap) == (f"{bench}:1", "two three four five")
    assert index.find("two three four 5") is None
    assert index.find("  short ONE.").overlap == "the whole text"
    assert index.find("a short one here") is None
    assert index.find("x p q r s").partner == f"{array}:1"
    assert [where for where, _ in read_problems(bench)] == [f"{bench}:1", f"{bench}:2", f"{bench}:3"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "x", "unknown kind of input file"),
        ("a.json", "{", "a.json:1: malformed JSON"),
        ("a.json", "{}", "a benchmark record without a problem"),
        ("a.jsonl", "", "no problem in this benchmark"),
        ("a.jsonl", '{"x": 1}\n', "a benchmark record without a problem"),
        ("a.jsonl", "{\n", "a.jsonl:1: malformed JSON"),
    ],
)
def test_bad_benchmarks(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        list(read_problems(tmp_path / name))


def test_bands_reach_the_recall():
    for threshold in (0.5, 0.7, 0.8, 0.9, 0.95):
        bands, rows = bands_and_rows(threshold)
        assert bands * rows <= NUM_PERMUTATIONS
        assert 1 - (1 - threshold**rows) ** bands >= 0.999
    # 1 - (1 - 0.8^5)^25 = 0.99995 and 1 - (1 - 0.8^6)^21 = 0.9983.
    assert bands_and_rows(0.8) == (25, 5)


def sentence(generator, length):
    return [f"w{value}" for value in generator.integers(0, 500, length)]


def test_near_duplicates_are_those_of_all_pairs():
    """Random problems of 40 words and variants of some, linked as comparing all pairs would link them."""
    generator = np.random.default_rng(0)
    problems = [sentence(generator, 40) for _ in range(120)]
    for source in range(0, 120, 4):
        variant = list(problems[source])
        for place in generator.integers(0, 40, source % 5):
            variant[place] = "changed"
        problems.append(variant)
    problems = [" ".join(one) for one in problems]
    sets = [shingles(one) for one in problems]
    usable = np.ones(len(problems), bool)
    usable[0] = False
    head = linked_heads(signatures(problems), usable, 0.8, lambda a, b: jaccard(sets[a], sets[b]) >= 0.8)
    expected = list(range(len(problems)))
    for one in range(1, len(problems)):
        for other in range(1, one):
            if jaccard(sets[one], sets[other]) >= 0.8:
                expected[one] = min(expected[one], expected[other])
    assert head.tolist() == expected
    assert sum(place != first for place, first in enumerate(expected)) > 8
    # The problem that takes no part links nothing, though its copy (the first variant) is there.
    assert expected[120] == 120


def test_a_chain_of_similar_problems_is_one_cluster():
    words_ = [f"w{index}" for index in range(60)]
    problems = []
    for step in range(6):
        problems.append(" ".join(words_[step * 2 :] + [f"x{index}" for index in range(step * 2)]))
    sets = [shingles(one) for one in problems]
    assert jaccard(sets[0], sets[5]) < 0.8 <= jaccard(sets[0], sets[1])
    head = linked_heads(signatures(problems), np.ones(6, bool), 0.8, lambda a, b: jaccard(sets[a], sets[b]) >= 0.8)
    assert head.tolist() == [0] * 6
    copies = ["the very same problem again"] * 50
    assert linked_heads(signatures(copies), np.ones(50, bool), 0.9, lambda a, b: True).tolist() == [0] * 50
    assert signatures([]).shape == (0, NUM_PERMUTATIONS)
