"""Fields of raw records, checked one by one."""

import json
import math
import re
from collections import Counter
from collections.abc import Collection
from decimal import Decimal
from typing import Any

from megatron_offgrpo.data.option_columns import option_columns
from megatron_offgrpo.data.rejects import RecordError

LOGPROB_TOLERANCE = 1e-3
"""Log-probs above 0 by no more than this are the generator's rounding."""
CUT = "length"
"""`finish_reason` of a response that the generator cut, as OpenAI's interface and vLLM call it."""
_CUT_NAMES = (CUT, "max_tokens", "max_length", "model_length")
_END_NAMES = ("stop", "eos", "eos_token", "end_turn", "stop_sequence")
REFERENCE_MARK = "####"
"""A worked solution as a reference (GSM8K): the final answer follows this mark."""
# A list of texts in a cell, as JSON or Python writes it; `[1, 2]` is an interval.
_WRITTEN_TEXTS = re.compile(r"""\s*\[\s*['"]""")
# `["\boxed{7}"]`, as which JSON reads a backspace: the backslash of a command that was written without its escape.
_LOST_BACKSLASH = re.compile(r"(?<!\\)(?:\\\\)*\\[bf](?=[a-z])")
MEANINGFUL = (
    "system", "system_prompt", "options", "choices", "finish_reason", "finish_reasons", "stop_reason", "truncated",
    "reasoning_content", "reasoning", "thinking", "history", "tools", "tool_calls", "image", "images",
)  # fmt: skip
"""Fields without which a record means something else: a form that does not use one refuses the record."""


def account(record: dict[str, Any], used: Collection[str], prefix: str, ignored: Counter[str]) -> None:
    """Counts the fields that a form does not use in `ignored`.

    Raises:
        RecordError: one of them is `MEANINGFUL`, or holds one option of several, and something stands in it.
    """
    counted_as = re.sub(r"\[\d+\]", "[]", prefix)
    options = {name for columns in option_columns(record) for name in columns}
    for name, value in record.items():
        if name in used or value is None:
            continue
        if name in options or (name in MEANINGFUL and value):
            expected = "none in this form: it would change what the record means"
            raise RecordError("field without a use", prefix + name, expected=expected, got=value)
        ignored[counted_as + name] += 1


def finish_reason(value: Any, where: str) -> str | None:
    """`stop`, `length` where the generator cut the text, or None where it is not known."""
    if isinstance(value, dict):
        value, where = value.get("type"), f"{where}.type"  # SGLang
    name = "" if value is None else checked_text(value, where).strip().lower()
    if name in _CUT_NAMES:
        return CUT
    if name not in ("", *_END_NAMES):
        raise RecordError("unknown finish reason", where, expected=f"stop or {CUT}", got=value)
    return "stop" if name else None


def reward(value: Any, where: str) -> float | None:
    """0, 1 or None."""
    if value is None:
        return None
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise RecordError("unknown reward", where, expected="0, 1, true, false or null", got=value)
    return float(value)


def logprobs(value: Any, where: str) -> tuple[float, ...] | None:
    """Finite numbers that are not positive, or None."""
    if value is None:
        return None
    if not isinstance(value, list):
        raise RecordError("wrong type", where, expected="a list of numbers or null", got=value)
    for index, one in enumerate(value):
        if isinstance(one, bool) or not isinstance(one, int | float):
            raise RecordError("wrong type", f"{where}[{index}]", expected="a number", got=one)
        if not _is_finite(one) or one > LOGPROB_TOLERANCE:
            raise RecordError("impossible log-prob", f"{where}[{index}]", expected="a finite number <= 0", got=one)
    return tuple(float(one) for one in value)


def identifier(record: dict[str, Any], field: str) -> str:
    """A name; whole numbers are taken as their digits."""
    value = record.get(field)
    if isinstance(value, int) and not isinstance(value, bool):
        return number_text(value, field)
    return required_text(record, field, "", may_be_blank=False)


def answer(record: dict[str, Any], field: str, prefix: str, *, required: bool) -> str:
    """A reference answer: a text, a finite number, or a list of one of these (OlympiadBench); blank where allowed."""
    value = record.get(field)
    if value is None and not required:
        return ""
    if isinstance(value, str) and _WRITTEN_TEXTS.match(value):
        value = from_json_text(value, prefix + field, "a text")
        record = {**record, field: value}
    if isinstance(value, list) and len(value) == 1:
        record, value = {**record, field: value[0]}, value[0]
    if isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value):
        return number_text(value, prefix + field)
    reference = required_text(record, field, prefix, may_be_blank=not required)
    final = reference.rpartition(REFERENCE_MARK)[2].strip() if REFERENCE_MARK in reference else reference
    # `nan` is how libraries of tables write a missing value.
    if (required or reference.strip()) and (not final.strip() or final.strip().lower() == "nan"):
        raise RecordError("empty field", prefix + field, expected="a reference answer", got=reference)
    return final


def reference(record: dict[str, Any], field: str, prefix: str, *, required: bool) -> str:
    """A reference answer for labels; blank where they do not need one."""
    if required and record.get(field) is None:
        reason, got = ("wrong type", None) if field in record else ("missing field", _names(record))
        expected = "a text or a number (--label given and --label majority need none)"
        raise RecordError(reason, prefix + field, expected=expected, got=got)
    return answer(record, field, prefix, required=required)


def _names(record: dict[str, Any]) -> str:
    return f"fields {', '.join(map(str, record))}" if record else "no field"


def _is_finite(value: int | float) -> bool:
    """Whether a float can hold the number, which JSON may write with thousands of digits."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def plain_number(value: int | float) -> str:
    """The digits of a finite number, without an exponent.

    Raises:
        ValueError: an integer of thousands of digits, which Python refuses to write.
    """
    return format(Decimal(repr(value)), "f") if isinstance(value, float) else str(value)


def number_text(value: int | float, where: str) -> str:
    """The digits of a number."""
    try:
        return plain_number(value)
    except ValueError:  # Python refuses to write integers of thousands of digits
        raise RecordError("wrong type", where, expected="a number of sane length", got="a huge integer") from None


def required_text(record: dict[str, Any], field: str, prefix: str, *, may_be_blank: bool) -> str:
    """A text that must be there."""
    if field not in record:
        raise RecordError("missing field", prefix + field, expected="a text", got=_names(record))
    value = text(record, field, prefix)
    if value is None:
        raise RecordError("wrong type", prefix + field, expected="a text", got=None)
    if not may_be_blank and not value.strip():
        raise RecordError("empty field", prefix + field, expected="a text that is not blank", got=value)
    return value


def text(record: dict[str, Any], field: str, prefix: str) -> str | None:
    """A text that UTF-8 can hold, or None."""
    value = record.get(field)
    if value is None:
        return None
    return checked_text(value, prefix + field)


def checked_text(value: Any, where: str) -> str:
    """`value` itself, if it is a text that UTF-8 can hold."""
    if not isinstance(value, str):
        raise RecordError("wrong type", where, expected="a text", got=value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as cause:
        got = f"a lone surrogate at character {cause.start}"
        raise RecordError("not UTF-8", where, expected="text that UTF-8 can hold", got=got) from None
    return value


def from_json_text(value: Any, where: str, expected: str) -> Any:
    """`value` itself; of a text, as which tables hold lists and objects, the JSON value that it writes."""
    if not isinstance(value, str):
        return value
    if _LOST_BACKSLASH.search(value):
        expected = r"\\ for each backslash in JSON text, where \b and \f are control characters"
        raise RecordError("lost backslash", where, expected=expected, got=value)
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise RecordError("wrong type", where, expected=f"{expected}, or its JSON text", got=value) from None


def mapping(value: Any, where: str) -> dict[str, Any]:
    """An object, which may stand as JSON text."""
    value = from_json_text(value, where, "an object")
    if not isinstance(value, dict):
        raise RecordError("wrong type", where, expected="an object", got=value)
    return value


def optional_mapping(record: dict[str, Any], field: str) -> dict[str, Any]:
    """An object, empty where there is none."""
    value = record.get(field)
    return {} if value is None else mapping(value, field)


def non_empty_list(value: Any, where: str, of: str) -> list[Any]:
    """A list with something in it, which may stand as JSON text."""
    value = from_json_text(value, where, f"a list of {of}")
    if not isinstance(value, list):
        raise RecordError("wrong type", where, expected=f"a list of {of}", got=value)
    if not value:
        reason = "empty trajectory list" if of == "trajectories" else "empty list"
        raise RecordError(reason, where, expected=f"at least one of the {of}", got=value)
    return value


def one_each(record: dict[str, Any], field: str, what: str, number: int) -> list[Any]:
    """A list with one entry for each of `number` solutions; Nones where the field is null or empty.

    Args:
        what: the entries in words, such as `rewards`.
    """
    value = from_json_text(record.get(field), field, "a list")
    if value is None or value == []:
        return [None] * number
    if not isinstance(value, list) or len(value) != number:
        expected = f"a list of {number}, one for each solution"
        raise RecordError(f"wrong number of {what}", field, expected=expected, got=value)
    return value
