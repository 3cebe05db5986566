"""Files of other projects to a store: what stands in them reaches the tokens, the rewards and the counts."""

import csv
import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_offgrpo.data.prepare import PrepareConfig, prepare
from megatron_offgrpo.data.store_schema import SCHEMA
from megatron_offgrpo.errors import DataError
from tests.unit.data.test_forms import OPENR1, VERL
from tests.unit.data.tiny import EOS, save_tokenizer, write_lines


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    tokenizer = save_tokenizer(folder / "tokenizer")
    return PrepareConfig(tokenizer=str(tokenizer), output=str(folder / "store"), workers=1, force=True)


@pytest.fixture(scope="module")
def decode(config):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(config.tokenizer).decode


def stored(config, path, **changes):
    return prepare(replace(config, inputs=(str(path),), **changes))


def rows_of(store):
    return [store.row(index) for index in range(store.num_groups)]


@pytest.mark.parametrize("kind", ["conversations", "messages"])
def test_a_system_text_of_its_own_column_is_in_the_prompt(config, decode, tmp_path, kind):
    keys = ("from", "value") if kind == "conversations" else ("role", "content")
    turns = [dict(zip(keys, turn, strict=True)) for turn in (("user", "q"), ("assistant", "\\boxed{8}"))]
    records = [{kind: turns, "answer": "8", "year": 24}, {kind: turns, "answer": "8", "system": "S"}]
    store = stored(config, write_lines(tmp_path / "in.jsonl", records))
    prompts = [decode(row.prompt_ids) for row in rows_of(store)]
    assert prompts == ["<|user|>q<|assistant|>", "<|system|>S<|user|>q<|assistant|>"]
    assert store.manifest.counts["ignored_fields"] == {"year": 1}


def test_cut_generations_have_no_eos(config, decode, tmp_path):
    record = OPENR1 | {"generations": ["\\boxed{2}", "so it"], "finish_reasons": ["stop", "length"], "messages": None}
    (row,) = rows_of(stored(config, write_lines(tmp_path / "in.jsonl", [record])))
    assert [decode(ids) for ids in row.response_ids] == [f"\\boxed{{2}}{EOS}", "so it"]
    assert (row.truncated, row.finish_reasons) == ([False, True], ["stop", "length"])


def test_verl_columns_of_texts_are_not_trained_letter_by_letter(config, decode, tmp_path):
    names = ("prompt", "target", "target_lst", "target_rewards", "reward_model", "extra_info")
    record = VERL | {name: json.dumps(VERL[name]) for name in names}
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "in.parquet")
    (row,) = rows_of(stored(config, tmp_path / "in.parquet", labels=("majority",)))
    assert [decode(ids) for ids in row.response_ids] == [f"two: \\boxed{{2}}{EOS}", f"\\boxed{{3}}{EOS}"]
    assert (row.answer, row.group_id) == ("2", "openr1-train-7")


def test_pairs_are_groups_of_two(config, tmp_path):
    pairs = [{"prompt": f"q{index}", "chosen": "yes", "rejected": "no"} for index in range(3)]
    path = tmp_path / "in.json"
    path.write_text(json.dumps([{"prompt": "q", "chosen": "yes"}, *pairs], indent=1))
    store = stored(config, path, labels=("given",))
    assert [(row.texts, row.rewards) for row in rows_of(store)] == [(["yes", "no"], [1.0, 0.0])] * 3
    assert store.manifest.counts["rejected"] == {"missing field": 1}
    with pytest.raises(DataError, match=r"answer: missing field; expected .*--label given"):
        stored(config, path)


def test_a_table_of_rows(config, decode, tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 + 1", "output": "\\boxed{2}", "answer": "2", "system": "", "note": "n"},
        {"instruction": "Add.", "input": "1 + 1", "output": "\\boxed{3}", "answer": "", "system": "", "note": ""},
        {"instruction": "Tell.", "input": "", "output": "x" * 200_000, "answer": "2", "system": "S", "note": ""},
    ]
    path = tmp_path / "in.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        file.write("surplus,cells,1,2,3,4,5\r\n")
    store = stored(config, path, max_response_tokens=300_000)
    first, second = rows_of(store)
    assert decode(first.prompt_ids) == "<|user|>Add.\n1 + 1<|assistant|>"
    assert (first.rewards, first.sample_ids) == ([1.0, 0.0], [f"{path}:2", f"{path}:3"])
    assert (second.system, len(second.texts[0]), second.truncated) == ("S", 200_000, [False])
    counts = store.manifest.counts
    assert (counts["rejected"], counts["ignored_fields"]) == ({"wrong number of cells": 1}, {"note": 1})


def test_a_store_of_an_older_version_can_be_replaced(config, tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [OPENR1])
    output = str(tmp_path / "store")
    import datasets

    store = stored(config, path, output=output)
    fingerprint, groups = store.manifest.fingerprint, store.path / "groups"
    older = datasets.load_from_disk(str(groups)).remove_columns("finish_reasons")
    older.save_to_disk(str(tmp_path / "older"))
    del store
    groups.rename(tmp_path / "gone")
    (tmp_path / "older").rename(groups)
    with pytest.raises(DataError, match=r"missing columns: finish_reasons; remedy: .*--force"):
        stored(config, path, output=output, force=False)
    again = stored(config, path, output=output)
    assert again.manifest.fingerprint == fingerprint
    assert again.table.column_names == SCHEMA.names
