"""The numbers of a comparison: rows for the terminal, CSV and XLSX."""

import re
from pathlib import Path
from typing import Any

from openpyxl import Workbook
from openpyxl.styles import Font
from openpyxl.worksheet.worksheet import Worksheet

from megatron_offgrpo.reporting.comparison_runs import Difference, Run

Row = list[Any]
FIGURES = {"problems": "count", "samples a problem": "count", "mean response tokens": "count"}
"""Kinds of the rows that are no shares."""
DIFFERENCES = {
    "difference": "points",
    "95 % low, over new problems": "points",
    "95 % high, over new problems": "points",
    "95 % low, over new samples": "points",
    "95 % high, over new samples": "points",
    "p": "p",
    "p, corrected (Holm)": "p",
    "detectable with 80 % power": "size",
    "problems better": "count",
    "problems worse": "count",
    "problems equal": "count",
}
SHOWN_CHARACTERS = 300
_NOT_IN_XML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")


def figure_rows(runs: list[Run]) -> list[Row]:
    """[name, value of each run]; None where a run lacks it."""
    rows: list[Row] = []

    def add(name: str, *path: str) -> None:
        values = [_at(run.metrics, path) for run in runs]
        if any(value is not None for value in values):
            rows.append([name, *values])

    def add_interval(name: str, *path: str) -> None:
        for side, number in (("low", 0), ("high", 1)):
            values = [_at(run.metrics, path) for run in runs]
            if any(value is not None for value in values):
                rows.append([f"95 % {side}, {name}", *(value and value[number] for value in values)])

    add("accuracy (avg@k)", "accuracy")
    add_interval("over new problems", "ci95_new_problems")
    add_interval("over new samples", "ci95_new_samples")
    add("majority (maj@k)", "majority")
    ks = sorted({int(k) for run in runs for k in run.metrics["pass_at"]} - {1})
    for k in ks:
        add(f"pass@{k}", "pass_at", str(k))
    add("strict accuracy", "strict", "accuracy")
    add("strict majority", "strict", "majority")
    add("mean response tokens", "mean_tokens")
    add("cut at the limit", "truncated_share")
    add("no box after the thinking", "no_box_share")
    add("empty", "empty_share")
    add("problems", "problems")
    add("samples a problem", "samples_per_problem")
    return rows


def difference_rows(found: list[Difference]) -> list[Row]:
    """[name, value of each later run against the first], names as in `DIFFERENCES`."""
    columns = []
    for one in found:
        comparison = one.comparison
        low, high = comparison.ci95 or (None, None)
        low_samples, high_samples = comparison.ci95_new_samples or (None, None)
        equal = comparison.num_problems - comparison.better - comparison.worse
        counts = (comparison.better, comparison.worse, equal)
        values = (comparison.difference, low, high, low_samples, high_samples, comparison.p_value, one.adjusted_p)
        columns.append((*values, comparison.detectable, *counts))
    return [[name, *(column[place] for column in columns)] for place, name in enumerate(DIFFERENCES)]


def write_xlsx(path: Path, runs: list[Run], found: list[Difference]) -> None:
    """Three sheets: figures, differences, and the accuracy of each run on each problem."""
    book = Workbook()
    first = book.active
    first.title = "figures"
    _fill(first, ["figure", *(run.label for run in runs)], figure_rows(runs))
    _fill(
        book.create_sheet("differences"),
        [f"against {runs[0].label}", *(o.run.label for o in found)],
        difference_rows(found),
    )
    rates = [run.correct_PK.mean(axis=1) for run in runs]
    rows = [
        [name, problem[:SHOWN_CHARACTERS], answer, *(float(rate[place]) for rate in rates)]
        for place, (name, (problem, answer)) in enumerate(runs[0].problems.items())
    ]
    _fill(book.create_sheet("problems"), ["id", "problem", "answer", *(run.label for run in runs)], rows)
    book.save(path)


def _fill(sheet: Worksheet, header: Row, rows: list[Row]) -> None:
    for number, row in enumerate([header, *rows], start=1):
        for column, value in enumerate(row, start=1):
            cell = sheet.cell(number, column)
            if isinstance(value, str):
                cell.value = _NOT_IN_XML.sub("", value)
                cell.data_type = "s"  # a text that begins with = is no formula
            else:
                cell.value = value
            if number == 1:
                cell.font = Font(bold=True)
    sheet.freeze_panes = "B2"
    sheet.column_dimensions["A"].width = 32


def _at(metrics: dict[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = metrics
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value
