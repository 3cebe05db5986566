"""The log of finished samples: torn lines, damaged lines, locks, shards."""

import json

import pytest

from megatron_offgrpo.errors import ConfigError, DataError
from megatron_offgrpo.evaluation.sample_log import (
    LogWriter,
    SampleLogs,
    Shard,
    parse_shard,
    remove_parts,
    require_idle,
)


def line(problem, sample, text="t"):
    return json.dumps({"problem_id": problem, "sample_id": sample, "text": text}) + "\n"


def test_a_line_that_a_kill_cut_off_is_dropped_and_the_next_one_stands_alone(tmp_path, capsys):
    (tmp_path / "rest.jsonl").write_text(line("a", 0) + line("a", 1)[:-20])
    assert len(SampleLogs(tmp_path)) == 1
    with LogWriter(tmp_path, None) as writer:
        writer.add({"problem_id": "a", "sample_id": 1, "text": "again"})
    logs = SampleLogs(tmp_path)
    assert [logs.read(("a", k))["text"] for k in (0, 1)] == ["t", "again"]
    assert "1 unfinished line(s)" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["\x00\x00\x00\n", "[1]\n", '{"problem_id": "a"}\n', '{"problem_id": "a", "sample'])
def test_damaged_lines_cost_only_themselves(tmp_path, damage):
    (tmp_path / "rest.jsonl").write_text(line("a", 0) + damage.rstrip("\n") + "\n" + line("b", 0))
    logs = SampleLogs(tmp_path)
    assert (("a", 0) in logs, ("b", 0) in logs, len(logs)) == (True, True, 2)


def test_a_whole_last_line_without_its_line_break_is_not_trusted(tmp_path):
    (tmp_path / "rest.jsonl").write_text(line("a", 0)[:-1])
    assert len(SampleLogs(tmp_path)) == 0


def test_all_logs_count_and_the_first_sample_of_a_name_wins(tmp_path):
    (tmp_path / "rest.jsonl").write_text(line("a", 0, "rest"))
    (tmp_path / "shard-0-of-2.jsonl").write_text(line("a", 0, "shard") + line("b", 0, "shard"))
    logs = SampleLogs(tmp_path)
    assert (logs.read(("a", 0))["text"], logs.read(("b", 0))["text"]) == ("rest", "shard")
    with pytest.raises(DataError, match="no sample 7 of problem 'a'"):
        logs.read(("a", 7))


def test_text_of_any_kind_comes_back(tmp_path):
    text = "π\n\u2028\x00 \ud800"
    with LogWriter(tmp_path, None) as writer:
        writer.add({"problem_id": "ä", "sample_id": 0, "text": text})
    assert SampleLogs(tmp_path).read(("ä", 0))["text"] == text


def test_one_log_has_one_writer(tmp_path):
    shard = Shard(1, 4)
    with LogWriter(tmp_path, shard):
        with pytest.raises(ConfigError, match=r"shard-1-of-4\.jsonl: another process is writing"):
            LogWriter(tmp_path, shard)
        with pytest.raises(ConfigError, match="another process is writing"):
            require_idle(tmp_path)
    require_idle(tmp_path)
    LogWriter(tmp_path, shard).__exit__(None, None, None)


@pytest.mark.parametrize("text", ["4/4", "-1/4", "1", "1/", "/2", "a/b", "0/0", "1/4/8"])
def test_impossible_shards_are_refused(text):
    with pytest.raises(ConfigError, match=r"--shard: .*I/N"):
        parse_shard(text)


def test_shards():
    assert (parse_shard("3/4"), parse_shard(None)) == (Shard(3, 4), None)


def test_parts_of_another_request_stay(tmp_path):
    for name in ("one", "two"):
        LogWriter(tmp_path / "out.parts" / name, None).__exit__(None, None, None)
    remove_parts(tmp_path / "out.parts" / "one")
    assert [path.name for path in (tmp_path / "out.parts").iterdir()] == ["two"]
    remove_parts(tmp_path / "out.parts" / "two")
    assert not (tmp_path / "out.parts").exists()
