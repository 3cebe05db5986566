"""Records of other projects with several solutions (verl, LUFFY, OpenR1-Math), and the fields that every form minds."""

import csv
import json
from collections import Counter

import pytest

from megatron_offgrpo.data.importers import meets, parse_conditions, parse_record
from megatron_offgrpo.data.rejects import RecordError
from megatron_offgrpo.data.sources import open_source
from megatron_offgrpo.errors import ConfigError
from tests.unit.data.tiny import group

VERL = {
    "data_source": "openr1",
    "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "1 + 1?"}],
    "target": [{"role": "assistant", "content": "two: \\boxed{2}"}],
    "target_lst": [
        [{"role": "assistant", "content": "two: \\boxed{2}"}],
        [{"role": "assistant", "content": "\\boxed{3}"}],
    ],
    "target_rewards": [1.0, 0.0],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"index": 7, "split": "train"},
}
OPENR1 = {
    "problem": "1 + 1?",
    "answer": "2",
    "uuid": "u1",
    "generations": ["\\boxed{2}", "\\boxed{3}"],
    "correctness_math_verify": [True, False],
    "messages": [],
}


def test_verl():
    ignored = Counter()
    group = parse_record(VERL, ignored)
    assert (group.group_id, group.problem, group.answer, group.system) == ("openr1-train-7", "1 + 1?", "2", "Think.")
    assert [(one.text, one.reward) for one in group.trajectories] == [("two: \\boxed{2}", 1.0), ("\\boxed{3}", 0.0)]
    assert ignored == {"ability": 1}
    parse_record(VERL | {"extra_info": {"index": 7, "topic": "sums"}}, ignored)
    assert ignored == {"ability": 2, "extra_info.topic": 1}


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"target_lst": ["a", "b"]}, ["a", "b"]),
        ({"target_lst": [{"role": "assistant", "content": "a"}, "b"]}, ["a", "b"]),
        ({"target_lst": None, "target_rewards": [1]}, ["two: \\boxed{2}"]),
        ({"target_lst": None, "target": "plain", "target_rewards": None}, ["plain"]),
    ],
)
def test_targets_of_every_shape(changes, texts):
    assert [one.text for one in parse_record(VERL | changes, Counter()).trajectories] == texts


def test_ids_without_an_index_come_from_the_prompt():
    one, other = ({**VERL, "extra_info": None, "prompt": [{"role": "user", "content": text}]} for text in ("p", "q"))
    assert parse_record(one, Counter()).group_id == parse_record(one, Counter()).group_id
    assert parse_record(one, Counter()).group_id != parse_record(other, Counter()).group_id


@pytest.mark.parametrize(
    ("changes", "reason", "field"),
    [
        ({"prompt": "1 + 1?"}, "wrong type", "prompt"),
        ({"prompt": []}, "empty list", "prompt"),
        ({"prompt": [{"role": "user", "content": "a"}] * 2}, "not one question", "prompt"),
        ({"prompt": [{"role": "tool", "content": "a"}]}, "unknown role", "prompt[0].role"),
        ({"prompt": [{"role": "user", "content": " "}]}, "empty field", "prompt[0].content"),
        ({"target_lst": []}, "empty trajectory list", "target_lst"),
        ({"target_lst": [["a", "b"]], "target_rewards": None}, "not one answer", "target_lst[0]"),
        ({"target_lst": [4], "target_rewards": None}, "wrong type", "target_lst[0]"),
        ({"target_rewards": [1.0]}, "wrong number of rewards", "target_rewards"),
        ({"target_rewards": [1.0, float("nan")]}, "unknown reward", "target_rewards[1]"),
        ({"reward_model": None}, "missing field", "reward_model.ground_truth"),
        ({"reward_model": {"ground_truth": ""}}, "empty field", "reward_model.ground_truth"),
    ],
)
def test_bad_verl_rows(changes, reason, field):
    with pytest.raises(RecordError) as caught:
        parse_record(VERL | changes, Counter())
    assert (caught.value.reason, caught.value.field) == (reason, field)


AS_TEXT = {
    "target_lst": VERL["target_lst"],
    "target_rewards": VERL["target_rewards"],
    "prompt": VERL["prompt"],
    "reward_model": VERL["reward_model"],
    "extra_info": VERL["extra_info"],
    "target": VERL["target"],
}


@pytest.mark.parametrize("name", [*AS_TEXT, "all"])
def test_verl_columns_as_json_text_are_decoded(name):
    changes = {one: json.dumps(value) for one, value in AS_TEXT.items() if name in (one, "all")}
    assert parse_record(VERL | changes, Counter()) == parse_record(VERL, Counter())
    single = {"target_lst": None, "target_rewards": None}
    alone = parse_record(VERL | changes | single, Counter(), answer_required=False)
    assert [one.text for one in alone.trajectories] == ["two: \\boxed{2}"]
    assert alone.answer == "2"  # also where the labels do not ask for it


@pytest.mark.parametrize(
    ("changes", "reason", "field"),
    [
        ({"target_lst": None, "target": "[{'role': 'assistant', 'content': 'a'}]"}, "wrong type", "target"),
        ({"target_lst": None, "target": '[{"role": "assistant", "content": "a'}, "wrong type", "target"),
        ({"target_lst": None, "target": "[{'index': 0, 'role': 'assistant', 'content': 'a'}]"}, "wrong type", "target"),
        ({"target_lst": ['{"role": "user", "content": "a"}']}, "not an answer", "target_lst[0]"),
        ({"reward_model": "rule"}, "wrong type", "reward_model"),
        ({"reward_model": ["2"]}, "wrong type", "reward_model"),
        ({"extra_info": "{'index': 7}"}, "wrong type", "extra_info"),
        ({"target_rewards": "1, 0"}, "wrong type", "target_rewards"),
        ({"target_info": [{"finish_reason": "stop"}]}, "wrong number of entries", "target_info"),
        ({"system": "another"}, "two system texts", "system"),
        ({"options": ["1", "2"]}, "field without a use", "options"),
        ({"finish_reasons": ["stop", "length"]}, "field without a use", "finish_reasons"),
    ],
)
def test_verl_columns_that_cannot_be_used_are_named(changes, reason, field):
    if "target_lst" in changes:
        changes = {"target_rewards": None, **changes}
    with pytest.raises(RecordError) as caught:
        parse_record(VERL | changes, Counter(), answer_required=False)
    assert (caught.value.reason, caught.value.field) == (reason, field)


@pytest.mark.parametrize("text", ["[1, 2]", '{"a": 1}', "[{x}]", "{1, 2}"])
def test_solutions_that_only_look_like_json_stay_texts(text):
    group = parse_record(VERL | {"target_lst": [text], "target_rewards": None}, Counter())
    assert group.trajectories[0].text == text


@pytest.mark.parametrize(
    ("reasons", "expected"),
    [
        (["stop", "length"], ["stop", "length"]),
        ('["eos", "max_tokens"]', ["stop", "length"]),
        ([None, {"type": "length", "length": 8}], [None, "length"]),
        (None, [None, None]),
    ],
)
def test_finish_reasons_of_openr1(reasons, expected):
    ignored = Counter()
    group = parse_record(OPENR1 | {"finish_reasons": reasons}, ignored)
    assert [one.finish_reason for one in group.trajectories] == expected
    assert ignored == {"messages": 1}
    for bad, reason in ((["stop"], "wrong number of finish reasons"), (["stop", "odd"], "unknown finish reason")):
        with pytest.raises(RecordError, match=reason):
            parse_record(OPENR1 | {"finish_reasons": bad}, Counter())


MEANINGFUL = {
    "options": ["1", "2"], "choices": {"A": "1"}, "finish_reasons": ["stop"], "reasoning_content": "r", "tools": [{}],
    "images": ["x"], "history": [["a", "b"]], "truncated": True,
}  # fmt: skip


@pytest.mark.parametrize("name", MEANINGFUL)
@pytest.mark.parametrize("record", [group(), VERL, OPENR1], ids=["groups", "verl", "openr1"])
def test_what_changes_the_meaning_is_used_or_refused(record, name):
    ignored = Counter()
    if name == "finish_reasons" and record is OPENR1:
        return  # used, above
    with pytest.raises(RecordError, match="field without a use") as caught:
        parse_record(record | {name: MEANINGFUL[name]}, ignored)
    assert (caught.value.field, ignored) == (name, {})
    parse_record(record | {name: None}, ignored)  # a table has a column for all of its rows
    assert not ignored[name]


@pytest.mark.parametrize("record", [group(), OPENR1, VERL | {"prompt": VERL["prompt"][1:]}])
def test_a_system_text_is_used_in_every_form(record):
    assert parse_record(record | {"system": "S"}, Counter()).system == "S"
    assert parse_record(record | {"system_prompt": "S"}, Counter()).system == "S"
    with pytest.raises(RecordError, match="two system texts"):
        parse_record(record | {"system": "S", "system_prompt": "T"}, Counter())


def test_a_thought_beside_a_text_goes_before_it():
    record = group()
    record["trajectories"][0] |= {"reasoning_content": "I add."}
    first, second = parse_record(record, Counter()).trajectories
    assert (first.text, second.text) == ("<think>\nI add.\n</think>\n\n\\boxed{2}", "\\boxed{3}")
    record["trajectories"][0]["logprobs"] = [-1.0]
    with pytest.raises(RecordError, match="field without a use"):
        parse_record(record, Counter())


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Tom has 3 cats.\nThe answer is 12 minus 5.\n#### 7", "7"),
        ("#### 7\n#### 8 ", "8"),
        (["3 #### 7"], "7"),
        ('["7"]', "7"),
        ("[1, 2]", "[1, 2]"),
    ],
)
def test_a_worked_reference_is_cut_at_its_mark(answer, expected):
    assert parse_record(group(answer=answer), Counter()).answer == expected
    assert parse_record(VERL | {"reward_model": {"ground_truth": answer}}, Counter()).answer == expected


@pytest.mark.parametrize(
    "answer", ["nan", "NaN ", "7 ####", "####", "['7']", '["7", "8"]', float("nan"), float("inf"), None, True]
)
def test_what_is_no_reference_is_refused(answer):
    with pytest.raises(RecordError):
        parse_record(group(answer=answer), Counter())


def test_groups_in_a_table_hold_their_lists_as_json_text(tmp_path):
    record = group(answer="2")
    cells = record | {"trajectories": json.dumps(record["trajectories"])}
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, cells)
        writer.writeheader()
        writer.writerow(cells)
    (part,) = open_source(str(path), "train").parts()
    ((_, found),) = part.records()
    assert parse_record(found, Counter()) == parse_record(record, Counter())


def test_openr1():
    group = parse_record(OPENR1, Counter())
    assert (group.group_id, group.problem, group.answer) == ("u1", "1 + 1?", "2")
    assert [(one.text, one.reward) for one in group.trajectories] == [("\\boxed{2}", 1.0), ("\\boxed{3}", 0.0)]
    with pytest.raises(RecordError, match="wrong number of rewards"):
        parse_record(OPENR1 | {"correctness_math_verify": [True]}, Counter())


def test_a_forced_form_is_the_only_one_looked_for():
    with pytest.raises(RecordError) as caught:
        parse_record(VERL, Counter(), form="groups")
    assert (caught.value.reason, caught.value.field) == ("missing field", "trajectories")


def test_conditions():
    conditions = parse_conditions(["domain=math", "meta.level=3"])
    assert meets({"domain": "math", "meta": {"level": 3}}, conditions)
    assert not meets({"domain": "code", "meta": {"level": 3}}, conditions)
    assert not meets({"domain": "math"}, conditions)
    assert meets(["no object"], conditions)
    with pytest.raises(ConfigError):
        parse_conditions(["domain"])
