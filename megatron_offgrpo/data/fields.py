"""Fields of raw records, checked one by one."""

import math
from decimal import Decimal
from typing import Any

from megatron_offgrpo.data.rejects import RecordError

LOGPROB_TOLERANCE = 1e-3
"""Log-probs above 0 by no more than this are the generator's rounding."""


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
    if isinstance(value, list) and len(value) == 1:
        record, value = {**record, field: value[0]}, value[0]
    if isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value):
        return number_text(value, prefix + field)
    return required_text(record, field, prefix, may_be_blank=not required)


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
        got = f"fields {', '.join(map(str, record))}"
        raise RecordError("missing field", prefix + field, expected="a text", got=got)
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


def mapping(value: Any, where: str) -> dict[str, Any]:
    """`value` itself, if it is an object."""
    if not isinstance(value, dict):
        raise RecordError("wrong type", where, expected="an object", got=value)
    return value


def non_empty_list(value: Any, where: str, of: str) -> list[Any]:
    """`value` itself, if it is a list with something in it."""
    if not isinstance(value, list):
        raise RecordError("wrong type", where, expected=f"a list of {of}", got=value)
    if not value:
        reason = "empty trajectory list" if of == "trajectories" else "empty list"
        raise RecordError(reason, where, expected=f"at least one of the {of}", got=value)
    return value
