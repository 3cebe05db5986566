"""`export` and then `prepare` gives the same store, whatever the store holds."""

from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from megatron_offgrpo.data.export import export_verl
from megatron_offgrpo.data.prepare import PrepareConfig, prepare
from tests.unit.data.tiny import group, save_tokenizer, write_lines

COLUMNS = ["group_id", "problem", "answer", "prompt_ids", "response_ids", "rewards", "truncated", "finish_reasons",
           "sources", "on_policy", "sample_ids", "texts", "system", "behaviour_logprobs"]  # fmt: skip
LIMIT = 24
CUT = {"finish_reason": "length"}


def records(tokenizer):
    def logprobs(text, extra=0):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [-0.1 * (place + 1) for place in range(len(ids) + extra)]

    long = "1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 is \\boxed{2}"
    assert len(tokenizer(long, add_special_tokens=False)["input_ids"]) > LIMIT
    cut = {"text": "So I start with two and", **CUT}
    return [
        group("cut") | {"trajectories": [cut, {"text": "", **CUT}, {"text": "", "finish_reason": "stop"}]},
        group("both", system="Think.")
        | {"trajectories": [{"text": long, **CUT}, {"text": long, "reward": 1}, {"text": "\\boxed{2}"}]},
        group("logprobs", system="")
        | {
            "trajectories": [
                {"text": "\\boxed{2}", "logprobs": logprobs("\\boxed{2}"), "on_policy": True},
                {"text": "\\boxed{3}", "logprobs": logprobs("\\boxed{3}", extra=1), "source": "m", "sample_id": "s/1"},
                {"text": "no answer", "logprobs": logprobs("no answer"), "finish_reason": "length"},
                {"text": long, "logprobs": logprobs(long), "finish_reason": "stop"},
            ]
        },
        group("plain", texts=("\\boxed{2}", "\\boxed{3}", "\\boxed{4}", " \\boxed{2}\n")),
    ]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("export")
    tokenizer = save_tokenizer(folder / "tokenizer")
    path = write_lines(folder / "in.jsonl", records(AutoTokenizer.from_pretrained(tokenizer)))
    return PrepareConfig(
        inputs=(str(path),),
        tokenizer=str(tokenizer),
        output=str(folder / "store"),
        max_response_tokens=LIMIT,
        workers=1,
    )


@pytest.mark.parametrize("changes", [{}, {"trajectories_per_group": 2}, {"labels": ("math-verify", "majority")}])
@pytest.mark.parametrize("label", ["given", "math-verify"])
def test_the_same_store_again(config, tmp_path, changes, label):
    store = prepare(replace(config, output=str(tmp_path / "store"), **changes))
    export_verl(store, tmp_path / "out.parquet")
    again = prepare(
        replace(config, inputs=(str(tmp_path / "out.parquet"),), output=str(tmp_path / "again"), labels=(label,))
    )
    for name in COLUMNS:
        assert again.table[name].to_pylist() == store.table[name].to_pylist(), name
    assert again.manifest.fingerprint == store.manifest.fingerprint
    assert again.manifest.counts["ignored_fields"] == {"ability": 4}
    assert again.manifest.counts["truncated"] == store.manifest.counts["truncated"] > 0


def test_what_the_generator_cut_stays_cut_under_another_limit(config, tmp_path):
    store = prepare(replace(config, output=str(tmp_path / "store")))
    export_verl(store, tmp_path / "out.parquet")
    wide = replace(config, max_response_tokens=1000)
    first = prepare(replace(wide, output=str(tmp_path / "wide")))
    # Log-probs that a store has cut do not reach to the end of a longer response: that group stays out.
    rows = pq.read_table(tmp_path / "out.parquet").filter([True, True, False, True])
    pq.write_table(rows, tmp_path / "three.parquet")
    again = prepare(replace(wide, inputs=(str(tmp_path / "three.parquet"),), output=str(tmp_path / "again")))
    whole = first.table.filter([True, True, False, True])
    for name in ("group_id", "response_ids", "truncated"):
        assert again.table[name].to_pylist() == whole[name].to_pylist()
    assert again.table["truncated"][1].as_py() == [True, False, False]


def test_an_empty_solution_that_was_cut_has_no_token(config, tmp_path):
    store = prepare(replace(config, output=str(tmp_path / "store")))
    (row,) = (row for row in map(store.row, range(store.num_groups)) if row.group_id == "cut")
    by_reason = {
        (text, reason): ids for text, reason, ids in zip(row.texts, row.finish_reasons, row.response_ids, strict=True)
    }
    assert by_reason["", "length"] == []
    assert len(by_reason["", "stop"]) == 1
    assert row.truncated == [reason == "length" for reason in row.finish_reasons]
