"""The report of a study: tables and plots from what `study.json` holds; see docs/study.md."""

from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from megatron_offgrpo.reporting import page
from megatron_offgrpo.reporting.plots import BASE, FINAL, STYLE, TEACHER, accuracy_plot, as_svg

MAIN = "0.6"
HEADER = (
    "arm", "rate", "T 0", "T 0.6", "T 1", "pass@4, T 1", "level 1", "level 2", "retention", "adjusted", "KL", "entropy",
    "steps", "tokens", "seconds",
)  # fmt: skip
DIFFERENCES = {"base": ("0.0", MAIN, "retention"), "bias": (MAIN,), "sft": (MAIN,)}
"""Which of an arm's differences are shown: to an arm, in an accuracy or in retention."""
NAMED = {"0.0": "T 0", MAIN: "T 0.6", "retention": "retention", "base": "base", "bias": "released", "sft": "SFT"}
CLAIMS = ("claim", "compared", "figure", "95 % interval", "verdict")
Summary = dict[str, Any]


def study_page(summary: Summary, title: str) -> str:
    """One self-contained HTML page."""
    arms, teacher, drawn = summary["arms"], summary["teacher"], plots(summary)
    return page.page(
        title,
        [
            f"<h1>{title}</h1>",
            page.paragraph(f"{summary['command']}; design and claims: docs/study.md", "soft"),
            page.tiles(
                [
                    (str(len(summary["seeds"])), "seeds"),
                    (str(summary["problems"]), "test problems"),
                    (str(summary["runs"]), "runs"),
                    (f"{summary['cpu_seconds'] / 60:.0f} min", "CPU time of the runs"),
                    (f"{teacher['accuracy']:.1%}", "of the teacher's solutions right"),
                    (f"{teacher['all_positive_share']:.0%}", "of the groups all-positive"),
                ]
            ),
            page.section("Claims", claims_table(summary["claims"])),
            page.section(
                "Accuracy at temperature 0.6",
                page.figure(drawn["accuracy"], "accuracy of every arm with its interval", wide=True),
            ),
            page.section(
                "Accuracy and what is forgotten",
                page.figure(drawn["retention"], "accuracy over retention, one point an arm", wide=True),
            ),
            page.section(
                "Tokens and seconds to an accuracy",
                page.figure(drawn["tokens"], "accuracy over tokens", wide=True),
                page.figure(drawn["seconds"], "accuracy over seconds", wide=True),
                page.table(*times(arms), number_columns=(1, 2)),
            ),
            page.section("All figures", arms_table(arms)),
            page.section("Differences", page.table(*differences(arms), number_columns=range(1, 6))),
            page.section("Learning rates tried", sweep_table(arms)),
        ],
    )


def plots(summary: Summary) -> dict[str, str]:
    """Every plot as an SVG element; empty where there is nothing to draw."""
    arms = summary["arms"]
    return {
        "accuracy": _accuracies(arms),
        "retention": retention_plot(arms),
        "tokens": curve_plot(arms, 0, "tokens"),
        "seconds": curve_plot(arms, 1, "seconds"),
    }


def claims_table(claims: Sequence[Summary]) -> str:
    """One row a claim."""
    return page.table(CLAIMS, [claim_row(one) for one in claims])


def claim_row(claim: Summary) -> list[str]:
    """A claim's cells."""
    value = claim.get("difference", claim.get("ratio"))
    kind = "difference" if "difference" in claim else "ratio of times"
    return [
        f"{claim['claim']}. {claim['text']}",
        f"{claim['second']} - {claim['first']}" if "difference" in claim else f"{claim['second']} / {claim['first']}",
        "none" if value is None else f"{kind} {value:.3f}",
        between(claim["ci95"]),
        claim["verdict"],
    ]


def between(interval: Sequence[float] | None) -> str:
    """An interval in words."""
    return "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def arm_row(arm: Summary) -> list[str]:
    """The figures of an arm, in the order of `HEADER`."""
    accuracy = arm["accuracy"]
    seconds = sum(arm[name] or 0.0 for name in ("train_seconds", "reference_seconds", "rollout_seconds"))
    return [
        arm["title"],
        f"{arm['lr']:g}" if arm["lr"] else "",
        f"{accuracy['0.0']['mean']:.3f}",
        f"{accuracy[MAIN]['mean']:.3f} ({between(accuracy[MAIN]['ci95'])})",
        f"{accuracy['1.0']['mean']:.3f}",
        f"{arm['pass_at_4']['1.0']:.3f}",
        f"{arm['levels']['level1']:.3f}",
        f"{arm['levels']['level2']:.3f}",
        f"{arm['retention']['mean']:.3f} ({between(arm['retention']['ci95'])})",
        f"{arm['adjusted']['mean']:.3f}",
        f"{round(arm['kl'], 3) + 0.0:.3f}",
        f"{arm['entropy']:.3f}",
        f"{arm['steps']:.0f}",
        f"{arm['tokens'] + (arm['rollout_tokens'] or 0):.0f}",
        f"{seconds:.1f}",
    ]


def arms_table(arms: Sequence[Summary]) -> str:
    """All arms."""
    return page.table(HEADER, [arm_row(arm) for arm in arms], number_columns=range(1, len(HEADER)))


def differences(arms: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: each arm minus the base student, the released objective and SFT, where the study has them."""
    there = {arm["name"] for arm in arms}
    shown = [(other, of) for other, ofs in DIFFERENCES.items() if other in there for of in ofs]
    rows = [
        [arm["title"], *(_difference(arm["versus"].get(other, {}).get(of)) for other, of in shown)]
        for arm in arms
        if arm["versus"]
    ]
    return ["arm", *(f"- {NAMED[other]}, {NAMED[of]}" for other, of in shown)], rows


def _difference(value: Summary | None) -> str:
    return "" if value is None else f"{value['mean']:+.3f} ({between(value['ci95'])})"


def sweep_table(arms: Sequence[Summary]) -> str:
    """Validation accuracy and retention at every rate."""
    rows = [[arm["title"], "; ".join(map(_rate, arm["sweep"]))] for arm in arms if arm["sweep"]]
    return page.table(("arm", "rate: accuracy, retention on the validation problems"), rows)


def _rate(one: Summary) -> str:
    figures = one.get("failed") or f"{one['accuracy']:.3f}, {one['retention']:.3f}"
    return f"{one['lr']:g}: {figures}"


def times(arms: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: tokens and seconds at which an arm has the accuracy that on-policy training ends with."""
    rows = [
        [arm["title"], *(_reached(arm["to_on_policy_accuracy"][name]) for name in ("tokens", "seconds"))]
        for arm in arms
        if arm["to_on_policy_accuracy"] and arm["curve"]
    ]
    return ["to the final accuracy of on-policy GRPO", "tokens", "seconds"], rows


def _reached(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _accuracies(arms: Sequence[Summary]) -> str:
    ordered = sorted(arms, key=lambda arm: arm["accuracy"][MAIN]["mean"])
    rows = []
    for arm in ordered:
        own = arm["accuracy"][MAIN]
        rows.append((arm["title"], own["mean"], tuple(own["ci95"]), colour(arm["name"])))
    return accuracy_plot(rows)


def colour(name: str) -> str:
    """Grey for the base, orange for controls and rounds, green for the rest."""
    if name == "base":
        return BASE
    return TEACHER if name.startswith(("shuffled", "wrong_lookup", "on_policy")) else FINAL


def retention_plot(arms: Sequence[Summary]) -> str:
    """Accuracy over retention, with both intervals."""
    with rc_context(STYLE):
        drawing = Figure(figsize=(7.6, 5.2), layout="constrained")
        axes = drawing.subplots()
        for arm in arms:
            x, y = arm["retention"], arm["accuracy"][MAIN]
            axes.plot(x["ci95"], [y["mean"]] * 2, color=colour(arm["name"]), alpha=0.3)
            axes.plot([x["mean"]] * 2, y["ci95"], color=colour(arm["name"]), alpha=0.3)
            axes.plot([x["mean"]], [y["mean"]], "o", color=colour(arm["name"]))
            axes.annotate(arm["name"], (x["mean"], y["mean"]), xytext=(4, 4), textcoords="offset points", fontsize=7)
        axes.set_xlabel("retention")
        axes.set_ylabel("accuracy, temperature 0.6")
        return as_svg(drawing, "retention")


def curve_plot(arms: Sequence[Summary], column: int, unit: str) -> str:
    """Accuracy over tokens (column 0) or seconds (column 1); the arms of the claims in colour. Empty without curves."""
    drawn = [arm for arm in arms if arm["curve"]]
    if not drawn:
        return ""
    named = {"bias": FINAL, "no_bias": "#7fb8a4", "sft": "#3d5a98", "on_policy": TEACHER, "shuffled": "#b3372f"}
    with rc_context(STYLE):
        drawing = Figure(figsize=(7.6, 4.2), layout="constrained")
        axes = drawing.subplots()
        for arm in drawn:
            name = arm["name"]
            values = [[point[place] for point in arm["curve"]] for place in (column, 2)]
            label = arm["title"] if name in named else None
            axes.plot(*values, color=named.get(name, "#c9d0d9"), label=label, zorder=3 if label else 1)
        axes.set_xlabel(unit)
        axes.set_ylabel("accuracy, temperature 0.6")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower right")
        return as_svg(drawing, f"curve-{unit}")


def markdown(summary: Summary) -> str:
    """Claims and figures as tables for docs/study.md."""
    arms = summary["arms"]
    tables: list[tuple[Sequence[str], list[list[str]]]] = [
        (CLAIMS, [claim_row(one) for one in summary["claims"]]),
        (HEADER, [arm_row(arm) for arm in arms]),
        differences(arms),
        times(arms),
    ]
    return "\n".join(_markdown_table(header, rows) for header, rows in tables if rows)


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
