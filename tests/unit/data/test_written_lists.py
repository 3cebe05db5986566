"""Lists and messages that stand in a text as JSON, Python or numpy write them: decoded or refused, never trained on."""

import json
from collections import Counter

import numpy as np
import pytest

from megatron_offgrpo.data.importers import parse_record
from megatron_offgrpo.data.rejects import RecordError
from megatron_offgrpo.data.row_forms import read_row
from megatron_offgrpo.data.written_lists import is_written
from tests.unit.data.tiny import group

LONG = {"note": "x{1}{2} " * 100, "role": "assistant", "content": "a"}
MESSAGE = {"content": "a", "role": "assistant"}
VERL = {"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": "7"}}
OPENR1 = {"problem": "q", "answer": "7"}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([MESSAGE]),
        json.dumps(MESSAGE),
        json.dumps([LONG]),
        str([LONG]),
        '["a"]',
        '[["a"], ["b"]]',
        r'["\\boxed{7}"]',
        r'["\boxed{7}", "\(7\)"]',
        '["one\ntwo \\(x\\)"]',
        json.dumps([{"type": "text", "text": "a"}]),
        "['a', \"b\"]",
        repr(np.array([MESSAGE])),
        repr([np.array([MESSAGE])]),
        repr(np.array([MESSAGE, MESSAGE])).replace("array", "np.array"),
        str(np.array([MESSAGE, LONG])),
        repr(np.array(["a", "b"])),
        repr(np.array(["a", "b"], dtype=object)),
        str(np.array(["a", "b"])),
        json.dumps([LONG])[:-3],
        str([LONG])[:-3],
    ],
)
def test_lists_of_texts_and_messages(text):
    assert is_written(text)
    assert is_written(f"\n {text} \n")


@pytest.mark.parametrize(
    "text",
    [
        "[1,2] is the interval",
        "[1, 2]",
        "[x, y)",
        "[\\frac{1}{2}, 3]",
        "\\[x\\]",
        "[]",
        '["a", "b"] is the list',
        '["a"] or ["b"]',
        "['a'] or ['b']",
        "['a'] is the list",
        '["a", 1]',
        '[{"value": 3}] is the list',
        '{"a": 1}',
        "{'a', 'b'}",
        "{1, 2}",
        '"a" is quoted',
        "",
    ],
)
def test_answers_that_only_look_like_lists(text):
    assert not is_written(text)
    record = OPENR1 | {"generations": [text]}
    assert parse_record(record, Counter()).trajectories[0].text == text
    assert parse_record(VERL | {"target": text}, Counter()).trajectories[0].text == text
    ours = group()
    ours["trajectories"][0]["text"] = text
    assert parse_record(ours, Counter()).trajectories[0].text == text


@pytest.mark.parametrize(
    ("record", "texts"),
    [
        (OPENR1 | {"generations": [json.dumps([MESSAGE]), "b"]}, ["a", "b"]),
        (OPENR1 | {"generations": [MESSAGE, r'["\\boxed{7}"]']}, ["a", r"\boxed{7}"]),
        (VERL | {"target": r'["\\boxed{7}"]'}, [r"\boxed{7}"]),
        (VERL | {"target": json.dumps([LONG | {"note": None}])}, ["a"]),
        (VERL | {"target_lst": ['["a"]', json.dumps(MESSAGE)]}, ["a", "a"]),
        (VERL | {"target_lst": json.dumps([json.dumps([MESSAGE])])}, ["a"]),
        ({"prompt": "q", "chosen": '["a"]', "rejected": json.dumps([MESSAGE | {"content": "b"}])}, ["a", "b"]),
    ],
)
def test_a_list_of_one_solution_is_decoded_where_a_form_allows_it(record, texts):
    group = parse_record(record, Counter(), answer_required=False)
    assert [one.text for one in group.trajectories] == texts


def test_a_first_key_of_any_length_hides_no_message():
    found = parse_record(VERL | {"target": json.dumps([LONG])}, ignored := Counter())
    assert [one.text for one in found.trajectories] == ["a"]
    assert ignored == {"target[].note": 1}


def test_what_a_message_of_a_generation_says_of_its_end_counts():
    cut = json.dumps([MESSAGE | {"finish_reason": "length"}])
    (one,) = parse_record(OPENR1 | {"generations": [cut]}, Counter()).trajectories
    assert one.finish_reason == "length"


@pytest.mark.parametrize(
    ("record", "reason", "field"),
    [
        (OPENR1 | {"generations": [repr(np.array([MESSAGE]))]}, "wrong type", "generations[0]"),
        (OPENR1 | {"generations": ["['a']"]}, "wrong type", "generations[0]"),
        (OPENR1 | {"generations": ['["a", "b"]']}, "not one answer", "generations[0]"),
        (VERL | {"target": r'["\boxed{7}"]'}, "lost backslash", "target"),
        (VERL | {"target": r'["so \\(x\\) is \frac12"]'}, "lost backslash", "target"),
        (VERL | {"target": r'["\(7\)"]'}, "wrong type", "target"),
        (VERL | {"target": str([LONG])}, "wrong type", "target"),
        (VERL | {"target_lst": [str(np.array([MESSAGE, MESSAGE]))]}, "wrong type", "target_lst[0]"),
        (group(trajectories=[{"text": '["a"]'}]), "a list in a text", "trajectories[0].text"),
        (group(trajectories=[{"text": str([MESSAGE])}]), "a list in a text", "trajectories[0].text"),
        ({"prompt": "q", "chosen": "['a']", "rejected": "b"}, "wrong type", "chosen"),
    ],
)
def test_a_list_that_cannot_be_one_solution_is_refused(record, reason, field):
    with pytest.raises(RecordError) as caught:
        parse_record(record, Counter(), answer_required=False)
    assert (caught.value.reason, caught.value.field) == (reason, field)


def test_lists_in_rows_of_one_solution():
    def text(record):
        return read_row(record, "auto", Counter())[1]["trajectories"][0]["text"]

    user = {"role": "user", "content": "q"}
    parts = json.dumps([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])
    assert text({"messages": [user, {"role": "assistant", "content": parts}]}) == "ab"
    assert text({"prompt": "q", "completion": '["a"]'}) == "a"
    assert text({"instruction": "q", "output": "[1,2] is the interval"}) == "[1,2] is the interval"
    for record, field in (
        ({"instruction": "q", "output": '["a"]'}, "output"),
        ({"messages": [user, MESSAGE | {"content": '["a"]'}]}, "messages[1].content[0]"),
        ({"messages": [user, MESSAGE | {"content": json.dumps(MESSAGE)}]}, "messages[1].content"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "['a']"}]},
            "conversations[1].value",
        ),
        ({"prompt": "q", "completion": repr(np.array(["a"]))}, "completion"),
    ):
        with pytest.raises(RecordError) as caught:
            text(record)
        assert caught.value.field == field
