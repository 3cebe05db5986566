"""Rows of one solution each, which `data.grouping` groups by problem, and rows of a chosen and a rejected solution."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from megatron_offgrpo.artifacts import fingerprint_of
from megatron_offgrpo.data import fields
from megatron_offgrpo.data.messages import (
    SYSTEM_FIELDS,
    THOUGHT_FIELDS,
    Message,
    answer_text,
    is_messages,
    question,
    question_and_answer,
    read_messages,
    single_answer,
    solution_text,
    system_of,
)
from megatron_offgrpo.data.rejects import RecordError
from megatron_offgrpo.types import GroupRecord, TrajectoryRecord

ANSWERS = ("answer", "ground_truth", "expected_answer", "final_answer", "gold")
REWARDS = ("reward", "label", "kto_tag")
_TRUTH_TEXTS = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0}
COMPLETIONS = ("completion", "response")
PROMPTS = ("prompt", "question", "problem", "query")

_SAME = {"prompt": PROMPTS, "completion": COMPLETIONS}
"""Names that mean the same as one that tells a form."""

Asked = tuple[str | None, str]
"""(system text or None, question)."""
Parsed = tuple[Asked, Message, tuple[str, ...]]
"""What was asked, the solution, and the fields that both were read from."""


def _conversation(record: dict[str, Any], name: str, ignored: Counter[str]) -> Parsed:
    """A conversation of one question and one answer: ShareGPT's `conversations`, or `messages`."""
    system, problem, answer = question_and_answer(read_messages(record.get(name), name, ignored), name)
    return (system, problem), answer, (name,)


def _alpaca(record: dict[str, Any], ignored: Counter[str]) -> Parsed:
    """Alpaca's `instruction`, `input` and `output`."""
    answer = Message("assistant", solution_text(record, "output", ""))
    return _instruction(record), answer, ("instruction", "input", "output", *THOUGHT_FIELDS)


def _instruction(record: dict[str, Any]) -> Asked:
    """The input follows the instruction on a line of its own, as LLaMA-Factory joins them."""
    problem = fields.required_text(record, "instruction", "", may_be_blank=False)
    more = fields.text(record, "input", "")
    return None, f"{problem}\n{more}" if more is not None and more.strip() else problem


def _completion(record: dict[str, Any], ignored: Counter[str]) -> Parsed:
    """TRL's `prompt` and `completion`, each a text or messages."""
    asked_in, name = (next(one for one in names if record.get(one) is not None) for names in (PROMPTS, COMPLETIONS))
    asked = _prompt(record, asked_in, ignored)
    if is_messages(record[name]):
        return asked, single_answer(record[name], name, ignored), (asked_in, name)
    return asked, Message("assistant", answer_text(record, name, "")), (asked_in, name, *THOUGHT_FIELDS)


def _prompt(record: dict[str, Any], name: str, ignored: Counter[str]) -> Asked:
    if is_messages(record.get(name)):
        return question(read_messages(record[name], name, ignored), name)
    return None, fields.required_text(record, name, "", may_be_blank=False)


RowForm = Callable[[dict[str, Any], Counter[str]], Parsed]
ROW_FORMS: dict[str, tuple[tuple[str, ...], RowForm]] = {
    "sharegpt": (("conversations",), lambda record, ignored: _conversation(record, "conversations", ignored)),
    "messages": (("messages",), lambda record, ignored: _conversation(record, "messages", ignored)),
    "alpaca": (("instruction", "output"), _alpaca),
    "completion": (("prompt", "completion"), _completion),
}
"""Name -> (fields that together tell the form, what reads it)."""


def row_form(record: dict[str, Any]) -> str | None:
    """The form of a row of one solution; None where it has none of these."""
    return next((form for form in ROW_FORMS if _tells(record, form)), None)


def _tells(record: dict[str, Any], form: str) -> bool:
    groups = [_SAME.get(name, (name,)) for name in ROW_FORMS[form][0]]
    return all(any(record.get(name) is not None for name in names) for names in groups)


def read_row(record: Any, form: str, ignored: Counter[str]) -> tuple[str, dict[str, Any]]:
    """(key of the problem, row of our own form with one trajectory) of a row of one solution.

    The key is `metadata.hash_problem` where there is one, else the hash of the question; a system text belongs to it.

    Raises:
        RecordError: it has not the form, or a field is wrong.
    """
    if isinstance(record, RecordError):
        raise record
    if not isinstance(record, dict):
        raise RecordError("wrong type", "record", expected="an object", got=record)
    found = row_form(record) if form == "auto" else form
    if found is None or not _tells(record, found):
        known = ", or ".join(" and ".join(tells) for tells, _ in ROW_FORMS.values())
        raise RecordError("missing field", "record", expected=known, got=f"fields {', '.join(record)}")
    counted = Counter[str]()
    (system, problem), answer, used = ROW_FORMS[found][1](record, counted)
    system = system_of(record, system) or None
    metadata, metadata_fields = _metadata(record, counted)
    reward, reward_fields = _reward(record)
    named = metadata.get("hash_problem") is not None
    if named:
        key = fields.identifier(metadata, "hash_problem")
        key = key if system is None else fingerprint_of(key, system)
    else:
        key = fingerprint_of(system, problem)
    reason = fields.finish_reason(record.get("finish_reason"), "finish_reason") or answer.finish_reason
    used = (*used, *SYSTEM_FIELDS, *ANSWERS, *metadata_fields, *reward_fields, "finish_reason")
    fields.account(record, used, "", counted)
    ignored.update(counted)
    source = fields.text(metadata, "model", "metadata.")
    return key, {
        "group_id": key,
        "problem": problem,
        "answer": _answer(record, metadata, required=False),
        "system": system,
        "trajectories": [{"text": answer.text, "source": source, "finish_reason": reason, "reward": reward}],
    }


def _metadata(record: dict[str, Any], ignored: Counter[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """OpenThoughts' `metadata`, and its name where it is used; what is no object is only counted."""
    value = record.get("metadata")
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = fields.mapping(value, "metadata")
    if not isinstance(value, dict):
        return {}, ()
    fields.account(value, ("hash_problem", "model", *ANSWERS), "metadata.", ignored)
    return value, ("metadata",)


def _reward(record: dict[str, Any]) -> tuple[float | None, tuple[str, ...]]:
    """A reward, and the field that it stands in; a `label` of another kind (a topic, say) is only counted."""
    for name in REWARDS:
        value = record.get(name)
        if isinstance(value, str):  # of a table
            value = _TRUTH_TEXTS.get(value.strip().lower(), value)
        if value is None or (name == "label" and value not in (0, 1)):
            continue
        return fields.reward(value, name), (name,)
    return None, ()


def _answer(record: dict[str, Any], metadata: dict[str, Any], *, required: bool) -> str:
    for one, prefix in ((record, ""), (metadata, "metadata.")):
        for name in ANSWERS:
            if one.get(name) is not None:
                return fields.reference(one, name, prefix, required=required)
    return fields.reference(record, ANSWERS[0], "", required=required)


def pair_group(record: dict[str, Any], ignored: Counter[str], answer_required: bool) -> GroupRecord:
    """A question with a `chosen` and a `rejected` solution: a group of two, with rewards 1 and 0.

    The question is a prompt beside them, the messages before them, or both.
    """
    asked, used = _asked(record, ignored)
    sides = [_side(record, name, asked, ignored) for name in ("chosen", "rejected")]
    if sides[0][0] != sides[1][0]:
        raise RecordError("two questions", "rejected", expected=f"that of chosen: {sides[0][0]}", got=sides[1][0])
    (system, problem), texts = sides[0][0], [answer.text for _, answer in sides]
    if texts[0] == texts[1]:
        raise RecordError("equal solutions", "rejected", expected="another text than chosen has", got=texts[1])
    system = system_of(record, system) or None
    fields.account(record, (*used, "chosen", "rejected", *SYSTEM_FIELDS, *ANSWERS), "", ignored)
    return GroupRecord(
        group_id=fingerprint_of(system, problem, *texts),
        problem=problem,
        answer=_answer(record, {}, required=answer_required),
        system=system,
        trajectories=tuple(
            TrajectoryRecord(answer.text, reward, finish_reason=answer.finish_reason)
            for (_, answer), reward in zip(sides, (1.0, 0.0), strict=True)
        ),
    )


def _asked(record: dict[str, Any], ignored: Counter[str]) -> tuple[Asked | None, tuple[str, ...]]:
    """What is asked beside the two solutions, and the fields that say it; None where it stands in them."""
    for name in PROMPTS:
        if record.get(name) is not None:
            return _prompt(record, name, ignored), (name,)
    if record.get("instruction") is not None:
        return _instruction(record), ("instruction", "input")
    if record.get("conversations") is not None:
        return question(read_messages(record["conversations"], "conversations", ignored), "conversations"), (
            "conversations",
        )
    return None, ()


def _side(record: dict[str, Any], name: str, asked: Asked | None, ignored: Counter[str]) -> tuple[Asked, Message]:
    """(what was asked, solution) of one side of a pair."""
    value = record.get(name)
    if value is None:
        raise RecordError("missing field", name, expected="a solution beside the other one", got=None)
    if is_messages(value):
        value = fields.from_json_text(value, name, "a text, or messages")
        if isinstance(value, list) and len(value) > 1:
            system, problem, answer = question_and_answer(read_messages(value, name, ignored), name)
            if asked is not None and asked[1].strip() != problem.strip():
                raise RecordError("two questions", name, expected=f"that of the prompt: {asked[1]}", got=problem)
            if asked is not None and system is None:
                system = asked[0]
            return (system, problem), answer
    if asked is None:
        expected = f"{', '.join(PROMPTS)} or instruction, or the question in the messages"
        raise RecordError("missing field", "prompt", expected=expected, got=f"fields {', '.join(record)}")
    return asked, single_answer(value, name, ignored)
