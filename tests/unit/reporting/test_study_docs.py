"""docs/study.md says what the committed results say."""

import json
from pathlib import Path

import pytest

from megatron_offgrpo.reporting.study_report import markdown, plots

DOCS = Path(__file__).resolve().parents[3] / "docs"


@pytest.mark.parametrize("name", ["study", "study_small", "ablations"])
def test_tables_are_those_of_the_results(name):
    summary = json.loads((DOCS / "study" / f"{name}.json").read_text("utf-8"))
    assert markdown(summary) in (DOCS / "study.md").read_text("utf-8")


@pytest.mark.parametrize(("name", "plot"), [("study", "accuracy"), ("study", "retention"), ("study", "seconds")])
def test_plots_are_those_of_the_results(name, plot):
    summary = json.loads((DOCS / "study" / f"{name}.json").read_text("utf-8"))
    assert (DOCS / "study" / f"{name}_{plot}.svg").read_text("utf-8") == plots(summary)[plot]
