"""A user's mistake on the command line is one line on standard error and exit status 1."""

import errno
import json
import os
import sys

import pytest

from megatron_offgrpo import cli
from tests.unit.data.tiny import group, save_tokenizer, write_lines


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs `offgrpo ARGUMENTS` in this process; returns exit status, standard output, standard error."""
    monkeypatch.delenv("RANK", raising=False)

    def run_command(*arguments):
        monkeypatch.setattr(sys, "argv", ["offgrpo", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capfd.readouterr()
        return exit_.value.code or 0, out, err

    return run_command


def one_error(result):
    status, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 1
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def test_unknown_recipe_and_misspelt_setting(run):
    assert "unknown recipe" in one_error(run("plan", "quikstart"))
    assert "did you mean plan.epochs?" in one_error(run("plan", "quickstart", "--set", "plan.epoch=1"))


def test_bad_records_are_counted_and_kept_with_file_line_and_field(run, tmp_path):
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    records = [
        group("g0"),
        "{not json",
        group("g1", problem=5),
        {**group("g2"), "trajectories": []},
        {**group("g3"), "trajectories": [{"text": "\\boxed{2}", "reward": 0.5}]},
        group("g0"),
        group("g4", problem="long " * 2000),
        group("g5"),
    ]
    file = write_lines(tmp_path / "in.jsonl", records)
    store = tmp_path / "store"
    status, out, _ = run("prepare", "--input", file, "--tokenizer", tokenizer, "--output", store)
    assert status == 0
    rejected = [json.loads(line) for line in (store / "rejected.jsonl").read_text().splitlines()]
    assert len(rejected) == 6
    text = (store / "rejected.jsonl").read_text()
    for place in ("in.jsonl:2", "in.jsonl:3", "in.jsonl:4", "in.jsonl:5", "in.jsonl:6", "in.jsonl:7"):
        assert place in text
    assert json.loads((store / "manifest.json").read_text())["counts"]["groups"]["total"] == 2
    assert "6" in out


def test_what_cannot_be_prepared_at_all(run, tmp_path):
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    good = write_lines(tmp_path / "in.jsonl", [group()])
    absent = one_error(
        run("prepare", "--input", tmp_path / "no.jsonl", "--tokenizer", tokenizer, "--output", tmp_path / "a")
    )
    assert "no.jsonl" in absent
    plain = save_tokenizer(tmp_path / "plain", chat_template=None)
    assert "chat template" in one_error(
        run("prepare", "--input", good, "--tokenizer", plain, "--output", tmp_path / "b")
    )
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


def test_a_stage_without_its_input_names_the_command_that_makes_it(run, tmp_path):
    sets = ["--set", f"paths.store={tmp_path / 'store'}"]
    assert "offgrpo prepare" in one_error(run("plan", "quickstart", *sets))


def test_doctor_and_recipes_answer(run):
    status, out, _ = run("doctor")
    assert status == 0
    assert "megatron-core         0.19.2\n" in out
    status, out, _ = run("recipes")
    assert status == 0
    assert "openthinker3_7b" in out


def test_a_full_disk_is_one_line_that_names_the_file_and_another_fault_is_not_hidden(run, monkeypatch):
    def fails_with(number):
        def app():
            raise OSError(number, os.strerror(number), "/run/wandb_run_id.txt")

        monkeypatch.setattr(cli, "app", app)

    fails_with(errno.ENOSPC)
    line = one_error(run("launch"))
    assert "/run/wandb_run_id.txt: the file system refuses (No space left on device); remedy: look at space" in line
    fails_with(errno.EBADF)
    with pytest.raises(OSError, match="Bad file descriptor"):
        cli.main()
