"""Problems side by side: what the base and the trained model wrote."""

from html import escape
from typing import Any

from megatron_offgrpo.reporting.page import section
from megatron_offgrpo.reporting.run_files import RunFiles

NUM_EXAMPLES = 3


def examples_section(run: RunFiles, differences: list[tuple[str, float]]) -> str:
    """Problems with the largest gain, then those with the largest loss; (problem id, accuracy after minus before)."""
    if run.base is None or run.final is None:
        return ""
    gains = sorted((item for item in differences if item[1] > 0), key=lambda item: -item[1])[:NUM_EXAMPLES]
    losses = sorted((item for item in differences if item[1] < 0), key=lambda item: item[1])[:NUM_EXAMPLES]
    base, final = _by_problem(run.base.graded), _by_problem(run.final.graded)
    parts = []
    for heading, chosen, before in (("Wrong before, right after", gains, 0), ("Right before, wrong after", losses, 1)):
        blocks = "".join(_example(base[name], final[name], before) for name, _ in chosen)
        parts.append(f"<h3>{heading}</h3>{blocks or '<p>No such problem.</p>'}")
    return section("Problems side by side", *parts)


def _example(base: list[dict[str, Any]], final: list[dict[str, Any]], reward_before: int) -> str:
    first = base[0]
    shown = (_pick(base, reward_before), _pick(final, 1 - reward_before))
    columns = []
    for title, record, records in (("base", shown[0], base), ("trained", shown[1], final)):
        css, mark = ("right", "right") if record["reward"] else ("wrong", "wrong")
        share = f"{sum(each['reward'] for each in records)} of {len(records)} samples right"
        columns.append(
            f'<div><b>{title}</b> <span class="{css}">{mark}</span> <span class="soft">({share})</span>\n'
            f"{escape(record['text'])}</div>"
        )
    asked = f"<p>{escape(first['problem'])} <span class='soft'>Answer: {escape(first['answer'])}</span></p>"
    return f'<div class="example">{asked}<div class="pair">{"".join(columns)}</div></div>'


def _pick(records: list[dict[str, Any]], reward: int) -> dict[str, Any]:
    """The first sample with this reward; one exists wherever the accuracies differ in that direction."""
    return next(record for record in records if record["reward"] == reward)


def _by_problem(graded: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    records: dict[str, list[dict[str, Any]]] = {}
    for record in graded:
        records.setdefault(record["problem_id"], []).append(record)
    return records
