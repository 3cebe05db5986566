"""What the report shows of the training itself: curves, where its time went, what it left out."""

from collections.abc import Sequence
from pathlib import Path

from megatron_offgrpo.reporting import plots
from megatron_offgrpo.reporting.page import figure, paragraph, section, table
from megatron_offgrpo.reporting.plots import BASE, INK, RIGHT, WRONG, Line
from megatron_offgrpo.reporting.run_files import RunFiles

STAGES = {
    "batch_seconds": "making batches",
    "forward_backward_seconds": "forward and backward",
    "optimizer_seconds": "optimizer",
    "validation_seconds": "validation",
    "save_seconds": "saving",
}


def figures(steps: Sequence[dict[str, float]]) -> list[tuple[str, str]]:
    """Sizes and rates of the whole training: (value, what it is)."""
    if not steps:
        return []
    items = [(f"{len(steps)}", "optimizer steps")]
    skipped = sum(1 for row in steps if row.get("skipped"))
    if skipped:
        items.append((f"{skipped}", "bad steps skipped"))
    seconds = _total(steps, "seconds")
    if seconds and _total(steps, "packed_tokens"):
        items.append((f"{_total(steps, 'packed_tokens') / seconds:,.0f}", "training tokens per second"))
    if seconds and _total(steps, "model_flops_per_second"):
        flops = sum(row.get("model_flops_per_second", 0.0) * row.get("seconds", 0.0) for row in steps)
        items.append((f"{flops / seconds / 1e12:,.3g}", "model TFLOP/s, all ranks"))
    if any("mfu" in row for row in steps):
        mfu = sum(row.get("mfu", 0.0) * row.get("seconds", 0.0) for row in steps)
        items.append((f"{100 * mfu / seconds:.1f} %", "MFU"))
    if any("peak_memory_bytes" in row for row in steps):
        peak = max(row.get("peak_memory_bytes", 0.0) for row in steps)
        items.append((f"{peak / 2**20:,.0f} MiB", "peak memory of a rank"))
    return items


def curves(run: RunFiles) -> str:
    """The metrics of the steps."""
    if not run.steps:
        return ""
    wanted = [
        ("surrogate", "Reward-weighted loss", "sum over tokens", [Line("surrogate", INK)]),
        ("kl", "KL to the reference", "nats per token", [Line("kl", INK)]),
        ("entropy", "Entropy", "nats per token", [Line("entropy", INK)]),
        (
            "probability",
            "Token probability",
            "mean",
            [Line("probability_right", RIGHT, "right"), Line("probability_wrong", WRONG, "wrong")],
        ),
        ("margin", "Margin right minus wrong", "probability", [Line("probability_margin", INK)]),
        (
            "logp",
            "Log-probability",
            "mean, nats",
            [Line("logp_right", RIGHT, "right"), Line("logp_wrong", WRONG, "wrong")],
        ),
        ("gradient", "Gradient norm", "before clipping", [Line("grad_norm", INK)]),
        ("lr", "Learning rate", "", [Line("lr", INK)]),
        ("throughput", "Throughput", "tokens per second", [Line("tokens_per_second", INK)]),
        ("mfu", "Model FLOPs utilisation", "share of the peak rate", [Line("mfu", INK)]),
    ]
    drawn = [
        figure(plots.curve_plot(name, title, unit, run.steps, lines), f"{title} over the training steps")
        for name, title, unit, lines in wanted
    ]
    note = (
        "Right and wrong are the trajectories with reward 1 and 0 among those of the step; a step without a wrong one "
        "has no point. All-positive groups alone move the first, mixed groups both."
    )
    return section("Training", f'<div class="curves">{"".join(drawn)}</div>', paragraph(note, "soft"))


def time_by_stage(run: RunFiles) -> str:
    """Seconds of all steps, and of what comes between them."""
    rows = [(label, _total(run.steps, name), BASE) for name, label in STAGES.items() if _total(run.steps, name)]
    note = "Of the process that writes the log. The last save comes after the last line and is not in it."
    plot = plots.bar_plot("step_stages", rows, "seconds") if rows else ""
    return section(
        "Time of the training", figure(plot, "seconds by stage", wide=True), paragraph(note, "soft") if rows else ""
    )


def on_the_way(run: RunFiles) -> str:
    """Accuracy of the checkpoints."""
    if not run.on_the_way:
        return ""
    rows = []
    for step, benchmark, metrics in run.on_the_way:
        interval = metrics["ci95_new_problems"]
        between = "" if interval is None else f"{interval[0]:.1%} to {interval[1]:.1%}"
        rows.append([f"{step}", Path(benchmark).name, f"{metrics['accuracy']:.1%}", between])
    header = ["steps", "benchmark", "accuracy", "95 % interval over new problems"]
    return section("Accuracy on the way", table(header, rows, number_columns=(0, 2)))


def quarantine(run: RunFiles) -> str:
    """The trajectories that the run has left out, and why."""
    rollbacks = run.quarantine.get("rollbacks", [])
    rows = [
        [f"{number}", f"{bad['step']}", _members(bad), bad["reason"]]
        for number, rollback in enumerate(rollbacks, 1)
        for bad in rollback["bad_steps"]
    ]
    if not rows:
        return ""
    left_out = {index for rollback in rollbacks for bad in rollback["bad_steps"] for index in bad["trajectories"]}
    note = (
        f"{len(left_out)} trajectories are left out after {len(rollbacks)} rollback(s): the run "
        "went back to its newest checkpoint and on without the packs that these bad steps named."
    )
    header = ["rollback", "bad step", "trajectories (group)", "why"]
    return section("Quarantine", paragraph(note), table(header, rows, number_columns=(0, 1)))


def _members(bad: dict) -> str:
    # A file written by hand may name no groups.
    groups = bad.get("groups") or ["?"] * len(bad["trajectories"])
    return ", ".join(f"{index} ({group})" for index, group in zip(bad["trajectories"], groups, strict=True))


def _total(steps: Sequence[dict[str, float]], name: str) -> float:
    return sum(row.get(name, 0.0) for row in steps)
