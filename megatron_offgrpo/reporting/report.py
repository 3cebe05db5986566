"""The report of a run: one self-contained `report.html`."""

import os
from html import escape
from pathlib import Path
from typing import Any

from megatron_offgrpo.evaluation.statistics import Comparison
from megatron_offgrpo.reporting import examples, plots, training_part
from megatron_offgrpo.reporting.page import details, figure, page, paragraph, section, table, tiles
from megatron_offgrpo.reporting.plots import BASE, FINAL, RIGHT, TEACHER, WRONG
from megatron_offgrpo.reporting.run_files import EvaluationFiles, RunFiles, read_run

REPORT = "report.html"
SIGNIFICANT = 0.05


def write_report(run_dir: Path) -> Path:
    """Writes RUN_DIR/report.html from what the run left on disk, and returns its path; absent parts are named in it.

    Raises:
        DataError: the folder holds nothing to report, or a damaged file.
    """
    run = read_run(Path(run_dir))
    name = run.manifest.get("config", {}).get("name") or run.folder.name
    comparison = run.comparison()
    sections = [
        f"<h1>{escape(f'Offline GRPO run: {name}')}</h1>",
        paragraph(verdict(run, comparison[0] if comparison else None), "verdict"),
        _tiles(run),
        "".join(f'<div class="notice">{paragraph(text)}</div>' for text in run.absent),
        _accuracy(run, comparison[0] if comparison else None),
        training_part.on_the_way(run),
        training_part.curves(run),
        training_part.time_by_stage(run),
        training_part.quarantine(run),
        _lengths(run),
        _groups(run),
        _weight_check(run),
        examples.examples_section(run, comparison[1] if comparison else []),
        _stages(run),
        _configuration(run),
        _provenance(run),
    ]
    path = run.folder / REPORT
    temporary = path.with_name(f".{REPORT}.{os.getpid()}.tmp")
    temporary.write_text(page(f"{name}: report", sections), encoding="utf-8")
    os.replace(temporary, path)
    return path


def verdict(run: RunFiles, comparison: Comparison | None) -> str:
    """What the run shows, in one sentence, with its uncertainty."""
    if comparison is None or run.base is None or run.final is None:
        return (
            f"{len(run.steps)} training steps. Base and trained model were not both evaluated, so no gain is claimed."
        )
    base, final = run.base.metrics["accuracy"], run.final.metrics["accuracy"]
    interval = (
        ""
        if comparison.ci95 is None
        else f", 95 % interval {_points(comparison.ci95[0])} to {_points(comparison.ci95[1])}"
    )
    evidence = (
        f"{_points(comparison.difference)} points{interval}; paired permutation test p {_p_value(comparison.p_value)}, "
        f"{comparison.num_problems} held-out problems x {run.final.metrics['samples_per_problem']} samples"
    )
    if comparison.p_value >= SIGNIFICANT:
        return f"No difference can be shown: accuracy {_percent(base)} before and {_percent(final)} after ({evidence})."
    verb = "rose" if comparison.difference > 0 else "fell"
    return f"Accuracy on held-out problems {verb} from {_percent(base)} to {_percent(final)} ({evidence})."


def _tiles(run: RunFiles) -> str:
    items: list[tuple[str, str]] = []
    for evaluation, label in ((run.base, "base accuracy"), (run.final, "trained accuracy")):
        if evaluation is not None:
            items.append((_percent(evaluation.metrics["accuracy"]), label))
    items += training_part.figures(run.steps)
    if run.summary.get("stage_seconds"):
        items.append((f"{sum(run.summary['stage_seconds'].values()):.0f} s", "all stages"))
    return tiles(items)


def _accuracy(run: RunFiles, comparison: Comparison | None) -> str:
    found = [
        (label, evaluation, color)
        for label, evaluation, color in (("base", run.base, BASE), ("trained", run.final, FINAL))
        if evaluation is not None
    ]
    if not found:
        return ""
    rows = [
        (label, evaluation.metrics["accuracy"], _interval(evaluation.metrics["ci95_new_problems"]), color)
        for label, evaluation, color in found
    ]
    figures = [_accuracy_rows(label, evaluation) for label, evaluation, _ in found]
    body = [[name, *(values[name] for values in figures)] for name in figures[0] if all(name in v for v in figures)]
    paired = ""
    if comparison is not None:
        paired = paragraph(
            f"Paired: {comparison.better} problems better, {comparison.worse} worse, "
            f"{comparison.num_problems - comparison.better - comparison.worse} equal; p {_p_value(comparison.p_value)} "
            "(sign-flip permutation of the problems' differences, two-sided)."
        )
    note = (
        "Bars: 95 % interval over new problems of this kind (bootstrap of problems). The table also has the "
        "interval over new samples of these very problems: it does not say how the model does on others."
    )
    return section(
        "Accuracy",
        figure(plots.accuracy_plot(rows), "accuracy with 95 % intervals", wide=True),
        paragraph(note, "soft"),
        paired,
        table(["", *(label for label, _, _ in found)], body, number_columns=range(1, len(found) + 1)),
    )


def _accuracy_rows(label: str, evaluation: EvaluationFiles) -> dict[str, str]:
    metrics = evaluation.metrics
    rows = {"accuracy (avg@k)": _percent(metrics["accuracy"])}
    for name, title in (("ci95_new_problems", "over new problems"), ("ci95_new_samples", "over new samples")):
        interval = _interval(metrics[name])
        rows[f"95 % interval {title}"] = (
            "-" if interval is None else f"{_percent(interval[0])} to {_percent(interval[1])}"
        )
    rows |= {f"pass@{k}": _percent(value) for k, value in metrics["pass_at"].items() if k != "1"}
    rows["mean response tokens"] = f"{metrics['mean_tokens']:.1f}"
    rows["responses cut at the limit"] = _percent(metrics["truncated_share"])
    counts = metrics["statuses"]
    rows["responses without an answer"] = _percent(counts.get("no_answer", 0) / max(1, sum(counts.values())))
    rows["problems x samples"] = f"{metrics['problems']} x {metrics['samples_per_problem']}"
    rows["back end"] = str(metrics["backend"])
    return rows


def _lengths(run: RunFiles) -> str:
    series = []
    for evaluation, label, color in ((run.base, "base", BASE), (run.final, "trained", FINAL)):
        if evaluation is not None:
            series.append((label, [record["tokens"] for record in evaluation.graded], color))
    if run.teacher_lengths:
        series.append(("teacher", run.teacher_lengths, TEACHER))
    return section("Response lengths", figure(plots.length_plot(series), "histogram", wide=True)) if series else ""


def _groups(run: RunFiles) -> str:
    names = (("all_positive", "all right", RIGHT), ("mixed", "mixed", TEACHER), ("all_negative", "all wrong", WRONG))
    rows = [(label, float(run.groups[name]), color) for name, label, color in names if name in run.groups]
    if not rows:
        return ""
    note = "Groups that are all right carry no signal in plain GRPO; here they pull with the all-positive bias."
    return section(
        "Trajectory groups", figure(plots.bar_plot("groups", rows, "groups"), note, wide=True), paragraph(note, "soft")
    )


def _weight_check(run: RunFiles) -> str:
    """By how much trainer, Transformers and vLLM differ on the same tokens."""
    check = run.weight_check
    if not check:
        return ""
    rows = [
        [f"{one['first']} and {one['second']}", f"{one['mean_abs']:.2e}", f"{one['max_abs']:.2e}"]
        for one in check["pairs"]
    ]
    found = "compute the same model" if check["agree"] else "do NOT compute the same model"
    note = (
        f"On {check['tokens']:,} tokens of {check['trajectories']} trajectories they {found}: a mean of at most "
        f"{check['largest_mean_allowed']:g} counts as rounding."
    )
    header = ["log-probs of", "mean difference (nats)", "largest"]
    return section("Same weights everywhere?", table(header, rows, number_columns=(1, 2)), paragraph(note, "soft"))


def _stages(run: RunFiles) -> str:
    seconds: dict[str, float] = run.summary.get("stage_seconds") or {}
    rows = [(name, float(value), BASE) for name, value in seconds.items()]
    return (
        section("Time by stage", figure(plots.bar_plot("stages", rows, "seconds"), "seconds", wide=True))
        if rows
        else ""
    )


def _configuration(run: RunFiles) -> str:
    config = run.manifest.get("config", {})
    parts = [details(name, table(["", ""], _flat(value))) for name, value in config.items() if isinstance(value, dict)]
    plain = [(name, _text(value)) for name, value in config.items() if not isinstance(value, dict)]
    if run.summary.get("layout"):
        plain.append(("layout", ", ".join(f"{name} {value}" for name, value in run.summary["layout"].items())))
    for evaluation, label in (
        (run.base, "evaluation of the base model"),
        (run.final, "evaluation of the trained model"),
    ):
        if evaluation is not None:
            parts.append(details(label, table(["", ""], _flat(evaluation.manifest.get("config", {})))))
    return section("Configuration", table(["", ""], plain), *parts)


def _provenance(run: RunFiles) -> str:
    rows = [(f"training: {name}", value) for name, value in run.manifest.get("inputs", {}).items()]
    if run.manifest:
        rows.append(("training run", run.manifest["fingerprint"]))
    for evaluation, label in ((run.base, "base evaluation"), (run.final, "trained evaluation")):
        if evaluation is not None:
            rows += [(f"{label}: {name}", value) for name, value in evaluation.manifest["inputs"].items()]
    if run.manifest:
        rows.append(("code version", str(run.manifest.get("code_version", "unknown"))))
    return section("Fingerprints of what it was made from", table(["artefact", "fingerprint"], rows))


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        return [row for name, inner in value.items() for row in _flat(inner, f"{prefix}.{name}" if prefix else name)]
    return [(prefix, _text(value))]


def _text(value: Any) -> str:
    return "none" if value is None or value == {} else str(value)


def _interval(value: Any) -> tuple[float, float] | None:
    return None if value is None else (float(value[0]), float(value[1]))


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"
