"""docs/objective.md names what the objective reports."""

import re
from pathlib import Path

from megatron_offgrpo.objective.compose import offline_grpo_loss, results, to_metrics
from tests.unit.objective.test_compose import OBJECTIVE, by_hand


def test_every_metric_stands_in_the_documentation():
    text = (Path(__file__).resolve().parents[3] / "docs" / "objective.md").read_text(encoding="utf-8")
    # The first table; the loop's own metrics, in the second, have a test beside the loop's.
    table = text.split("## Metrics")[1].split("\n|", 1)[1].split("\n\n")[0]
    documented = {
        name for row in table.splitlines() if row.startswith("|") for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert documented == set(results(to_metrics(offline_grpo_loss(by_hand(), OBJECTIVE)[1])))
