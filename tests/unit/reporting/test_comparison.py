"""`offgrpo compare`: the page, the tables, and runs that do not belong together."""

import csv
import json
import re

import openpyxl
import pytest

from megatron_offgrpo.errors import ConfigError, DataError
from megatron_offgrpo.reporting.comparison import sentence, write_comparison
from megatron_offgrpo.reporting.comparison_plots import binned
from megatron_offgrpo.reporting.comparison_runs import differences, holm, read_runs
from tests.unit.reporting.run_folder import write_evaluation

BASE = [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    write_evaluation(folder / "base", BASE)
    write_evaluation(folder / "trained", [min(4, right + 2) for right in BASE], seed=1)
    write_evaluation(folder / "lucky", [1, 0, *BASE[2:]], seed=2)
    return folder


def compared(root, output, *names):
    return write_comparison([root / name for name in names], output)


def test_a_clear_difference(root, tmp_path):
    tables, sentences = compared(root, tmp_path / "out", "base", "trained")
    # 21 of 48 against 39 of 48 samples; every difference is positive or 0.
    assert sentences[0].startswith("trained is better than base: +37.5 points, 95 % interval ")
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "trained against base" in page
    assert "Within noise" not in page
    assert len(tables) == 2
    assert "src=" not in page
    assert "https://" not in re.sub(r'xmlns\S*"', "", page).replace("http://www.w3.org", "")


def test_noise_is_called_noise(root, tmp_path):
    _, sentences = compared(root, tmp_path / "out", "base", "lucky")
    assert "lucky against base: within noise, no difference can be shown (+0.0 points" in sentences[0]
    assert "12 such problems show differences from about" in sentences[0]
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "Within noise: the difference between lucky and base" in page
    assert "Do not report it as a gain or a loss" in page


def test_flipped_problems_stand_side_by_side_and_are_escaped(root, tmp_path):
    compared(root, tmp_path / "out", "base", "lucky")
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "Better: 1 of 12 problems" in page
    assert "Worse: 1 of 12 problems" in page
    better = page[page.index("Better: 1") : page.index("Worse: 1")]
    assert better.index("so \\boxed{13}") < better.index("so \\boxed{7}")  # wrong before, right after
    worse = page[page.index("Worse: 1") :]
    assert worse.index("so \\boxed{7}") < worse.index("so \\boxed{13}")
    assert "Problem 0: is 3 &lt; 4 &amp; 4 &gt; 3?" in better


def test_long_answers_are_shown_by_their_end(tmp_path):
    write_evaluation(tmp_path / "a", [0, 2], text="start " + "x" * 5000 + " \\boxed{{{value}}}")
    write_evaluation(tmp_path / "b", [1, 2])
    compared(tmp_path, tmp_path / "out", "a", "b")
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "... x" in page
    assert "start x" not in page


def test_csv_and_xlsx_hold_the_figures(root, tmp_path):
    compared(root, tmp_path / "out", "base", "trained", "lucky")
    with (tmp_path / "out" / "comparison.csv").open(newline="") as file:
        rows = {row[0]: row[1:] for row in csv.reader(file) if row}
    assert rows["figure"] == ["base", "trained", "lucky"]
    assert [float(value) for value in rows["accuracy (avg@k)"]] == pytest.approx([21 / 48, 39 / 48, 21 / 48])
    assert [float(value) for value in rows["difference"]] == pytest.approx([18 / 48, 0])
    book = openpyxl.load_workbook(tmp_path / "out" / "comparison.xlsx")
    assert book.sheetnames == ["figures", "differences", "problems"]
    assert [cell.value for cell in book["figures"][1]] == ["figure", "base", "trained", "lucky"]
    problems = list(book["problems"].values)
    assert problems[0] == ("id", "problem", "answer", "base", "trained", "lucky")
    assert problems[1] == ("p0", "Problem 0: is 3 < 4 & 4 > 3?", "7", 0, 0.5, 0.25)


def test_texts_that_excel_would_run_or_refuse(tmp_path):
    for name in ("a", "b"):
        write_evaluation(tmp_path / name, [1, 2])
        graded = tmp_path / name / "graded.jsonl"
        lines = [json.loads(line) | {"problem": "=1+1\x07", "answer": "=2"} for line in graded.read_text().splitlines()]
        graded.write_text("".join(json.dumps(line) + "\n" for line in lines))
    compared(tmp_path, tmp_path / "out", "a", "b")
    row = openpyxl.load_workbook(tmp_path / "out" / "comparison.xlsx")["problems"][2]
    assert [(cell.value, cell.data_type) for cell in row[1:3]] == [("=1+1", "s"), ("=2", "s")]


def test_runs_on_different_problems_are_refused(root, tmp_path):
    write_evaluation(tmp_path / "fewer", BASE[:-1])
    with pytest.raises(
        DataError, match=r"different problems; expected the 12 problems .*got 1 problems are missing, 0"
    ):
        write_comparison([root / "base", tmp_path / "fewer"], tmp_path / "out")
    write_evaluation(tmp_path / "other", BASE, text="x")
    graded = tmp_path / "other" / "graded.jsonl"
    graded.write_text(graded.read_text().replace('"answer": "7"', '"answer": "8"'))
    with pytest.raises(DataError, match="12 problems of the same name with another text or answer"):
        write_comparison([root / "base", tmp_path / "other"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mistakes_are_named(root, tmp_path):
    with pytest.raises(DataError, match="needs two"):
        write_comparison([root / "base"], tmp_path / "out")
    with pytest.raises(DataError, match="no finished evaluation"):
        write_comparison([root / "base", tmp_path], tmp_path / "out")
    with pytest.raises(DataError, match="one folder stands twice"):
        write_comparison([root / "base", root / "base"], tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="would overwrite something else"):
        compared(root, tmp_path / "mine", "base", "lucky")
    write_evaluation(tmp_path / "torn", BASE)
    (tmp_path / "torn" / "graded.jsonl").write_text('{"problem_id": "p0"')
    with pytest.raises(DataError, match=r"damaged evaluation.*evaluate again"):
        write_comparison([root / "base", tmp_path / "torn"], tmp_path / "out")


def test_labels_are_the_ends_of_the_paths_that_differ(tmp_path):
    for name in ("x/eval", "y/eval"):
        write_evaluation(tmp_path / name, [1, 2])
    assert [run.label for run in read_runs([tmp_path / "x/eval", tmp_path / "y/eval"])] == ["x/eval", "y/eval"]


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.9: times 4, 3, 2, 1 is 0.04, 0.06, 0.06, 0.9, and never below an earlier one.
    assert holm([0.02, 0.9, 0.01, 0.03]) == pytest.approx([0.06, 0.9, 0.04, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_several_runs_are_corrected_for_their_number(root):
    runs = read_runs([root / "base", root / "trained", root / "lucky"])
    found = differences(runs)
    assert found[0].adjusted_p == pytest.approx(2 * found[0].comparison.p_value)
    assert "trained is better than base" in sentence(runs[0], found[0])


def test_bins_hold_equal_shares():
    # Sixteen responses in eight bins of two: lengths 1..16, the longer half wrong.
    lengths, right = binned(list(range(1, 17)), [1] * 8 + [0] * 8)
    assert lengths == [1.5, 3.5, 5.5, 7.5, 9.5, 11.5, 13.5, 15.5]
    assert right == [1, 1, 1, 1, 0, 0, 0, 0]
