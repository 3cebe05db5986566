"""The whole stage on tiny inputs: what is stored, counted, reused and refused."""

import json
import shutil
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from megatron_offgrpo.data.audit import audit
from megatron_offgrpo.data.prepare import PrepareConfig, prepare, summary_lines
from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.errors import ConfigError, DataError
from megatron_offgrpo.reporting.data_report import terminal_lines
from tests.unit.data.tiny import group, save_tokenizer, write_lines

RIGHT, WRONG = r"\boxed{2}", r"\boxed{3}"


@pytest.fixture
def config(tmp_path, tokenizer_dir):
    records = [
        group("mixed", texts=[WRONG, WRONG, RIGHT, RIGHT, RIGHT]),
        group("good", texts=[RIGHT, RIGHT], benchmark="b"),
        "{",
        group("bad", texts=[WRONG, "no answer"]),
        group("long", problem="very " * 200),
        group("cut", texts=["long " * 100 + RIGHT]),
    ]
    for one in records[0]["trajectories"]:
        one["reward"] = 1
    path = write_lines(tmp_path / "in.jsonl", records)
    return PrepareConfig(
        inputs=(str(path),),
        tokenizer=str(tokenizer_dir),
        output=str(tmp_path / "store"),
        trajectories_per_group=4,
        max_prompt_tokens=100,
        max_response_tokens=60,
        workers=1,
    )


def rejected(store):
    return [json.loads(line) for line in (store.path / "rejected.jsonl").read_text().splitlines()]


def test_what_is_stored_and_counted(config):
    store = prepare(config)
    assert [store.row(index).group_id for index in range(4)] == ["mixed", "good", "bad", "cut"]
    assert store.row(0).texts == [RIGHT, WRONG, RIGHT, WRONG]
    assert store.rewards.tolist() == [1, 0, 1, 0, 1, 1, 0, 0, 1]
    assert store.truncated.tolist() == [False] * 8 + [True]
    assert store.response_lengths[8] == 60
    counts = store.manifest.counts
    assert counts["groups"] == {"total": 4, "all_positive": 2, "mixed": 1, "all_negative": 1}
    assert counts["read"] == {"groups": 5, "trajectories": 5 + 2 + 2 + 2 + 1}
    assert counts["trajectories"] == 9
    assert counts["trajectories_not_selected"] == 1
    assert counts["labels"] == {"no_answer": 1, "ok": 11}
    assert counts["agreement"] == {
        "given, math-verify": {"compared": 5, "agree": 3, "given 1, math-verify 0": 2, "given 0, math-verify 1": 0}
    }
    assert counts["rejected"] == {"malformed JSON": 1, "prompt too long": 1}
    assert counts["ignored_fields"] == {"benchmark": 1}
    assert counts["truncated"] == 1
    path = config.inputs[0]
    assert [(one["where"], one["group_id"]) for one in rejected(store)] == [(f"{path}:3", None), (f"{path}:5", "long")]
    text = "\n".join(summary_lines(store))
    for expected in ("4: 2 all positive, 1 mixed, 1 all negative", "given, math-verify: 3 of 5 (60.00 %)",
                     "prompt too long 1", "1 more were not selected", "1 truncated", "benchmark 1"):  # fmt: skip
        assert expected in text


def test_references_that_no_solution_can_match_are_refused_and_counted(config, tmp_path):
    def prove(name, answer):
        one = group(name, answer=answer)
        for trajectory in one["trajectories"]:
            trajectory["reward"] = 0
        return one

    records = [group("good"), prove("a", "proof"), prove("b", "N/A"), prove("c", "See the proof above.")]
    path = write_lines(tmp_path / "proofs.jsonl", records)
    verified = prepare(replace(config, inputs=(str(path),)))
    counts = verified.manifest.counts
    assert counts["rejected"] == {
        "unreadable reference answer (placeholder)": 2,
        "unreadable reference answer (prose)": 1,
    }
    assert counts["groups"]["total"] == 1
    assert not audit(verified).unverifiable
    # Given labels need no reference: such groups are kept, and the audit says how many there are.
    given = prepare(replace(config, inputs=(str(path),), labels=("math-verify", "given"), output=str(tmp_path / "all")))
    found = audit(given)
    assert found.unverifiable == {"placeholder": 2, "prose": 1}
    lines = terminal_lines(given, found, [])
    assert [line.split(maxsplit=6)[-1] for line in lines if "unverifiable" in line] == ["3 (placeholder 2, prose 1)"]


def test_given_and_majority_labels(config, tmp_path):
    given = prepare(replace(config, labels=("given",), output=str(tmp_path / "given")))
    assert [given.row(index).group_id for index in range(given.num_groups)] == ["mixed"]
    assert given.rewards.tolist() == [1, 1, 1, 1]
    assert given.manifest.counts["rejected"]["no reward given"] == 4
    majority = prepare(replace(config, labels=("majority",), output=str(tmp_path / "majority")))
    # `bad`: one vote for 3, none for 2. `mixed`: 3 votes for 2, 2 for 3.
    assert majority.rewards.tolist() == [1, 0, 1, 0, 1, 1, 1, 0, 1]


def test_a_finished_store_is_reused_until_something_changes(config, tmp_path):
    first = prepare(config)
    stamp = (first.path / "manifest.json").stat().st_mtime_ns
    assert prepare(replace(config, workers=2)).path == first.path
    assert (first.path / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match=r"other inputs or settings.*--overwrite"):
        prepare(replace(config, trajectories_per_group=2))
    changed = prepare(replace(config, trajectories_per_group=2, overwrite=True))
    assert changed.manifest.fingerprint != first.manifest.fingerprint
    again = prepare(replace(config, overwrite=True))
    assert again.manifest.fingerprint == first.manifest.fingerprint
    stamp = (first.path / "manifest.json").stat().st_mtime_ns
    forced = prepare(replace(config, force=True))
    assert (first.path / "manifest.json").stat().st_mtime_ns > stamp
    assert forced.manifest.fingerprint == first.manifest.fingerprint
    with open(config.inputs[0], "a") as file:
        file.write(json.dumps(group("more")) + "\n")
    with pytest.raises(DataError, match="other inputs or settings"):
        prepare(config)
    other = save_tokenizer(tmp_path / "other", corpus=["another corpus altogether, another vocabulary"])
    with pytest.raises(DataError, match="other inputs or settings"):
        prepare(replace(config, tokenizer=str(other)))


def test_a_folder_that_is_no_store_is_never_replaced(config, tmp_path):
    (tmp_path / "store").mkdir()
    precious = tmp_path / "store" / "thesis.tex"
    precious.write_text("years of work")
    with pytest.raises(DataError, match="exists and is no store"):
        prepare(replace(config, overwrite=True, force=True))
    assert precious.read_text() == "years of work"
    precious.unlink()
    assert prepare(config).num_groups == 4


def test_failures_leave_no_store_and_no_scratch(config, tmp_path):
    with pytest.raises(DataError, match=r"no group is left.*prompt too long 5.*at most 1 tokens"):
        prepare(replace(config, max_prompt_tokens=1))
    with pytest.raises(DataError, match="no chat template"):
        prepare(replace(config, tokenizer=str(save_tokenizer(tmp_path / "plain", chat_template=None))))
    with pytest.raises(DataError, match="cannot read the input file"):
        prepare(replace(config, inputs=(str(tmp_path / "absent.jsonl"),)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "plain"]
    with pytest.raises(DataError, match="no finished store here"):
        TrajectoryStore.open(config.output)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("empty.jsonl", lambda path: path.write_bytes(b""), "no valid record in this file.*got no record"),
        ("empty.jsonl.gz", lambda path: path.write_bytes(b""), "no valid record in this file"),
        (
            "bad.jsonl",
            lambda path: write_lines(path, ["{", "["]),
            r"no valid record.*got 2 rejected, the last one .*:2: rec",
        ),
        ("other.parquet", lambda path: pq.write_table(pa.table({"x": [1]}), path), "no valid record.*fields x"),
    ],
)
def test_a_file_without_a_record_is_one_clear_error_even_beside_a_good_one(config, tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(DataError, match=message) as caught:
        prepare(replace(config, inputs=(*config.inputs, str(tmp_path / name))))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in.jsonl", name])


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": ()},
        {"labels": ("guess",)},
        {"trajectories_per_group": 0},
        {"max_prompt_tokens": 0},
        {"max_response_tokens": -1},
    ],
)
def test_impossible_settings(config, change):
    with pytest.raises(ConfigError):
        prepare(replace(config, **change))


@pytest.fixture
def model_dir(tokenizer_dir, tmp_path):
    """The tokenizer in a folder that may hold a model's configuration too."""
    return shutil.copytree(tokenizer_dir, tmp_path / "model")


def write_config(model_dir, **values):
    (model_dir / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("beyond", ["the text", "EOS", "the prompt"])
def test_ids_beyond_the_models_vocabulary_are_refused(beyond, config, model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    size = len(tokenizer)
    text, problem = RIGHT, "What is 1 + 1?"
    if beyond == "EOS":
        tokenizer.add_special_tokens({"eos_token": "<new-end>"})
    elif beyond == "the text":
        tokenizer.add_tokens(["<new>"])
        text = f"<new>{RIGHT}"
    else:
        tokenizer.add_tokens(["<new>"])
        problem = "<new> What is 1 + 1?"
    tokenizer.save_pretrained(model_dir)
    assert len(tokenizer) == size + 1
    path = write_lines(tmp_path / "new.jsonl", [group("fits"), group("beyond", problem=problem, texts=[RIGHT, text])])
    config = replace(config, inputs=(str(path),), tokenizer=str(model_dir))
    write_config(model_dir, vocab_size=size)
    line = 1 if beyond == "EOS" else 2
    message = rf"new\.jsonl:{line}: token ids beyond the model's vocabulary; expected ids below {size} .*; got {size}; "
    with pytest.raises(DataError, match=message):
        prepare(config)
    assert not (tmp_path / "store").exists()
    # The last row of the embedding is one of the model's own.
    write_config(model_dir, vocab_size=size + 1)
    assert prepare(config).largest_id == size


def test_a_larger_tokenizer_whose_surplus_does_not_occur_is_taken(config, model_dir):
    largest = prepare(replace(config, tokenizer=str(model_dir))).largest_id
    write_config(model_dir, vocab_size=largest + 1)
    assert prepare(replace(config, tokenizer=str(model_dir), force=True)).largest_id == largest
    write_config(model_dir, vocab_size=largest)
    with pytest.raises(DataError, match="beyond the model's vocabulary"):
        prepare(replace(config, tokenizer=str(model_dir), force=True))


@pytest.mark.parametrize("values", [{}, {"vocab_size": None}, {"model_type": "bert"}])
def test_a_config_without_a_vocabulary_says_nothing(values, config, model_dir):
    write_config(model_dir, **values)
    assert prepare(replace(config, tokenizer=str(model_dir))).num_groups
