"""Rows of one solution each, grouped by problem, from files and from datasets in folders and on the hub."""

from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_offgrpo.data.grouping import grouped_parts, grouping_counts, grouping_rejects, has_rows
from megatron_offgrpo.data.importers import parse_conditions, parse_record
from megatron_offgrpo.data.sources import open_source
from megatron_offgrpo.errors import DataError
from tests.unit.data.tiny import write_lines


def talk(question, answer, *, key=None, domain="math", **more):
    row = {
        "domain": domain,
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        **more,
    }
    return row | ({"metadata": {"hash_problem": key}} if key else {})


def grouped(source, folder, conditions=()):
    parts = grouped_parts(source, folder, parse_conditions(conditions), "auto")
    records = [(where, parse_record(record, Counter(), form="groups", answer_required=False))
               for part in parts for where, record in part.records()]  # fmt: skip
    return [(where, group.problem, [one.text for one in group.trajectories]) for where, group in records]


def test_rows_of_a_problem_are_found_wherever_they_stand(tmp_path):
    rows = [
        talk("P", "p1"), talk("Q", "q1"), talk("code?", "c", domain="code"), talk("R", "r1", key="h"),
        {"conversations": [{"from": "human", "value": "no answer"}], "domain": "math"}, "{",
        talk("P", "p2"), talk("R again", "r2", key="h"), talk("Q", "q2"), talk("P", "p3"),
    ]  # fmt: skip
    path = write_lines(tmp_path / "rows.jsonl", rows)
    source = open_source(str(path), "train")
    assert has_rows(source, "auto")
    found = grouped(source, tmp_path / "work", ["domain=math"])
    assert found == [
        (f"{path}:1", "P", ["p1", "p2", "p3"]),
        (f"{path}:2", "Q", ["q1", "q2"]),
        (f"{path}:4", "R", ["r1", "r2"]),
    ]
    rejected = [(one.where, one.reason) for one in grouping_rejects(tmp_path / "work")]
    assert rejected == [(f"{path}:5", "no answer"), (f"{path}:6", "malformed JSON")]
    assert grouping_counts(tmp_path / "work") == {
        "rows": 10,
        "not_asked_for": 1,
        "ignored_fields": {"domain": 7},
    }
    # A second start reads what the first wrote.
    path.unlink()
    assert grouped(source, tmp_path / "work", ["domain=math"]) == found


def test_rows_of_a_problem_have_one_reference_answer(tmp_path):
    rows = [
        talk("P", "p1"), talk("P", "p2", gold="7", difficulty=3), talk("P", "p3", gold="8"),
        talk("P", "p4", gold="7"), talk("P", "p5", system="S", gold="8"),
    ]  # fmt: skip
    path = write_lines(tmp_path / "rows.jsonl", rows)
    parts = grouped_parts(open_source(str(path), "train"), tmp_path / "work", [], "auto")
    groups = [parse_record(record, Counter(), form="groups") for part in parts for _, record in part.records()]
    assert [(one.system, one.answer, [each.text for each in one.trajectories]) for one in groups] == [
        (None, "7", ["p1", "p2", "p4"]),
        ("S", "8", ["p5"]),
    ]
    (reject,) = grouping_rejects(tmp_path / "work")
    assert (reject.where, reject.reason, reject.got) == (f"{path}:3", "another answer", "8")
    assert grouping_counts(tmp_path / "work")["ignored_fields"] == {"domain": 5, "difficulty": 1}


def test_grouping_does_not_depend_on_the_number_of_buckets(tmp_path, monkeypatch):
    rows = [talk(f"problem {index * 7 % 30}", f"answer {index}") for index in range(300)]
    source = open_source(str(write_lines(tmp_path / "rows.jsonl", rows)), "train")
    one = grouped(source, tmp_path / "one")
    monkeypatch.setattr("megatron_offgrpo.data.grouping.BUCKET_BYTES", 1000)
    assert grouped(source, tmp_path / "many") == one
    assert [len(texts) for _, _, texts in one] == [10] * 30
    assert [problem for _, problem, _ in one] == [f"problem {index * 7 % 30}" for index in range(30)]


def test_folders_of_datasets_read_like_files(tmp_path):
    import datasets

    rows = [talk("P", f"p{index}") for index in range(100)] + [talk("Q", "q")]
    (tmp_path / "parquet" / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "parquet" / "data" / "train-00000.parquet")
    (tmp_path / "lines").mkdir()
    write_lines(tmp_path / "lines" / "train.jsonl", rows)
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    expected = [["p" + str(index) for index in range(100)], ["q"]]
    for name in ("parquet", "lines", "saved"):
        source = open_source(str(tmp_path / name), "train")
        assert has_rows(source, "auto")
        found = grouped(source, tmp_path / f"{name}-work")
        assert [texts for _, _, texts in found] == expected
        assert found[1][0] == f"{tmp_path / name}:101"


def test_datasets_that_cannot_be_read_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "data.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="an empty folder"):
        open_source(str(tmp_path / "empty"), "train")
    with pytest.raises(DataError, match="cannot read this dataset") as caught:
        list(open_source(str(tmp_path / "text"), "train").parts())
    assert "\n" not in str(caught.value)
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "train.csv").write_text("problem,answer\np,1.50\n")
    with pytest.raises(DataError, match=r"a folder of tables without types.*--input .*tables/train\.csv"):
        open_source(str(tmp_path / "tables"), "train")
    with pytest.raises(DataError, match=r"on the hub: hf:some/name"):
        open_source("some/name", "train")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    with pytest.raises(DataError, match=r"cannot find this dataset on the hub \(ConnectionError: offline") as caught:
        open_source("hf:some/name", "train")
    assert "\n" not in str(caught.value)


def refuse(*_, **__):
    raise ConnectionError("offline\nagain")


def test_the_hub_takes_the_path_of_folders(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    rows = [talk("P", "p")]
    asked = []

    def load(name, **options):
        asked.append((name, options["split"], options["revision"]))
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: type("Info", (), {"sha": "abc"}))
    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_source("hf:some/name", "train")
    assert (source.kind, source.fingerprint, source.num_bytes) == ("hub", "abc", None)
    assert [record for part in source.parts() for _, record in part.records()] == rows
    assert asked == [("some/name", "train", "abc")]
