"""What the batch script reads."""

from megatron_offgrpo import outcome


def test_one_line_that_is_replaced(tmp_path, monkeypatch):
    file = tmp_path / "outcome"
    monkeypatch.setenv(outcome.VARIABLE, str(file))
    outcome.report_step(3, 10)
    assert file.read_text() == "step 3 10\n"
    outcome.report_refusal("a field:\n  wrong")
    assert file.read_text() == "refused a field: wrong\n"
    assert [path.name for path in tmp_path.iterdir()] == ["outcome"]


def test_without_a_batch_script_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv(outcome.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    outcome.report_step(1, 2)
    assert not list(tmp_path.iterdir())
