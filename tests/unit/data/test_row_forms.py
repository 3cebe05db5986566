"""Rows of one solution (conversations, messages, Alpaca, completions) and pairs of a chosen and a rejected one."""

import json
from collections import Counter

import pytest

from megatron_offgrpo.data.importers import form_of, parse_record
from megatron_offgrpo.data.rejects import RecordError
from megatron_offgrpo.data.row_forms import read_row

S, U, A = ({"role": role, "content": text} for role, text in (("system", "S"), ("user", "q"), ("assistant", "a")))
TALK = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def row(record, form="auto"):
    """((system, problem, answer, text, finish_reason, reward), ignored) of a row."""
    ignored = Counter()
    key, found = read_row(record, form, ignored)
    (one,) = found["trajectories"]
    assert key == found["group_id"]
    return (
        found["system"],
        found["problem"],
        found["answer"],
        one["text"],
        one["finish_reason"],
        one["reward"],
    ), ignored


@pytest.mark.parametrize(
    ("form", "record", "expected"),
    [
        ("sharegpt", {"conversations": TALK}, (None, "q", "", "a", None, None)),
        ("sharegpt", {"conversations": [S, U, A]}, ("S", "q", "", "a", None, None)),
        ("sharegpt", {"conversations": json.dumps(TALK), "system": "S"}, ("S", "q", "", "a", None, None)),
        ("sharegpt", {"conversations": [S, U, A], "system": "S"}, ("S", "q", "", "a", None, None)),
        ("sharegpt", {"conversations": TALK, "system": ""}, (None, "q", "", "a", None, None)),
        ("sharegpt", {"conversations": TALK, "system_prompt": "S"}, ("S", "q", "", "a", None, None)),
        ("sharegpt", {"conversations": TALK, "kto_tag": False}, (None, "q", "", "a", None, 0.0)),
        ("messages", {"messages": [U, A], "answer": 8}, (None, "q", "8", "a", None, None)),
        ("messages", {"messages": [S, U, A], "finish_reason": "length"}, ("S", "q", "", "a", "length", None)),
        ("messages", {"messages": [U, A | {"finish_reason": "MAX_TOKENS"}]}, (None, "q", "", "a", "length", None)),
        (
            "messages",
            {"messages": [U, A | {"reasoning_content": "\nr\n"}]},
            (None, "q", "", "<think>\nr\n</think>\n\na", None, None),
        ),
        (
            "messages",
            {"messages": [U, A | {"content": None, "reasoning_content": "r"}], "finish_reason": "length"},
            (None, "q", "", "<think>\nr", "length", None),
        ),
        (
            "messages",
            {"messages": [U, A | {"reasoning_content": None, "tool_calls": []}]},
            (None, "q", "", "a", None, None),
        ),
        (
            "messages",
            {"messages": [U | {"content": [{"type": "text", "text": "q"}]}, A]},
            (None, "q", "", "a", None, None),
        ),
        ("alpaca", {"instruction": "q", "output": "a"}, (None, "q", "", "a", None, None)),
        (
            "alpaca",
            {"instruction": "q", "input": "i", "output": "a", "system": "S"},
            ("S", "q\ni", "", "a", None, None),
        ),
        ("alpaca", {"instruction": "q", "input": "", "output": "a", "history": []}, (None, "q", "", "a", None, None)),
        ("completion", {"prompt": "q", "completion": "a", "answer": "2 #### 7"}, (None, "q", "7", "a", None, None)),
        ("completion", {"prompt": [S, U], "completion": [A], "label": True}, ("S", "q", "", "a", None, 1.0)),
        ("completion", {"prompt": "q", "response": "a", "label": "0"}, (None, "q", "", "a", None, 0.0)),
        ("completion", {"query": "q", "response": "a"}, (None, "q", "", "a", None, None)),
        ("completion", {"prompt": json.dumps([U]), "completion": json.dumps([A])}, (None, "q", "", "a", None, None)),
    ],
)
def test_rows(form, record, expected):
    assert form_of(record) == form
    found, ignored = row(record)
    assert found == expected
    assert set(ignored) <= {"history", "messages[].tool_calls"}
    assert row(record, form)[0] == expected


@pytest.mark.parametrize(
    ("record", "reason", "field"),
    [
        ({"conversations": TALK, "options": ["1", "2"]}, "field without a use", "options"),
        ({"conversations": TALK, "finish_reasons": ["stop"]}, "field without a use", "finish_reasons"),
        ({"conversations": TALK, "reasoning_content": "r"}, "field without a use", "reasoning_content"),
        ({"conversations": [S, U, A], "system": "another"}, "two system texts", "system"),
        ({"conversations": TALK, "system": 3}, "wrong type", "system"),
        ({"conversations": [U]}, "no answer", "conversations[0]"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "no answer", "conversations[0]"),
        ({"messages": [U, A, U, A]}, "not one question", "messages"),
        ({"messages": [U, S, A]}, "not one question", "messages"),
        ({"messages": [U, {"role": "tool", "content": "t"}, A]}, "unknown role", "messages[1].role"),
        ({"messages": [U, A | {"tool_calls": [{"id": 1}]}]}, "field without a use", "messages[1].tool_calls"),
        ({"messages": [U, A | {"content": None}]}, "wrong type", "messages[1].content"),
        ({"messages": [U | {"content": [{"type": "image_url"}]}, A]}, "not a text", "messages[0].content[0].type"),
        ({"messages": [U | {"reasoning_content": "r"}, A]}, "field without a use", "messages[0].reasoning_content"),
        (
            {"messages": [U, A | {"reasoning_content": "r", "content": "<think>x</think>a"}]},
            "two thoughts",
            "messages[1].reasoning_content",
        ),
        (
            {"messages": [U, A | {"finish_reason": "content_filter"}]},
            "unknown finish reason",
            "messages[1].finish_reason",
        ),
        ({"messages": "[{'role': 'user', 'content': 'q'}]"}, "wrong type", "messages"),
        ({"instruction": "q", "output": "a", "history": [["x", "y"]]}, "field without a use", "history"),
        ({"instruction": " ", "output": "a"}, "empty field", "instruction"),
        ({"instruction": "q", "output": ["a"]}, "wrong type", "output"),
        ({"prompt": "q", "completion": "[{'role': 'assistant', 'content': 'a'}]"}, "wrong type", "completion"),
        ({"prompt": "q", "completion": [U]}, "not an answer", "completion[0]"),
        ({"prompt": "q", "completion": "a", "reward": 0.5}, "unknown reward", "reward"),
        ({"prompt": "q", "completion": "a", "answer": float("nan")}, "wrong type", "answer"),
        ({"prompt": "q"}, "missing field", "record"),
    ],
)
def test_rows_that_cannot_be_used(record, reason, field):
    ignored = Counter()
    with pytest.raises(RecordError) as caught:
        read_row(record, "auto", ignored)
    assert (caught.value.reason, caught.value.field) == (reason, field)
    assert not ignored


def test_what_has_no_part_in_a_row_is_counted():
    record = {
        "messages": [U, A | {"name": "bot"}],
        "source": "aops",
        "label": "algebra",
        "metadata": {"model": "m", "x": 1},
    }
    assert row(record)[1] == {"messages[].name": 1, "source": 1, "label": 1, "metadata.x": 1}
    assert row({"conversations": TALK, "metadata": "free text"})[1] == {"metadata": 1}


def test_rows_of_two_system_texts_are_two_problems():
    def key(**more):
        return read_row({"conversations": TALK, **more}, "auto", Counter())[0]

    assert len({key(), key(system="S"), key(system="T")}) == 3
    named = {"metadata": {"hash_problem": "h"}}
    assert key(**named) == "h"
    assert len({key(**named), key(**named, system="S"), key(**named, system="T")}) == 3


PAIR = {"chosen": "yes", "rejected": "no"}
SIDES = {"chosen": [U, A], "rejected": [U, A | {"content": "b"}]}


@pytest.mark.parametrize(
    ("record", "system", "texts"),
    [
        (PAIR | {"prompt": "q"}, None, ["yes", "no"]),
        (PAIR | {"question": "q", "system": "S"}, "S", ["yes", "no"]),
        (PAIR | {"instruction": "q", "input": ""}, None, ["yes", "no"]),
        (PAIR | {"prompt": [S, U]}, "S", ["yes", "no"]),
        ({"prompt": "q", "chosen": [A], "rejected": {"role": "assistant", "content": "b"}}, None, ["a", "b"]),
        ({"conversations": TALK[:1], "chosen": TALK[1], "rejected": {"from": "gpt", "value": "b"}}, None, ["a", "b"]),
        (SIDES, None, ["a", "b"]),
        (SIDES | {"prompt": "q"}, None, ["a", "b"]),
        ({name: json.dumps(value) for name, value in SIDES.items()}, None, ["a", "b"]),
        ({name: [S, *value] for name, value in SIDES.items()}, "S", ["a", "b"]),
    ],
)
def test_a_chosen_and_a_rejected_solution_are_a_group_of_two(record, system, texts):
    ignored = Counter()
    group = parse_record(record | {"score_chosen": 9.0}, ignored, answer_required=False)
    assert (group.system, group.problem, group.answer) == (system, "q", "")
    assert [(one.text, one.reward) for one in group.trajectories] == list(zip(texts, (1.0, 0.0), strict=True))
    assert ignored == {"score_chosen": 1}
    assert form_of(record) == "preference"


@pytest.mark.parametrize(
    ("record", "reason", "field"),
    [
        (PAIR, "missing field", "prompt"),
        ({"prompt": "q", "chosen": "yes"}, "missing field", "rejected"),
        ({"prompt": "q", "chosen": None, "rejected": "no"}, "missing field", "chosen"),
        ({"prompt": "q", "chosen": "yes", "rejected": "yes"}, "equal solutions", "rejected"),
        (SIDES | {"prompt": "another"}, "two questions", "chosen"),
        (SIDES | {"rejected": [U | {"content": "p"}, A]}, "two questions", "rejected"),
        ({"chosen": [U, A, U, A], "rejected": [U, A]}, "not one question", "chosen"),
        (PAIR | {"prompt": "q", "finish_reason": "length"}, "field without a use", "finish_reason"),
        (PAIR | {"instruction": "q", "history": [["a", "b"]]}, "field without a use", "history"),
    ],
)
def test_pairs_that_cannot_be_used(record, reason, field):
    with pytest.raises(RecordError) as caught:
        parse_record(record, Counter(), answer_required=False)
    assert (caught.value.reason, caught.value.field) == (reason, field)


def test_a_pair_without_a_reference_says_which_label_needs_none():
    with pytest.raises(RecordError) as caught:
        parse_record(PAIR | {"prompt": "q"}, Counter())
    assert (caught.value.reason, caught.value.field) == ("missing field", "answer")
    assert "--label given" in caught.value.expected
    assert caught.value.got == "fields chosen, rejected, prompt"
    assert parse_record(PAIR | {"prompt": "q", "answer": "yes"}, Counter()).answer == "yes"


def test_a_row_among_groups_says_so():
    with pytest.raises(RecordError) as caught:
        parse_record({"messages": [U, A]}, Counter())
    assert caught.value.reason == "unknown form"
    assert "a file of their own" in caught.value.expected
    with pytest.raises(RecordError) as caught:
        parse_record({"x": 1}, Counter())
    assert "instruction and output" in caught.value.expected
