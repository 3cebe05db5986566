"""`offgrpo compare`: models on the same problems, as a terminal table, CSV, XLSX and one self-contained HTML page."""

import csv
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_offgrpo.artifacts import atomic_folder
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.reporting import comparison_plots as own_plots
from megatron_offgrpo.reporting import plots
from megatron_offgrpo.reporting.comparison_runs import Difference, Run, Sample, differences, read_runs
from megatron_offgrpo.reporting.comparison_tables import DIFFERENCES, FIGURES, difference_rows, figure_rows, write_xlsx
from megatron_offgrpo.reporting.page import details, figure, page, paragraph, section, table, tiles

CSV_FILE, XLSX_FILE, HTML_FILE = "comparison.csv", "comparison.xlsx", "comparison.html"
SIGNIFICANT = 0.05
NUM_EXAMPLES = 4
SHOWN_CHARACTERS = 1500


def write_comparison(folders: list[Path], output: Path) -> tuple[list[Table], list[str]]:
    """Compares finished evaluations with the first of them; writes OUTPUT and returns what a terminal shows.

    Returns:
        tables for the terminal, and one sentence a run on what its difference shows.

    Raises:
        DataError: an evaluation is missing or damaged, or they are on different problems.
        ConfigError: OUTPUT is something else.
    """
    if output.exists() and not (output.is_dir() and (not any(output.iterdir()) or (output / HTML_FILE).is_file())):
        raise ConfigError("would overwrite something else", where=str(output), remedy="choose another output folder")
    runs = read_runs(folders)
    found = differences(runs)
    with atomic_folder(output) as folder:
        with (folder / CSV_FILE).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["figure", *(run.label for run in runs)], *figure_rows(runs)])
            csv.writer(file).writerows([[], ["difference", *(one.run.label for one in found)], *difference_rows(found)])
        write_xlsx(folder / XLSX_FILE, runs, found)
        (folder / HTML_FILE).write_text(_page(runs, found), encoding="utf-8")
    sentences = [sentence(runs[0], one) for one in found]
    return [
        _terminal(["", *(run.label for run in runs)], figure_rows(runs), FIGURES),
        *_differences(runs, found),
    ], sentences


def sentence(first: Run, one: Difference) -> str:
    """What a difference shows, with its uncertainty."""
    comparison, label = one.comparison, one.run.label
    numbers = f"{_points(comparison.difference)} points"
    if comparison.ci95 is not None:
        numbers += f", 95 % interval {_points(comparison.ci95[0])} to {_points(comparison.ci95[1])} over new problems"
    numbers += f", p {_p_value(one.adjusted_p)}"
    if one.adjusted_p < SIGNIFICANT:
        verb = "better" if comparison.difference > 0 else "worse"
        return f"{label} is {verb} than {first.label}: {numbers}."
    needed = (
        ""
        if comparison.detectable is None
        else f" {comparison.num_problems} such problems show differences from about {100 * comparison.detectable:.1f} "
        "points on."
    )
    return f"{label} against {first.label}: within noise, no difference can be shown ({numbers}).{needed}"


def _differences(runs: list[Run], found: list[Difference]) -> list[Table]:
    header = [f"against {runs[0].label}", *(one.run.label for one in found)]
    return [_terminal(header, difference_rows(found), DIFFERENCES)]


def _terminal(header: list[str], rows: list[list[Any]], shown: dict[str, str]) -> Table:
    made = Table(*header, header_style="bold")
    for column in made.columns[1:]:
        column.justify = "right"
    for name, *values in rows:
        made.add_row(name, *(_shown(value, shown.get(name, "share")) for value in values))
    return made


def _shown(value: Any, kind: str) -> str:
    if value is None or value == "":
        return "-"
    if kind == "share":
        return f"{100 * value:.1f} %"
    if kind == "points":
        return _points(value)
    if kind == "size":
        return f"{100 * value:.1f}"
    if kind == "p":
        return _p_value(value).removeprefix("= ")
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)


def _page(runs: list[Run], found: list[Difference]) -> str:
    noise = [one for one in found if one.adjusted_p >= SIGNIFICANT]
    num_problems = len(runs[0].problems)
    others = runs[1].label if len(found) == 1 else f"{len(found)} models"
    sections = [
        f"<h1>{escape(others)} against {escape(runs[0].label)}</h1>",
        *(paragraph(sentence(runs[0], one), "verdict") for one in found),
        *(f'<div class="notice">{paragraph(_notice(one, runs[0]))}</div>' for one in noise),
        tiles(
            [(f"{100 * run.metrics['accuracy']:.1f} %", run.label) for run in runs]
            + [(f"{num_problems}", "problems")]
            + [(f"{_samples(runs)}", "samples a problem")]
        ),
        _accuracy(runs),
        _differences_section(runs, found),
        _pass(runs),
        _lengths(runs),
        *(_flipped(runs[0], one) for one in found),
        _provenance(runs),
    ]
    return page("Comparison of evaluations", sections)


def _notice(one: Difference, first: Run) -> str:
    return (
        f"Within noise: the difference between {one.run.label} and {first.label} "
        f"({_points(one.comparison.difference)} points) is of a size that chance alone brings about on "
        f"{one.comparison.num_problems} problems. Do not report it as a gain or a loss."
    )


def _samples(runs: list[Run]) -> str:
    return " / ".join(dict.fromkeys(str(run.correct_PK.shape[1]) for run in runs))


def _accuracy(runs: list[Run]) -> str:
    rows = [
        (run.label, run.metrics["accuracy"], _interval(run.metrics["ci95_new_problems"]), own_plots.color_of(number))
        for number, run in enumerate(runs)
    ]
    body = [
        [name, *(_shown(value, FIGURES.get(name, "share")) for value in values)] for name, *values in figure_rows(runs)
    ]
    note = (
        "Bars: 95 % interval over new problems of this kind. Bars of two models may overlap although one is better: "
        "the problems are the same, so the differences below are the ones to read. Strict: the answer also stands in "
        "a box after the thinking."
    )
    return section(
        "Accuracy",
        figure(plots.accuracy_plot(rows), "accuracy with 95 % intervals", wide=True),
        paragraph(note, "soft"),
        table(["", *(run.label for run in runs)], body, number_columns=range(1, len(runs) + 1)),
    )


def _differences_section(runs: list[Run], found: list[Difference]) -> str:
    rows = [
        (one.run.label, one.comparison.difference, one.comparison.ci95, own_plots.color_of(number))
        for number, one in enumerate(found, start=1)
    ]
    body = [[name, *(_shown(value, DIFFERENCES[name]) for value in values)] for name, *values in difference_rows(found)]
    note = (
        "Paired by problem. Bars: 95 % interval over new problems (bootstrap of the problems' differences); p: "
        "sign-flip permutation of these differences, two-sided"
    ) + (f", corrected for {len(found)} comparisons (Holm)." if len(found) > 1 else ".")
    return section(
        f"Differences from {runs[0].label}",
        figure(own_plots.difference_plot(rows), "differences with 95 % intervals", wide=True),
        paragraph(note, "soft"),
        table(["", *(one.run.label for one in found)], body, number_columns=range(1, len(found) + 1)),
    )


def _pass(runs: list[Run]) -> str:
    curves = [
        (run.label, {int(k): float(v) for k, v in run.metrics["pass_at"].items()}, own_plots.color_of(number))
        for number, run in enumerate(runs)
    ]
    if all(len(values) < 2 for _, values, _ in curves):
        return ""
    note = (
        "Share of problems with a right answer among k samples (unbiased). "
        "A model may gain at k = 1 and lose at large k."
    )
    return section("pass@k", figure(own_plots.pass_plot(curves), "pass@k over k", wide=True), paragraph(note, "soft"))


def _lengths(runs: list[Run]) -> str:
    series = [
        (
            run.label,
            [sample.tokens for sample in run.samples],
            [sample.reward for sample in run.samples],
            own_plots.color_of(number),
        )
        for number, run in enumerate(runs)
    ]
    note = "Each point is an eighth of a run's responses, ordered by length, at their median length."
    drawn = figure(own_plots.length_accuracy_plot(series), "share right by response length", wide=True)
    return section("Length against correctness", drawn, paragraph(note, "soft"))


def _flipped(first: Run, one: Difference) -> str:
    ordered = sorted(one.by_problem.items(), key=lambda item: item[1])
    gains = [item for item in reversed(ordered) if item[1] > 0]
    losses = [item for item in ordered if item[1] < 0]
    parts = []
    for title, chosen, before in (("Better", gains, 0), ("Worse", losses, 1)):
        blocks = "".join(_example(first, one.run, name, before) for name, _ in chosen[:NUM_EXAMPLES])
        parts.append(f"<h3>{title}: {len(chosen)} of {len(ordered)} problems</h3>{blocks}")
    return section(f"Problems that flipped: {first.label} and {one.run.label}", *parts)


def _example(first: Run, other: Run, name: str, before: int) -> str:
    problem, answer = first.problems[name]
    columns = "".join(
        _column(run, run.of_problem(name), wanted) for run, wanted in ((first, before), (other, 1 - before))
    )
    asked = f"<p>{escape(problem)} <span class='soft'>Answer: {escape(answer)}</span></p>"
    return f'<div class="example">{asked}<div class="pair">{columns}</div></div>'


def _column(run: Run, samples: list[Sample], wanted: int) -> str:
    """The first sample with the wanted score; one exists, since the accuracies differ in that direction."""
    record = run.record(next(sample for sample in samples if sample.reward == wanted))
    text, word = record["text"], "right" if wanted else "wrong"
    shown = text if len(text) <= SHOWN_CHARACTERS else "... " + text[-SHOWN_CHARACTERS:]
    share = f"{sum(sample.reward for sample in samples)} of {len(samples)} samples right, {record['tokens']} tokens"
    return (
        f'<div><b>{escape(run.label)}</b> <span class="{word}">{word}</span> <span class="soft">({share})</span>\n'
        f"{escape(shown)}</div>"
    )


def _provenance(runs: list[Run]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.config))
    rows = [[name, *(_text(run.config.get(name)) for run in runs)] for name in names]
    folders = [["folder", *(str(run.folder) for run in runs)]]
    return section(
        "Settings", details("Settings of each run", table(["", *(run.label for run in runs)], folders + rows))
    )


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {inner}" for name, inner in value.items() if inner is not None)
    return "" if value is None else str(value)


def _interval(value: Any) -> tuple[float, float] | None:
    return None if value is None else (float(value[0]), float(value[1]))


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"
