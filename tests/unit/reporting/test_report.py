"""The report says what the run shows, with its uncertainty, in one file that needs nothing else."""

import json
import re
from html.parser import HTMLParser

import pytest

from megatron_offgrpo.errors import DataError
from megatron_offgrpo.reporting.report import write_report
from tests.unit.reporting.run_folder import (
    write_evaluation,
    write_small_store,
    write_summary,
    write_training,
)

VOID = {"meta", "br", "hr", "img", "path", "use", "rect", "circle", "line"}


class WellFormed(HTMLParser):
    """Fails on an element that is not closed or closed out of order; collects ids and visible text."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.words = [], [], []

    def handle_starttag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def parse(path):
    page = WellFormed()
    page.feed(path.read_text())
    assert page.open == []
    return page


def make_run(folder):
    write_small_store(folder / "store")
    write_training(folder / "train", store=str(folder / "store"))
    # 40 problems, 2 of 4 right, then 36 with 4 of 4 and 4 with none: 50 % and 90 %.
    write_evaluation(folder / "eval_base", [2] * 40, seed=1)
    write_evaluation(folder / "eval_final", [4] * 36 + [0] * 4, seed=2)
    write_summary(folder)
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write_report(make_run(tmp_path_factory.mktemp("run")))


def test_whole_report(report):
    page = parse(report)
    assert report.name == "report.html"
    assert "rose from 50.0 % to 90.0 %" in page.text
    assert "+40.0 points" in page.text
    assert "36 problems better, 4 worse, 0 equal" in page.text
    assert "Right before, wrong after" in page.text
    assert "is 3 < 4 & 4 > 3?" in page.text
    assert "so \\boxed{13}" in page.text
    assert "teacher (mean 4)" in page.text
    assert 'class="notice"' not in report.read_text()
    for title in ("Reward-weighted loss", "KL to the reference", "Entropy", "Margin right minus wrong", "Throughput"):
        assert title in page.text
    for value in ("objective", "beta", "0.2", "m:linear", "aaaa1111", "dddd2", "bbbb"):
        assert value in page.text


def test_report_is_self_contained(report):
    text = report.read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", text)
    assert "@import" not in text
    assert "url(http" not in text
    assert "<script" not in text


def test_ids_are_unique_across_the_plots(report):
    ids = parse(report).ids
    assert len(ids) > 10
    assert len(ids) == len(set(ids))


def test_same_run_same_bytes(report):
    first = report.read_bytes()
    assert write_report(report.parent).read_bytes() == first


def test_no_difference_is_not_sold_as_one(tmp_path):
    write_evaluation(tmp_path / "eval_base", [2, 3, 1, 2], seed=1)
    write_evaluation(tmp_path / "eval_final", [3, 3, 1, 2], seed=2)
    page = parse(write_report(tmp_path))
    assert "No difference can be shown: accuracy 50.0 % before and 56.2 % after" in page.text


def test_fall_is_called_a_fall(tmp_path):
    write_evaluation(tmp_path / "eval_base", [4] * 20, seed=1)
    write_evaluation(tmp_path / "eval_final", [1] * 20, seed=2)
    assert "fell from 100.0 % to 25.0 %" in parse(write_report(tmp_path)).text


def test_training_alone(tmp_path):
    write_training(tmp_path / "run", steps=3)
    page = parse(write_report(tmp_path / "run"))
    assert "3 training steps. Base and trained model were not both evaluated, so no gain is claimed." in page.text
    assert 'class="notice"' in (tmp_path / "run" / "report.html").read_text()
    assert "No accuracy of the base model" in page.text
    assert "No accuracy of the trained model" in page.text
    assert "Reward-weighted loss" in page.text


def test_where_the_time_went_and_what_was_left_out(tmp_path):
    """Two steps of 2 s; 1 + 3 s of them forward and backward; 4e12 and 8e12 FLOP/s: 24e12 in 4 s; MFU 0.2 and 0.4."""
    folder = tmp_path / "run"
    write_training(folder, steps=0)
    times = {"seconds": 2.0, "packed_tokens": 10, "batch_seconds": 0.5, "validation_seconds": 6.5, "save_seconds": 0.0}
    lines = [
        {"step": 0, **times, "forward_backward_seconds": 1.0, "model_flops_per_second": 4e12, "mfu": 0.2},
        {"step": 1, **times, "forward_backward_seconds": 3.0, "model_flops_per_second": 8e12, "mfu": 0.4},
        {"step": 2, "skipped": 1.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    bad = {"step": 7, "pack": 3, "trajectories": [4, 9], "groups": ["g1", "g2"], "reason": "pack 3: NaN or inf"}
    value = {"store": "s", "trajectories": [4, 9], "rollbacks": [{"bad_steps": [bad]}]}
    (folder / "quarantine.json").write_text(json.dumps(value))
    text = parse(write_report(folder)).text
    for words in (
        "6 model TFLOP/s, all ranks",
        "30.0 % MFU",
        "1 bad steps skipped",
        "5 training tokens per second",
        "Model FLOPs utilisation",
        "Time of the training",
        "2 trajectories are left out after 1 rollback(s)",
        "1 7 4 (g1), 9 (g2) pack 3: NaN or inf",
    ):
        assert words in text, words
    for label, shown in (("making batches", True), ("forward and backward", True), ("saving", False)):
        assert (label in text) is shown, label


def test_accuracy_of_checkpoints(run):
    # 20 and 30 of 40 right.
    write_evaluation(run / "eval_checkpoints" / "iter_0000010", [4] * 20 + [0] * 20)
    write_evaluation(run / "eval_checkpoints" / "iter_0000020", [4] * 30 + [0] * 10)
    text = parse(write_report(run)).text
    assert "Accuracy on the way" in text
    assert text.index("10 50.0%") < text.index("20 75.0%")


def test_a_report_without_them_says_nothing_of_them(report):
    text = parse(report).text
    assert "Accuracy on the way" not in text
    assert "Quarantine" not in text
    assert "Time of the training" not in text
    assert "MFU" not in text


def test_missing_parts_and_a_store_that_has_changed_since_are_named(run):
    manifest = run / "store" / "manifest.json"
    fingerprint = re.search(r'"fingerprint": "(\w+)"', manifest.read_text())[1]
    manifest.write_text(manifest.read_text().replace(fingerprint, "0" * 32))
    (run / "summary.json").unlink()
    page = parse(write_report(run))
    assert "teacher (mean" not in page.text
    assert "No lengths of the teacher's responses" in page.text
    assert "No stage times: summary.json is absent." in page.text


def test_nothing_to_report_is_an_error(tmp_path):
    with pytest.raises(DataError, match="nothing to report"):
        write_report(tmp_path)
    with pytest.raises(DataError, match="no such run folder"):
        write_report(tmp_path / "absent")


def test_damaged_file_is_named(run):
    (run / "summary.json").write_text("{")
    with pytest.raises(DataError, match=r"summary\.json: unreadable"):
        write_report(run)


def test_evaluations_of_different_problems_are_refused(tmp_path):
    write_evaluation(tmp_path / "eval_base", [2] * 3)
    write_evaluation(tmp_path / "eval_final", [2] * 4)
    with pytest.raises(DataError, match="different problems"):
        write_report(tmp_path)
