"""Chat messages in raw records: `role` and `content`, or ShareGPT's `from` and `value`; lists, or their JSON text."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_offgrpo.data import fields
from megatron_offgrpo.data.rejects import RecordError
from megatron_offgrpo.data.written_lists import is_written

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
STYLES = (("role", "content"), ("from", "value"))
THOUGHT_FIELDS = ("reasoning_content", "reasoning")
"""Where servers put the thought that they cut from an answer."""
SYSTEM_FIELDS = ("system", "system_prompt")
_THOUGHT = "<think>\n{}"
_THOUGHT_ENDS = "\n</think>\n\n"


@dataclass(frozen=True)
class Message:
    """One message, read."""

    role: str
    """`system`, `user` or `assistant`."""
    text: str
    finish_reason: str | None = None


def read_messages(value: Any, where: str, ignored: Counter[str]) -> list[Message]:
    """The messages of a list.

    Raises:
        RecordError: another role, or a content that is no text.
    """
    found = fields.non_empty_list(value, where, "messages")
    return [_message(one, f"{where}[{index}]", ignored) for index, one in enumerate(found)]


def _message(value: Any, where: str, ignored: Counter[str]) -> Message:
    raw = fields.mapping(value, where)
    role, content = next((style for style in STYLES if raw.get(style[0]) is not None), STYLES[0])
    who = raw.get(role)
    if not isinstance(who, str) or who not in ROLES:
        raise RecordError("unknown role", f"{where}.{role}", expected=" or ".join(ROLES), got=who)
    name = ROLES[who]
    own: tuple[str, ...] = (role, content)
    if name == "assistant":
        own = (*own, *THOUGHT_FIELDS, "finish_reason")
    fields.account(raw, own, f"{where}.", ignored)
    said = raw.get(content)
    if isinstance(said, str) and is_written(said):
        said = fields.from_json_text(said, f"{where}.{content}", "a text, or parts of one")
    if isinstance(said, list):
        said = _joined(said, f"{where}.{content}")
    if content in raw:
        raw = raw | {content: said}
    if name == "assistant":
        reason = fields.finish_reason(raw.get("finish_reason"), f"{where}.finish_reason")
        return Message(name, answer_text(raw, content, f"{where}."), reason)
    return Message(name, fields.required_text(raw, content, f"{where}.", may_be_blank=name == "system"))


def _joined(parts: list[Any], where: str) -> str:
    """The text of a content in parts, all of which must be texts."""
    texts = []
    for index, part in enumerate(parts):
        place = f"{where}[{index}]"
        kind = fields.mapping(part, place).get("type")
        if kind != "text":
            raise RecordError("not a text", f"{place}.type", expected="text", got=kind)
        texts.append(fields.required_text(part, "text", f"{place}.", may_be_blank=True))
    return "".join(texts)


def answer_text(record: dict[str, Any], field: str, prefix: str) -> str:
    """The text of a solution; a thought that stands beside it goes before it, as Qwen3's template writes it.

    A thought without a text was cut: it stays open.
    """
    thoughts = [name for name in THOUGHT_FIELDS if record.get(name) is not None]
    if not thoughts:
        return fields.required_text(record, field, prefix, may_be_blank=True)
    name = thoughts[0]
    thought = fields.checked_text(record[name], prefix + name)
    if any(record[other] != thought for other in thoughts):
        raise RecordError("two thoughts", prefix + thoughts[1], expected=f"that of {name}", got=record[thoughts[1]])
    text = fields.text(record, field, prefix) or ""
    if not thought.strip():
        return text
    if "</think>" in text:
        raise RecordError("two thoughts", prefix + name, expected="none beside a text with </think>", got=thought)
    opened = _THOUGHT.format(thought.strip("\n"))
    return opened + _THOUGHT_ENDS + text.lstrip("\n") if text.strip() else opened


def question(messages: Sequence[Message], where: str) -> tuple[str | None, str]:
    """(system text or None, question) of messages up to the answer.

    Raises:
        RecordError: they are not one question, with at most one system text before it.
    """
    roles = [one.role for one in messages]
    if roles not in (["user"], ["system", "user"]):
        got = ", ".join(roles) or "no message"
        raise RecordError("not one question", where, expected="one question, at most one system text before", got=got)
    return (messages[0].text if len(messages) > 1 else None), messages[-1].text


def question_and_answer(messages: Sequence[Message], where: str) -> tuple[str | None, str, Message]:
    """(system text or None, question, answer) of a conversation.

    Raises:
        RecordError: the last message is no answer, or the rest is not one question.
    """
    if messages[-1].role != "assistant":
        place = f"{where}[{len(messages) - 1}]"
        expected = "an answer of the assistant (gpt) at the end"
        raise RecordError("no answer", place, expected=expected, got=messages[-1].role)
    system, asked = question(messages[:-1], where)
    return system, asked, messages[-1]


def solution_text(record: dict[str, Any], field: str, prefix: str) -> str:
    """`answer_text` of a field that holds a text and nothing else.

    Raises:
        RecordError: the text writes a list, or messages.
    """
    value = record.get(field)
    if isinstance(value, str) and is_written(value):
        raise RecordError("a list in a text", prefix + field, expected="the text of one solution", got=value)
    return answer_text(record, field, prefix)


def is_messages(value: Any) -> bool:
    """Whether a value is a list of messages or texts, or one message; or the text of one."""
    return isinstance(value, list | dict) or (isinstance(value, str) and is_written(value))


def single_answer(value: Any, where: str, ignored: Counter[str]) -> Message:
    """The one solution that a text, a message, or a list with one message of the assistant holds.

    Raises:
        RecordError: anything else, such as messages written by Python instead of JSON.
    """
    if not is_messages(value):
        if isinstance(value, str) or value is None:
            return Message("assistant", fields.checked_text(value, where))
        raise RecordError("wrong type", where, expected="a text, or a message", got=value)
    value = fields.from_json_text(value, where, "a text, or messages")
    if isinstance(value, list):
        if len(value) != 1:
            raise RecordError("not one answer", where, expected="a text or one message", got=f"{len(value)} messages")
        return single_answer(value[0], f"{where}[0]", ignored)
    message = _message(value, where, ignored)
    if message.role != "assistant":
        raise RecordError("not an answer", where, expected="a message of the assistant", got=message.role)
    return message


def system_of(record: dict[str, Any], found: str | None = None) -> str | None:
    """The system text of a record, from a field of its own or from its messages (`found`).

    Raises:
        RecordError: it has two that differ.
    """
    for name in SYSTEM_FIELDS:
        own = fields.text(record, name, "")
        if own is None or own == found or (not own.strip() and found is not None):
            continue
        if found is not None:
            raise RecordError("two system texts", name, expected=f"none, or {found!r}", got=own)
        found = own
    return found
