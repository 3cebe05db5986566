"""The report shows by how much trainer, Transformers and vLLM differ."""

import json

from megatron_offgrpo.reporting.report import write_report
from tests.unit.reporting.run_folder import write_training


def test_the_differences_stand_in_the_report(tmp_path):
    run = tmp_path / "run"
    write_training(run)
    assert "Same weights everywhere" not in write_report(run).read_text()
    pair = {"first": "trainer", "second": "vllm", "max_abs": 3.2e-6, "mean_abs": 4.1e-7, "worst_trajectory": 3}
    check = {"agree": True, "largest_mean_allowed": 1e-3, "trajectories": 32, "tokens": 1138, "pairs": [pair]}
    (run / "weight_check.json").write_text(json.dumps(check))
    html = write_report(run).read_text()
    for text in (
        "trainer and vllm",
        "4.10e-07",
        "3.20e-06",
        "1,138 tokens of 32 trajectories",
        "compute the same model",
    ):
        assert text in html
    (run / "weight_check.json").write_text(json.dumps({**check, "agree": False}))
    assert "do NOT compute the same model" in write_report(run).read_text()
